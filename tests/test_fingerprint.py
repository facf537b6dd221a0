"""A guard knows its model again: other dtypes and packed weights pass, other weights do not."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.ao.quantization import quantize_dynamic
from transformers import LlavaProcessor

from support.observe import Model
from support.packed import pack
from support.reference import refitted
from tiny.pocket import make_model
from vlm_safeguard.errors import SafeguardError
from vlm_safeguard.guard import Guard
from vlm_safeguard.model.backbone import Backbone
from vlm_safeguard.model.fingerprint import Fingerprint, sampled_weights
from vlm_safeguard.policy.tolerances import Tolerances

Change = Callable[[Model], Any]


@pytest.fixture
def own(model: Model) -> Model:
    """A copy to change."""
    return copy.deepcopy(model)


def attach(guard: Guard, model: Any) -> None:
    with guard.attach(model):
        pass


def layers(model: Model) -> Any:
    return model.model.language_model.layers


def written(model: Model) -> list[nn.Linear]:
    """The matrices that write to the residual stream."""
    return [m for layer in layers(model) for m in (layer.self_attn.o_proj, layer.mlp.down_proj)]


# --- what passes ---


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_the_same_weights_in_another_dtype_pass(own: Model, guard: Guard, dtype: Any) -> None:
    attach(guard, own.to(dtype))


def test_weights_that_went_through_bfloat16_pass_and_so_does_the_way_back(
    own: Model, guard: Guard
) -> None:
    rounded = own.to(torch.bfloat16)
    short = refitted(guard, rounded)
    attach(guard, copy.deepcopy(rounded).float())
    attach(short, rounded)
    attach(short, rounded.half())


def test_packed_weights_pass_by_their_behaviour(own: Model, guard: Guard) -> None:
    pack(own)
    attach(guard, own)


def test_a_guard_of_packed_weights_fits_them_unpacked(
    own: Model, model: Model, guard: Guard
) -> None:
    pack(own)
    attach(refitted(guard, own), model)


class Renamed(nn.Module):
    """A linear layer whose packed weight has another name, in a buffer."""

    qweight: Tensor

    def __init__(self, module: nn.Linear) -> None:
        super().__init__()
        self.scale = float(module.weight.abs().max()) / 32767
        self.register_buffer("qweight", (module.weight.detach() / self.scale).round().int())

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.linear(x, self.qweight * self.scale)


def test_packed_weights_may_have_other_names(own: Model, guard: Guard) -> None:
    for layer in layers(own):
        layer.mlp.down_proj = Renamed(layer.mlp.down_proj)
    attach(guard, own)


def by_torch(model: Model) -> Model:
    """Its decoder's weights as torch's own quantization keeps them: no parameters any more."""
    decoder = quantize_dynamic(  # type: ignore[no-untyped-call]
        model.model.language_model, {nn.Linear}, dtype=torch.qint8
    )
    assert not any("q_proj" in name for name, _ in decoder.named_parameters())
    model.model.language_model = decoder
    return model


@pytest.mark.filterwarnings("ignore:.*deprecated")
def test_layers_that_torch_quantized_pass_by_their_behaviour(own: Model, guard: Guard) -> None:
    other = copy.deepcopy(own)
    abliterate(other, guard)
    attach(guard, by_torch(own))
    with pytest.raises(SafeguardError, match="behaves otherwise"):
        attach(guard, by_torch(other))


def test_weights_that_are_gone_are_not_taken_for_packed_ones(own: Model, guard: Guard) -> None:
    del layers(own)[2].input_layernorm
    layers(own)[2].input_layernorm = nn.Identity()
    with pytest.raises(SafeguardError, match=r"behaves otherwise|layers\.2\.input_layernorm"):
        attach(guard, own)


def test_tied_weights_pass_untied(own: Model, guard: Guard) -> None:
    own.lm_head.weight = own.get_input_embeddings().weight
    tied = refitted(guard, own)
    attach(tied, own)
    own.lm_head.weight = nn.Parameter(own.lm_head.weight.detach().clone())
    attach(tied, own)


# --- what does not ---


def abliterate(model: Model, guard: Guard) -> None:
    """Take a layer's harmful direction out of what every layer writes."""
    made, layer = guard.policy.directions, guard.policy.layers[-1]
    direction = made.harmful_mean[layer] - made.harmless_mean[layer]
    direction = direction / direction.norm()
    for matrix in written(model):
        matrix.weight.data -= torch.outer(direction, direction @ matrix.weight.data)


def merge_lora(rank: int) -> Change:
    """Of one hundredth of the weights' size, which is little for a fine-tune."""

    def merge(model: Model) -> None:
        torch.manual_seed(rank)
        for layer in layers(model):
            for matrix in (layer.self_attn.q_proj, layer.self_attn.v_proj):
                rows, columns = matrix.weight.shape
                update = torch.randn(rows, rank) @ torch.randn(rank, columns)
                matrix.weight.data += update * (0.01 * matrix.weight.norm() / update.norm())

    return merge


def draw_anew(model: Model) -> None:
    for name, weight in model.named_parameters():
        if "embed_tokens" not in name:
            weight.data.copy_(torch.randn_like(weight) * (weight.std(correction=0) + 1e-3))


def swap_layers(model: Model) -> None:
    stack = layers(model)
    stack[1], stack[2] = stack[2], stack[1]
    for place in (1, 2):
        stack[place].self_attn.layer_idx = place


