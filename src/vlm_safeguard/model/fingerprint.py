"""The fingerprint: by what a guard knows the model again that it was fitted on.

Entries of every parameter tell its weights; what a few anchors' text passes give tells its
behaviour, also where weights are packed (quantized) and cannot be compared.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import torch

from vlm_safeguard.errors import SafeguardError
from vlm_safeguard.model.activations import capture_last_token
from vlm_safeguard.model.adapters import acting_parameters
from vlm_safeguard.model.backbone import Backbone
from vlm_safeguard.policy.policy import Policy
from vlm_safeguard.policy.tolerances import Tolerances

_ENTRIES = 64  # of each parameter
_TOKENS = 8  # likeliest next tokens of each anchor, whose logits are compared
_GOLDEN = 0.6180339887498949  # its multiples spread evenly without falling into a row's period
_TINY = 2.0**-24  # half of float16's smallest step
_HINT = "Fit a guard for this model."


@dataclass(frozen=True, eq=False)
class Fingerprint:
    """Of one model, with the adapters that acted in it.

    Attributes:
        weights: parameter → (64,) of its entries, float32; (0,) where it was packed.
        prompts: (anchors, width) token ids of a few anchors as text, −1 left of the shorter ones.
        states: (anchors, layers, hidden) states of their last tokens.
        tokens: (k,) ids.
        logits: (anchors, k) logits of these after each prompt.
    """

    weights: dict[str, torch.Tensor]
    prompts: torch.Tensor
    states: torch.Tensor
    tokens: torch.Tensor
    logits: torch.Tensor
    tolerances: Tolerances

    @classmethod
    def of(cls, backbone: Backbone, prompts: Sequence[Sequence[int]]) -> Fingerprint:
        """Measure a model on these prompts, token ids without images."""
        states, logits = _pass(backbone, prompts)
        tokens = torch.tensor(sorted(set(logits.topk(_TOKENS).indices.flatten().tolist())))
        width = max(map(len, prompts))
        padded = [[-1] * (width - len(prompt)) + list(prompt) for prompt in prompts]
        return cls(
            weights=sampled_weights(backbone.model),
            prompts=torch.tensor(padded),
            states=states,
            tokens=tokens,
            logits=logits[:, tokens],
            tolerances=Tolerances(),
        )

    def check_weights(self, backbone: Backbone, name: str) -> None:
        """Refuse a model with other weights than `name`, the one that was measured.

        Where one parameter of a layer is packed, none of that layer is compared: quantizers fold
        scales into its neighbours, too.

        Raises:
            SafeguardError: which parameters differ.
        """
        present = sampled_weights(backbone.model)
        packed = self._packed(backbone.model)
        different = [
            key
            for key in {**self.weights, **present}
            if _part(key) not in packed and not self._alike(key, present)
        ]
        if different:
            raise SafeguardError(
                f"This guard was fitted on {name}; this model has the same shape but other "
                f"weights: {different[0]} and {len(different) - 1} more of {len(present)} "
                f"parameters. If an adapter was merged, fit after merging. {_HINT}"
            )

    def _packed(self, model: torch.nn.Module) -> set[str]:
        """The layers of which a parameter is packed, here or when it was measured."""
        present = {name: _is_plain(parameter) for name, _, _, parameter in acting_parameters(model)}
        packed = {name for name, plain in present.items() if not plain}
        packed |= {name for name, entries in self.weights.items() if not entries.numel()}
        if getattr(model, "hf_quantizer", None) is not None:  # it may pack them by other names
            packed |= self.weights.keys() - present.keys()
        return {_part(name) for name in packed}

    def _alike(self, key: str, present: dict[str, torch.Tensor]) -> bool:
        if key not in self.weights or key not in present:
            return False
        fitted, entries = self.weights[key], present[key]
        limit = self.tolerances.weights * float(fitted.norm()) + _TINY * len(fitted) ** 0.5
        return bool(float((entries - fitted).norm()) <= limit)  # not where one of them is no number

    def check_behaviour(self, backbone: Backbone, policy: Policy, name: str) -> None:
        """Refuse a model whose passes give other than those of `name`, which was measured.

        Args:
            policy: sound, and of this model's shape.

        Raises:
            SafeguardError: what is off, and by how much.
        """
        packed = bool(self._packed(backbone.model))
        prompts = [[token for token in row if token >= 0] for row in self.prompts.tolist()]
        states, logits = _pass(backbone, prompts)
        limits = self.tolerances
        errors = {
            "harm scores": (
                _relative(_coordinates(policy, states), _coordinates(policy, self.states)),
                limits.packed_scores if packed else limits.scores,
            ),
            "next token's logits": (
                _relative(_centred(logits[:, self.tokens]), _centred(self.logits)),
                limits.packed_logits if packed else limits.logits,
            ),
        }
        for what, (error, limit) in errors.items():
            if not error <= limit:
                raise SafeguardError(
                    f"This guard was fitted on {name}; this model behaves otherwise: of requests "
                    f"that it was measured on, the {what} are off by {error:.0%}, more than "
                    f"{limit:.0%}. {_HINT}"
                )

    # --- keeping ---

    def tensors(self) -> dict[str, torch.Tensor]:
        """All tensors, by the names they are stored under."""
        named = {f"weights.{name}": entries for name, entries in self.weights.items()}
        rest = {name: getattr(self, name) for name in ("prompts", "states", "tokens", "logits")}
        return {f"fingerprint.{name}": tensor for name, tensor in (named | rest).items()}

    @classmethod
    def take(cls, tensors: dict[str, torch.Tensor], tolerances: Tolerances) -> Fingerprint:
        """The one whose `tensors` these are, taken out of them.

        Raises:
            KeyError: a tensor is missing.
        """
        start = "fingerprint.weights."
        names = [name for name in tensors if name.startswith(start)]
        return cls(
            weights={name.removeprefix(start): tensors.pop(name) for name in names},
            prompts=tensors.pop("fingerprint.prompts"),
            states=tensors.pop("fingerprint.states"),
            tokens=tensors.pop("fingerprint.tokens"),
            logits=tensors.pop("fingerprint.logits"),
            tolerances=tolerances,
        )


@dataclass(frozen=True, eq=False)
class EmbeddingSample:
    """What guards of format 3 know their model by.

    Attributes:
        values: (8, 16) of the input embeddings, float32.
    """

    values: torch.Tensor

    def check_weights(self, backbone: Backbone, name: str) -> None:
        """Refuse a model with other embeddings.

        Raises:
            SafeguardError: that it is another.
        """
        present, fitted = embedding_sample(backbone), self.values
        if present.shape != fitted.shape or not torch.allclose(
            present, fitted, rtol=0.02, atol=0.02 * float(present.std())
        ):
            raise SafeguardError(
                f"This guard was fitted on {name}; this model has the same shape but other "
                f"weights. {_HINT}"
            )

    def check_behaviour(self, backbone: Backbone, policy: Policy, name: str) -> None:
        """Format 3 holds nothing to compare with."""

    def tensors(self) -> dict[str, torch.Tensor]:
        """The one tensor, by the name it is stored under."""
        return {"embedding_sample": self.values}


# --- comparing ---


def _coordinates(policy: Policy, states: torch.Tensor) -> torch.Tensor:
    """(anchors, watched layers) what harm scores are made of: the centred first coordinates.

    They are not brought to one scale, so that deep layers, where harm is plainest, count most.
    """
    watched, made = list(policy.watched), policy.directions
    middle = (made.harmful_mean + made.harmless_mean)[watched] / 2
    return torch.einsum("nld,ld->nl", states[:, watched] - middle, made.vectors[watched, 0])


def _centred(logits: torch.Tensor) -> torch.Tensor:
    return logits - logits.mean(1, keepdim=True)


def _relative(present: torch.Tensor, fitted: torch.Tensor) -> float:
    return float((present - fitted).norm() / fitted.norm())


# --- measuring ---


@torch.no_grad()
def _pass(
    backbone: Backbone, prompts: Sequence[Sequence[int]]
) -> tuple[torch.Tensor, torch.Tensor]:
    """(prompts, layers, hidden) last-token states and (prompts, vocabulary) logits; on the CPU."""
    with capture_last_token(backbone) as states:
        final = backbone.run_text(prompts)[:, 0]
    if len(states) < len(backbone.layers):
        raise SafeguardError(
            f"Of the {len(backbone.layers)} layers of {backbone.decoder_path}, only "
            f"{sorted(states)} took part in a text pass with hooks on them. Are they compiled?"
        )
    stacked = torch.stack([states[layer].float().cpu() for layer in sorted(states)], dim=1)
    return stacked, backbone.next_token_logits(final).cpu()


@torch.no_grad()
def sampled_weights(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    """Parameter → (64,) float32 of its entries, at places that depend on its size alone.

    (0,) where they cannot be read as they are: packed, or in a tensor of another kind.
    """
    sampled: dict[str, torch.Tensor] = {}
    by_device: dict[torch.device, dict[str, torch.Tensor]] = {}
    for name, module, own, parameter in acting_parameters(model):
        if not parameter.numel():
            continue
        sampled[name] = torch.empty(0)
        if _is_plain(parameter):
            values = _values(module, own, parameter)
            places = _places(values.numel()).to(values.device)
            by_device.setdefault(values.device, {})[name] = torch.take(values, places).float()
    for entries in by_device.values():  # one transfer a device
        together = torch.stack(list(entries.values())).cpu()
        sampled.update(zip(entries, together, strict=True))
    return sampled


def _is_plain(parameter: torch.Tensor) -> bool:
    """Whether a parameter's entries are its numbers, not packed ones or a shard's."""
    plain = type(parameter.detach()) is torch.Tensor
    return plain and parameter.is_floating_point() and parameter.element_size() > 1


def _values(module: torch.nn.Module, own: str, parameter: torch.Tensor) -> torch.Tensor:
    """A parameter's tensor, also where accelerate offloads it."""
    if not parameter.is_meta:
        return parameter.detach()
    hook = getattr(module, "_hf_hook", None)
    maps = [getattr(each, "weights_map", None) for each in getattr(hook, "hooks", (hook,))]
    values = next((each[own] for each in maps if each is not None), None)
    if values is None:
        raise SafeguardError(
            f"The weight {own} of a {type(module).__name__} is on the meta device and no hook "
            "knows where its values are: the model is not loaded to its end."
        )
    return torch.as_tensor(values)


@lru_cache(maxsize=256)
def _places(size: int) -> torch.Tensor:
    """(64,) places spread over a tensor of that many entries."""
    spread = (torch.arange(1, _ENTRIES + 1, dtype=torch.float64) * _GOLDEN).frac()
    return (spread * size).long().clamp(max=size - 1)


def _part(name: str) -> str:
    """The layer that a parameter belongs to; outside the layers, its module."""
    layer = re.match(r".*?\.\d+(?=\.)", name)
    return layer.group() if layer else name.rpartition(".")[0]


@torch.no_grad()
def embedding_sample(backbone: Backbone) -> torch.Tensor:
    """(8, 16) values spread over the input embeddings, float32.

    Looked up by the model itself, as its weights may be packed or elsewhere.
    """
    embeddings = backbone.model.get_input_embeddings()
    rows = torch.linspace(0, len(embeddings.weight) - 1, 10).long()[1:-1]
    looked_up: torch.Tensor = embeddings(rows[None].to(backbone.device))
    return looked_up[0, :, :16].float().cpu()
