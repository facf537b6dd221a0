"""What follows from the states of texts: directions, and which layers are edited and read."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from vlm_safeguard.policy.directions import (
    Directions,
    choose_layers,
    fit_directions,
    held_out_scores,
    legible_before,
    legible_layers,
)
from vlm_safeguard.policy.options import FitOptions


@dataclass(frozen=True)
class TextStates:
    """Of each group of texts that a guard is fitted on, its last tokens' states.

    Attributes:
        harmful: (pairs, layers, hidden) of the harmful anchors; `harmless` likewise.
        calibration: (requests, layers, hidden).
        final: of the three groups, (n, hidden) states that predict the next token.
    """

    harmful: torch.Tensor
    harmless: torch.Tensor
    calibration: torch.Tensor
    final: tuple[torch.Tensor, ...]


@dataclass(frozen=True)
class Choice:
    """What follows from the states of texts.

    Attributes:
        layers: that are edited.
        legible: those of them that the gate reads.
        image_layer: of the multimodal pass that the gate reads; None where none is worth it.
        scores: (n,) harm scores over the legible layers: `harmful` and `harmless` anchors, held
            out, and `calibration` requests.
    """

    directions: Directions
    rank: int
    layers: tuple[int, ...]
    legible: tuple[int, ...]
    image_layer: int | None
    scores: dict[str, torch.Tensor]


def choose(
    texts: TextStates, rank: int, layers: Sequence[int] | None, options: FitOptions
) -> Choice:
    """Directions of every layer, and which layers are edited and read."""
    pairs, count = texts.harmful.shape[:2]
    held_out = held_out_scores(texts.harmful, texts.harmless, options.folds)
    stored = min(max(options.stored_rank, rank), pairs)
    directions = fit_directions(texts.harmful, texts.harmless, stored, held_out=held_out)
    if layers is None:
        layers = choose_layers(count, options.first_layer, options.last_layer)
    legible = legible_layers(directions, layers, options.near_best)
    columns = list(legible)
    return Choice(
        directions=directions,
        rank=rank,
        layers=tuple(layers),
        legible=legible,
        image_layer=legible_before(directions, layers[0], options.legible),
        scores={
            "harmful": held_out[0][:, columns].mean(1),
            "harmless": held_out[1][:, columns].mean(1),
            "calibration": directions.harm_scores(texts.calibration)[:, columns].mean(1),
        },
    )
