"""How far the same weights, rounded, and other weights are from those a guard was fitted on.

`python benchmarks/tolerances.py` prints what `Tolerances` quotes, of the Pocket VLM.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from vlm_safeguard import Guard
from vlm_safeguard.anchors import shipped_anchors, shipped_calibration
from vlm_safeguard.model.backbone import Backbone
from vlm_safeguard.model.fingerprint import Fingerprint
from vlm_safeguard.pocket import load

Change = Callable[[Any], Any]


def layers(model: Any) -> Any:
    """The decoder's layers."""
    return model.model.language_model.layers


def linears(part: nn.Module, *names: str) -> Iterator[nn.Linear]:
    """Its linear layers; those of these names, where any are given."""
    for path, module in part.named_modules():
        if isinstance(module, nn.Linear) and (not names or path.endswith(names)):
            yield module


def rounded(levels: Tensor, block: int) -> Change:
    """Each weight the nearest of these levels (−1 to 1), scaled by its block's largest."""
    middles = (levels[1:] + levels[:-1]) / 2

    @torch.no_grad()
    def change(model: Any) -> None:
        for module in linears(layers(model)):
            blocks = module.weight.view(-1, block)
            scale = blocks.abs().amax(1, keepdim=True)
            nearest = levels[torch.bucketize(blocks / scale, middles)]
            module.weight.copy_((nearest * scale).view_as(module.weight))

    return change


def abliterated(direction: Tensor, only: int | None = None) -> Change:
    """One direction taken out of what every layer writes, or one layer."""

    @torch.no_grad()
    def change(model: Any) -> None:
        part = layers(model) if only is None else layers(model)[only]
        for module in linears(part, "o_proj", "down_proj"):
            module.weight -= torch.outer(direction, direction @ module.weight)

    return change


def merged(share: float, rank: int = 8) -> Change:
    """A random LoRA update of this share of the norm, in every query and value projection."""

    @torch.no_grad()
    def change(model: Any) -> None:
        torch.manual_seed(0)
        for module in linears(layers(model), "q_proj", "v_proj"):
            rows, columns = module.weight.shape
            update = torch.randn(rows, rank) @ torch.randn(rank, columns)
            module.weight += update * (share * module.weight.norm() / update.norm())

    return change


@torch.no_grad()
def drawn_anew(model: Any) -> None:
    """Every matrix but the embeddings, as large as before."""
    torch.manual_seed(0)
    for name, weight in model.named_parameters():
        if "embed_tokens" not in name and weight.dim() > 1:
            weight.copy_(torch.randn_like(weight) * weight.std())


def both(*changes: Change) -> Change:
    """One after the other."""

    def change(model: Any) -> None:
        for each in changes:
            each(model)

    return change


def main() -> None:
    """Fit a guard, change the model in each way, and print by how much it is another."""
    model, processor = load()
    model = model.float()
    guard = Guard.fit(
        model, processor, anchors=shipped_anchors(), calibration=shipped_calibration()[:220]
    )
    known, policy = guard.fingerprint, guard.policy
    assert isinstance(known, Fingerprint)
    middle = policy.layers[len(policy.layers) // 2]
    means = policy.directions
    harm = nn.functional.normalize(means.harmful_mean[middle] - means.harmless_mean[middle], dim=0)
    byte = torch.linspace(-1, 1, 255)
    normal = torch.special.ndtri(torch.linspace(0.03, 0.97, 16))
    nibble = normal / normal.max()
    rows = {
        "as it is": lambda m: None,
        "float16": lambda m: m.half(),
        "bfloat16": lambda m: m.bfloat16(),
        "8 bits, by 64": rounded(byte, 64),
        "8 bits, by 192": rounded(byte, 192),
        "4 bits, by 64": rounded(nibble, 64),
        "4 even bits, by 32": rounded(torch.linspace(-1, 1, 15), 32),
        "4 even bits, by 64": rounded(torch.linspace(-1, 1, 15), 64),
        "abliterated": abliterated(harm),
        "abliterated, the first edited layer alone": abliterated(harm, policy.layers[0]),
        "abliterated, 8 bits": both(abliterated(harm), rounded(byte, 64)),
        "abliterated, 4 bits": both(abliterated(harm), rounded(nibble, 64)),
        "LoRA merged, 0.3 %": merged(0.003),
        "LoRA merged, 1 %": merged(0.01),
        "LoRA merged, 10 %": merged(0.1),
        "LoRA merged, 30 %": merged(0.3),
        "drawn anew": drawn_anew,
    }
    print(f"{'':42} weights: median  largest  over   scores   logits")
    for name, change in rows.items():
        other = copy.deepcopy(model)
        change(other)
        errors = torch.tensor(list(known.weight_errors(other).values()))
        scores, logits = known.behaviour_errors(Backbone.of(other), policy)
        print(
            f"{name:42} {errors.median():15.3%} {errors.max():8.3%} {(errors > 0.005).sum():5} "
            f"{scores:8.3f} {logits:8.3f}",
            flush=True,
        )


if __name__ == "__main__":
    main()
