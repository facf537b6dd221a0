"""The fingerprint: by what a guard knows the model again that it was fitted on.

Entries of every weight tell what it is made of; what a few anchors' text passes give tells its
behaviour, also where weights are packed (quantized) and cannot be compared.
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar
from warnings import warn

import torch

from vlm_safeguard.errors import SafeguardError
from vlm_safeguard.model.activations import capture_last_token
from vlm_safeguard.model.adapters import acting_weights
from vlm_safeguard.model.backbone import Backbone
from vlm_safeguard.model.entries import spread_entries
from vlm_safeguard.model.parallel import own_part, whole
from vlm_safeguard.policy.policy import Policy
from vlm_safeguard.policy.tolerances import Tolerances

_ENTRIES = 64  # of each weight
_TOKENS = 8  # likeliest next tokens of each anchor, whose logits are compared
_BEHAVIOUR = ("harm scores", "next token's logits")
_HINT = "Fit a guard for this model."
_AGAIN = "Fit it again to have them refused."


@dataclass(frozen=True, eq=False)
class Fingerprint:
    """Of one model, with the adapters that acted in it.

    Attributes:
        weights: name → (64,) of its entries or fewer, float32; (0,) where it was packed.
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

        Raises:
            SafeguardError: which weights differ.
        """
        limit = self.tolerances.weights
        errors = self.weight_errors(backbone.model)
        different = [key for key, error in errors.items() if not error <= limit]
        if different:
            raise SafeguardError(
                f"This guard was fitted on {name}; this model has the same shape but other "
                f"weights: {different[0]} and {len(different) - 1} more of {len(errors)} are off "
                f"by more than {limit:.1%}. If an adapter was merged, or quantized weights were "
                "unpacked, fit a guard for what that gave."
            )

    def weight_errors(self, model: torch.nn.Module) -> dict[str, float]:
        """Relative error of each weight's entries; infinite where only one of the models has it.

        Where one weight of a layer is packed, none of that layer is compared: quantizers fold
        scales into its neighbours, too.
        """
        present = sampled_weights(model)
        packed = self._packed(model)
        return {
            key: self._error(self.weights.get(key), present.get(key))
            for key in {**self.weights, **present}
            if _part(key) not in packed
        }

    def _error(self, fitted: torch.Tensor | None, present: torch.Tensor | None) -> float:
        if fitted is None or present is None or fitted.shape != present.shape:
            return math.inf
        distance = float((present - fitted).norm())
        if distance <= self.tolerances.entry * math.sqrt(len(fitted)):
            return 0.0
        return distance / float(fitted.norm()) if fitted.any() else math.inf

    def _packed(self, model: torch.nn.Module) -> set[str]:
        """The layers of which a weight is packed, now or when it was measured.

        Some quantizers leave a module without any weight of its own.
        """
        present = {name: _is_plain(weight) for name, _, _, weight in acting_weights(model)}
        packed = {name for name, plain in present.items() if not plain}
        packed |= {name for name, entries in self.weights.items() if not entries.numel()}
        modules = dict(model.named_modules())
        for missing in self.weights.keys() - present.keys():
            module = modules.get(missing.rpartition(".")[0])
            if module is not None and not any(True for _ in module.parameters()):
                packed.add(missing)
        return {_part(name) for name in packed}

    def check_behaviour(self, backbone: Backbone, policy: Policy, name: str) -> None:
        """Refuse a model whose passes give other than those of `name`, which was measured.

        Args:
            policy: sound, and of this model's shape.

        Raises:
            SafeguardError: what is off, and by how much.
        """
        limits = self.tolerances
        scores, logits = limits.scores, limits.logits
        if self._packed(backbone.model):
            scores, logits = limits.packed_scores, limits.packed_logits
        off = self.behaviour_errors(backbone, policy)
        for what, error, limit in zip(_BEHAVIOUR, off, (scores, logits), strict=True):
            if not error <= limit:
                raise SafeguardError(
                    f"This guard was fitted on {name}; this model behaves otherwise: of requests "
                    f"that it was measured on, the {what} are off by {error:.0%}, more than "
                    f"{limit:.0%}. {_HINT}"
                )

    def behaviour_errors(self, backbone: Backbone, policy: Policy) -> tuple[float, float]:
        """Relative errors of the anchors' harm scores, and of their next token's logits."""
        states, logits = _pass(backbone, self.texts)
        return (
            self.scores_error(policy, states[:, list(policy.watched)]),
            self.logits_error(logits[:, self.tokens]),
        )

    @property
    def texts(self) -> list[tuple[int, ...]]:
        """The prompts without padding."""
        return [tuple(token for token in row if token >= 0) for row in self.prompts.tolist()]

    def scores_error(self, policy: Policy, states: torch.Tensor) -> float:
        """Relative error of what the anchors' harm scores are made of.

        Args:
            states: (anchors, watched layers, hidden) of their last tokens.
        """
        fitted = self.states[:, list(policy.watched)]
        return _relative(_coordinates(policy, states), _coordinates(policy, fitted))

    def logits_error(self, logits: torch.Tensor) -> float:
        """Relative error of logits, or of log-probabilities: each row's mean does not count.

        Args:
            logits: (anchors, k) of `tokens` after each prompt.
        """
        return _relative(_centred(logits), _centred(self.logits))

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

    tolerances: ClassVar[None] = None

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
        """Warn that format 3 holds nothing to compare with."""
        warn(
            "This guard is of format 3, which knows its model by embeddings alone: fine-tuned, "
            f"merged or abliterated weights are not noticed. {_AGAIN}",
            stacklevel=2,
        )

    def tensors(self) -> dict[str, torch.Tensor]:
        """The one tensor, by the name it is stored under."""
        return {"embedding_sample": self.values}


# --- comparing ---


def _coordinates(policy: Policy, states: torch.Tensor) -> torch.Tensor:
    """(anchors, watched layers) centred first coordinates, of (anchors, watched, hidden) states.

    They are not brought to one scale, so that deep layers, where harm is plainest, count most.
    """
    watched, made = list(policy.watched), policy.directions
    middle = (made.harmful_mean + made.harmless_mean)[watched] / 2
    return torch.einsum("nld,ld->nl", states - middle, made.vectors[watched, 0])


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
    """Name → (64,) float32 of each weight's entries or fewer, at places that depend on its size.

    (0,) where they cannot be read as they are: packed, or in a tensor of another kind.
    """
    sampled: dict[str, torch.Tensor] = {}
    by_kind: dict[tuple[torch.device, torch.dtype], dict[str, torch.Tensor]] = {}
    for name, module, own, weight in acting_weights(model):
        if not weight.numel():
            continue
        sampled[name] = torch.empty(0)
        if _is_plain(weight):
            values = _values(module, own, weight)
            entries = spread_entries(values, _ENTRIES)
            by_kind.setdefault((values.device, values.dtype), {})[name] = entries
    for named in by_kind.values():  # one transfer each
        sizes = list(map(len, named.values()))
        together = torch.cat(list(named.values())).float().cpu()
        sampled.update(zip(named, torch.split(together, sizes), strict=True))
    return sampled


def _is_plain(weight: torch.Tensor) -> bool:
    """Whether a weight's entries are its numbers, not packed ones."""
    plain = type(own_part(weight).detach()) is torch.Tensor
    return plain and weight.is_floating_point() and weight.element_size() > 1


def _values(module: torch.nn.Module, own: str, weight: torch.Tensor) -> torch.Tensor:
    """A weight's tensor, also where accelerate offloads it, or processes share it."""
    if not weight.is_meta:
        return whole(weight)
    hook = getattr(module, "_hf_hook", None)
    maps = [getattr(each, "weights_map", None) for each in getattr(hook, "hooks", (hook,))]
    values = next((each[own] for each in maps if each is not None), None)
    if values is None:
        raise SafeguardError(
            f"The weight {own} of a {type(module).__name__} is on the meta device and no hook "
            "knows where its values are: the model is not loaded to its end."
        )
    return torch.as_tensor(values)


def _part(name: str) -> str:
    """The layer that a weight belongs to; outside the layers, its module."""
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