def write(where: Callable[[Model], Tensor], change: Callable[[Tensor], Tensor]) -> Change:
    return lambda model: where(model).data.copy_(change(where(model).data))


def slightly(values: Tensor) -> Tensor:
    return values + 0.02 * values.std() * torch.randn_like(values)


OTHER: dict[str, tuple[Change, str]] = {
    **{f"a merged LoRA of rank {n}": (merge_lora(n), r"layers\.0.*q_proj") for n in (4, 16)},
    **{
        f"layer {n} changed": (
            write(lambda m, n=n: layers(m)[n].mlp.up_proj.weight, slightly),  # type: ignore[misc]
            rf"layers\.{n}\.mlp\.up_proj\.weight and 0 more",
        )
        for n in (0, 3, 5)
    },
    "layers swapped": (swap_layers, r"layers\.1\."),
    "all but the embeddings drawn anew": (draw_anew, "other weights"),
    "the last norm scaled": (
        write(lambda m: m.model.language_model.norm.weight, lambda w: w * 1.1),
        r"language_model\.norm",
    ),
    "another output layer": (write(lambda m: m.lm_head.weight, slightly), "lm_head"),
    "another vision tower": (
        write(lambda m: m.model.vision_tower.encoder.layers[1].mlp.fc1.weight, slightly),
        r"vision_tower\.",
    ),
    "another projector": (
        write(lambda m: m.model.multi_modal_projector.linear_1.weight, slightly),
        r"projector\.",
    ),
    "no numbers": (write(lambda m: m.lm_head.weight, lambda w: w * float("nan")), "lm_head|act"),
    "embeddings changed": (
        write(lambda m: m.get_input_embeddings().weight, slightly),
        "embed_tokens",
    ),
    "other positions": (
        lambda m: m.model.language_model.rotary_emb.inv_freq.mul_(0.2),
        "behaves otherwise",
    ),
    "states scaled by other code": (
        lambda m: layers(m)[1].mlp.register_forward_hook(lambda mod, args, out: out * 0.5),
        "behaves otherwise.*harm scores",
    ),
    "logits changed by other code": (
        lambda m: m.lm_head.register_forward_hook(lambda mod, args, out: out.flip(-1)),
        "behaves otherwise.*logits",
    ),
}


@pytest.mark.parametrize("name", OTHER)
def test_another_model_is_refused_by_what_differs(own: Model, guard: Guard, name: str) -> None:
    change, message = OTHER[name]
    change(own)
    with pytest.raises(SafeguardError, match=message):
        attach(guard, own)


@pytest.mark.parametrize("packed", [False, True], ids=["plain", "packed"])
def test_an_abliterated_model_is_refused(own: Model, guard: Guard, packed: bool) -> None:
    abliterate(own, guard)
    if packed:
        pack(own)
    with pytest.raises(SafeguardError, match="behaves otherwise" if packed else "other weights"):
        attach(guard, own)
    # by its behaviour alone, too
    with pytest.raises(SafeguardError, match="behaves otherwise"):
        guard.check_behaves(Backbone.of(own))


def test_weights_that_are_offloaded_are_compared(
    own: Model, processor: LlavaProcessor, guard: Guard, tmp_path: Path
) -> None:
    from accelerate import cpu_offload, disk_offload

    abliterate(own, guard)
    same, other = make_model(processor), own
    cpu_offload(same, torch.device("cpu"))
    disk_offload(other, str(tmp_path), execution_device=torch.device("cpu"))
    guard.check_fits(Backbone.of(same))
    with pytest.raises(SafeguardError, match=r"other weights: .*o_proj"):
        guard.check_fits(Backbone.of(other))


@pytest.mark.parametrize("width", [576, 4096, 8192])
def test_one_direction_less_is_seen_at_the_width_of_real_models(width: int) -> None:
    """And no rounding is mistaken for it."""
    torch.manual_seed(width)
    tolerance = Tolerances().weights
    matrix = nn.Linear(256, width, bias=False)
    direction = torch.nn.functional.normalize(torch.randn(width), dim=0)
    before = sampled_weights(matrix)["weight"]
    rounded = sampled_weights(copy.deepcopy(matrix).bfloat16())["weight"]
    matrix.weight.data -= torch.outer(direction, direction @ matrix.weight.data)
    after = sampled_weights(matrix)["weight"]
    assert float((after - before).norm() / before.norm()) > tolerance
    assert float((rounded - before).norm() / before.norm()) < tolerance / 2


def test_entries_are_spread_over_rows_and_columns() -> None:
    square = nn.Linear(64, 64, bias=False)
    square.weight.data = torch.arange(64.0 * 64).view(64, 64)
    places = sampled_weights(square)["weight"]
    assert len(set(places.tolist())) == 64
    assert min(len(set((places // 64).tolist())), len(set((places % 64).tolist()))) > 30
    small = sampled_weights(nn.Linear(2, 2))["bias"]
    assert len(small) == 2


def test_what_is_tolerated_is_what_was_saved(own: Model, guard: Guard, tmp_path: Path) -> None:
    merge_lora(4)(own)
    with pytest.raises(SafeguardError, match="other weights"):
        attach(guard, own)
    known = guard.fingerprint
    assert isinstance(known, Fingerprint)
    lax = Tolerances(weights=0.5, scores=1.0, logits=1.0)
    guard.variant(fingerprint=replace(known, tolerances=lax)).save_pretrained(tmp_path)
    attach(Guard.from_pretrained(tmp_path), own)
