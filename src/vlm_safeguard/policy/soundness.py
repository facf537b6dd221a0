"""Refusing a policy that cannot be right, before anything runs under it."""

from __future__ import annotations

from collections.abc import Sequence
from math import isfinite

import torch

from vlm_safeguard.errors import SafeguardError
from vlm_safeguard.policy.criterion import Criterion
from vlm_safeguard.policy.gate import TextDiscriminant
from vlm_safeguard.policy.own_refusal import RefusalDiscriminant
from vlm_safeguard.policy.policy import Policy

_NAMES = {
    "vectors": "directions",
    "harmful_mean": "harmful mean",
    "harmless_mean": "harmless mean",
    "drift": "drift",
    "discriminant_weights": "discriminant",
    "discriminant_offset": "discriminant's offset",
}


def check_sound(policy: Policy) -> None:
    """Refuse what cannot be right.

    Raises:
        SafeguardError: directions that are not finite or not orthonormal; layers, a rank or a gate
            that cannot be.
    """
    vectors = policy.directions.vectors
    if vectors.dim() != 3:
        raise SafeguardError(f"The guard's directions have shape {tuple(vectors.shape)}.")
    count, stored, hidden = vectors.shape
    check_layers(policy.layers, count)
    if not 0 < policy.rank <= stored:
        raise SafeguardError(f"The guard's rank is {policy.rank}; it stores {stored}.")
    _check_gate(policy, count)
    for name, tensor in policy.tensors().items():
        _check_tensor(_NAMES[name], tensor, count, hidden)
    basis = policy.basis().double()
    if not torch.allclose(basis @ basis.mT, torch.eye(stored).double(), atol=1e-4):
        raise SafeguardError("The guard's directions are not orthonormal.")


def check_layers(layers: Sequence[int], count: int) -> None:
    """Refuse layer indices that are none, not in order, repeated, or not in 0 … count − 1.

    Raises:
        SafeguardError: and which they are.
    """
    if not layers or list(layers) != sorted(set(layers)):
        raise SafeguardError(f"Layers {list(layers)} are not a list of layers in ascending order.")
    if not (layers[0] >= 0 and layers[-1] < count):
        raise SafeguardError(f"Layers {list(layers)} are not all in 0–{count - 1}.")


def _check_gate(policy: Policy, count: int) -> None:
    names = [criterion.name for criterion in policy.gate]
    if not names:
        raise SafeguardError("The guard's gate has no criterion: it would never open.")
    if len(set(names)) < len(names):
        raise SafeguardError(f"The guard's gate holds a criterion twice: {', '.join(names)}.")
    told = any(isinstance(c, RefusalDiscriminant | TextDiscriminant) for c in policy.gate)
    if told and policy.discriminant is None:
        raise SafeguardError("The guard's gate asks for a discriminant, and it holds none.")
    for criterion in policy.gate:
        _check_numbers(criterion)
        if criterion.watched:
            # behind an edit, the multimodal pass shows what the edit made of it
            upto = policy.layers[0] + 1 if criterion.reads == "image" else count
            check_layers(criterion.watched, upto)


def _check_numbers(criterion: Criterion) -> None:
    for name, value in criterion:
        if isinstance(value, float) and not isfinite(value):
            raise SafeguardError(
                f"The gate's {criterion.name} has {name} {value}: it would never open."
            )


def _check_tensor(name: str, tensor: torch.Tensor, count: int, hidden: int) -> None:
    if tensor.dtype != torch.float32 or tensor.is_meta:
        raise SafeguardError(
            f"The guard's {name} is {tensor.dtype} on {tensor.device}; it has to be float32, with "
            "values."
        )
    if not torch.isfinite(tensor).all():
        raise SafeguardError(f"The guard's {name} holds values that are not finite.")
    expected = (count,) if tensor.dim() == 1 else (count, hidden)
    if (tensor.shape[0], *tensor.shape[1:][-1:]) != expected:
        raise SafeguardError(f"The guard's {name} has shape {tuple(tensor.shape)}.")
