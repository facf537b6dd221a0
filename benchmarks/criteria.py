"""How well scores of a text tell harm: AUROC, and what opens where 1 % of harmless requests do.

All are fitted on the shipped anchors in all forms (but for those that say otherwise), have their
threshold by split conformal on the calibration requests, and are tried on the development prompts,
as they are and in wrappers that neither the fit nor the threshold has seen.
"""

from __future__ import annotations

import json
from argparse import ArgumentParser
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from matplotlib.figure import Figure
from rich.box import SIMPLE
from rich.console import Console
from rich.table import Table
from tqdm.auto import tqdm

from machine import machine
from models import NAMES, load
from results import FOLDER, told
from vlm_safeguard.anchors import shipped_anchors, shipped_calibration
from vlm_safeguard.evaluation.asks.prompts import read_prompts
from vlm_safeguard.evaluation.statistics import Estimate, share
from vlm_safeguard.fit.further import encode
from vlm_safeguard.forms import (
    FollowUp,
    further_calibration,
    further_pairs,
    shipped_wrappers,
)
from vlm_safeguard.model.activations import hidden_states
from vlm_safeguard.model.backbone import Backbone
from vlm_safeguard.policy.directions import auroc, choose_layers, fit_directions, legible_layers
from vlm_safeguard.policy.discriminant import Discriminant, choose_discriminant
from vlm_safeguard.policy.options import FitOptions
from vlm_safeguard.policy.threshold import threshold_for
from vlm_safeguard.report.figures.style import BLUE, GREEN

Request = str | FollowUp
States = dict[str, torch.Tensor]  # group → (requests, layers, hidden), or scores of them
_FORMS = ("plain", "wrapped")
_ROWS = 16


@dataclass(frozen=True)
class Row:
    """One score, on the development prompts in one form.

    Attributes:
        auroc: of harmful over harmless prompts.
        opened: share of the harmful ones above the threshold; `harmless` likewise.
    """

    score: str
    form: str
    auroc: float
    opened: Estimate
    harmless: Estimate


def groups(limit: int | None) -> dict[str, list[Request]]:
    """All requests by what they are for; of each, `limit` at most."""
    anchors, calibration = shipped_anchors(), shipped_calibration()
    options, wrappers = FitOptions(), shipped_wrappers()
    seen, unseen = wrappers[::2], wrappers[1::2]
    pairs = further_pairs(anchors, seen, options.wrappings, options.folds)
    further = further_calibration(calibration, seen, options.folds)
    asked: dict[str, list[Request]] = {
        "anchors, harmful": [anchor.harmful for anchor in anchors],
        "anchors, harmless": [anchor.harmless for anchor in anchors],
        "further, harmful": [pair.harmful for pair in pairs],
        "further, harmless": [pair.harmless for pair in pairs],
        "calibration": [*calibration, *seen, *others],
    }
    for kind in ("harmful", "harmless"):
        texts = [prompt.text for prompt in read_prompts(kind, "development")]
        asked[f"plain, {kind}"] = [*texts]
        asked[f"wrapped, {kind}"] = [
            unseen[number % len(unseen)].around(text) for number, text in enumerate(texts)
        ]
    return {name: requests[:limit] for name, requests in asked.items()}


@torch.inference_mode()
def read(
    backbone: Backbone,
    processor: Any,
    asked: dict[str, list[Request]],
    pool: Callable[[torch.Tensor, torch.Tensor, int], torch.Tensor],
    label: str,
) -> States:
    """What `pool` makes of the states of every request, group by group.

    Args:
        pool: of (rows, tokens, hidden) states, a (rows, tokens) mask and the layer's index.
    """
    rows = [encode(processor, request) for requests in asked.values() for request in requests]
    order = sorted(range(len(rows)), key=lambda index: len(rows[index]))
    kept: list[torch.Tensor] = [torch.empty(0)] * len(rows)
    mask, layers = torch.empty(0), {}

    def keep(index: int) -> Callable[..., None]:
        def hook(module: Any, args: Any, output: Any) -> None:
            states = hidden_states(output, backbone.streams_at).float()
            layers[index] = pool(states, mask.to(states.device), index).cpu()

        return hook

    handles = [m.register_forward_hook(keep(i)) for i, m in enumerate(backbone.layers)]
    for start in tqdm(range(0, len(order), _ROWS), desc=label):
        batch = order[start : start + _ROWS]
        width = max(len(rows[index]) for index in batch)
        lengths = torch.tensor([len(rows[index]) for index in batch])
        mask = torch.arange(width)[None] >= (width - lengths)[:, None]
        backbone.run_text([rows[index] for index in batch])
        together = torch.stack([layers[index] for index in sorted(layers)], dim=1)
        for index, states in zip(batch, together, strict=True):
            kept[index] = states
    for handle in handles:
        handle.remove()
    sizes = [len(requests) for requests in asked.values()]
    parts = torch.split(torch.stack(kept), sizes)
    return dict(zip(asked, parts, strict=True))


def last(states: torch.Tensor, mask: torch.Tensor, layer: int) -> torch.Tensor:
    """The last token's states."""
    return states[:, -1]


def mean(states: torch.Tensor, mask: torch.Tensor, layer: int) -> torch.Tensor:
    """The tokens' mean state."""
    return (states * mask[..., None]).sum(1) / mask.sum(1, keepdim=True)


def rows_of(name: str, scores: Callable[[torch.Tensor], torch.Tensor], by: States) -> list[Row]:
    """A score on both forms."""
    threshold = threshold_for(scores(by["calibration"]), FitOptions().budget)
    rows = []
    for form in _FORMS:
        harmful, harmless = (scores(by[f"{form}, {kind}"]) for kind in ("harmful", "harmless"))
        rows.append(
            Row(
                name,
                form,
                float(auroc(harmful[:, None], harmless[:, None])),
                share((harmful > threshold).tolist()),
                share((harmless > threshold).tolist()),
            )
        )
    return rows


def measured(backbone: Backbone, processor: Any, limit: int | None) -> Iterator[Row]:
    """Every score in turn."""
    options, asked = FitOptions(), groups(limit)
    by = read(backbone, processor, asked, last, "last tokens")
    plain = by["anchors, harmful"], by["anchors, harmless"]
    made = fit_directions(*plain, 1)
    count = len(backbone.layers)
    window = choose_layers(count, options.first_layer, options.last_layer)
    legible = list(legible_layers(made, window, options.near_best))
    name = f"harm score (SSD), layers {legible[0]}–{legible[-1]}"
    yield from rows_of(name, lambda x: made.harm_scores(x)[:, legible].mean(1), by)

    alone = torch.arange(len(plain[0]))
    yield from _discriminant("discriminant, anchors alone", by, plain, alone)[1]
    pairs = further_pairs(shipped_anchors(), options.wrappings)[:limit]
    topics = torch.cat([alone, torch.tensor([pair.topic for pair in pairs])])
    everything = _all_forms(by)
    chosen, rows = _discriminant("discriminant, all forms", by, everything, topics)
    yield from rows
    for layer in range(count):
        for kind, scorer in (("harm score (SSD)", made.harm_score), ("discriminant", chosen.score)):
            at = _at_layer(scorer, layer)
            yield from rows_of(f"{kind}, layer {layer}", at, by)
    probe = _probe(everything[0], everything[1], legible)
    yield from rows_of("logistic probe, all forms", probe, by)

    pooled = read(backbone, processor, asked, mean, "means over tokens")
    name = "discriminant of the tokens' mean"
    yield from _discriminant(name, pooled, _all_forms(pooled), topics)[1]

    def highest(states: torch.Tensor, mask: torch.Tensor, layer: int) -> torch.Tensor:
        scores = states @ chosen.weights[layer].to(states.device) - chosen.offset[layer]
        return scores.masked_fill(~mask, -torch.inf).amax(1)

    fitted_on = ("anchors", "further")
    tried = {name: x for name, x in asked.items() if not name.startswith(fitted_on)}
    peaks = read(backbone, processor, tried, highest, "maxima over tokens")
    yield from rows_of(
        "discriminant, highest of the tokens", lambda x: x[:, legible].mean(1), peaks
    )


def _at_layer(
    scorer: Callable[[torch.Tensor, int], torch.Tensor], layer: int
) -> Callable[[torch.Tensor], torch.Tensor]:
    return lambda states: scorer(states[:, layer], layer)


def _all_forms(by: States) -> tuple[torch.Tensor, torch.Tensor]:
    """States of the anchors, then of the pairs in further forms: harmful, harmless."""
    return (
        torch.cat([by["anchors, harmful"], by["further, harmful"]]),
        torch.cat([by["anchors, harmless"], by["further, harmless"]]),
    )


def _discriminant(
    name: str, by: States, classes: tuple[torch.Tensor, torch.Tensor], topics: torch.Tensor
) -> tuple[Discriminant, list[Row]]:
    """With its shrinkage and layers chosen as the fit does it."""
    options = FitOptions()
    folds = topics % options.folds
    chosen = choose_discriminant(
        classes[0], classes[1], folds, options.shrinkages, options.near_best
    )
    layers = list(chosen.layers)
    title = f"{name}, layers {layers[0]}–{layers[-1]}, δ {chosen.shrinkage:g}"

    def scores(states: torch.Tensor) -> torch.Tensor:
        return chosen.discriminant.scores(states)[:, layers].mean(1)

    return chosen.discriminant, rows_of(title, scores, by)


def _probe(
    harmful: torch.Tensor, harmless: torch.Tensor, layers: list[int]
) -> Callable[[torch.Tensor], torch.Tensor]:
    """A ridge logistic regression a layer, averaged; its penalty is that of unit variance."""
    states = torch.cat([harmful, harmless])[:, layers]
    centre, scale = states.mean(0), states.std(0) + 1e-6
    inputs = (states - centre) / scale
    labels = torch.cat([torch.ones(len(harmful)), torch.zeros(len(harmless))])
    weights = torch.zeros(inputs.shape[1:], requires_grad=True)
    offset = torch.zeros(len(layers), requires_grad=True)
    solver = torch.optim.LBFGS([weights, offset], max_iter=200, line_search_fn="strong_wolfe")

    def loss() -> torch.Tensor:
        solver.zero_grad()
        logits = torch.einsum("nld,ld->nl", inputs, weights) + offset
        wanted = labels[:, None].expand_as(logits)
        fit = torch.nn.functional.binary_cross_entropy_with_logits(logits, wanted, reduction="sum")
        total: torch.Tensor = fit + (weights**2).sum() / 2
        total.backward()  # type: ignore[no-untyped-call]  # torch has no types there
        return total

    solver.step(loss)  # type: ignore[no-untyped-call]  # likewise
    kept, shift = weights.detach(), offset.detach()

    def scores(states: torch.Tensor) -> torch.Tensor:
        inputs = (states[:, layers] - centre) / scale
        return (torch.einsum("nld,ld->nl", inputs, kept) + shift).mean(1)

    return scores


def show(rows: list[Row], path: Path, where: dict[str, Any]) -> None:
    """The JSON file, the table of averaged scores, and a chart of the layers."""
    plain = [
        {
            "score": row.score,
            "form": row.form,
            "auroc": round(row.auroc, 4),
            **{
                name: {"n": e.n, **{k: round(getattr(e, k), 4) for k in ("value", "low", "high")}}
                for name, e in (("opened", row.opened), ("harmless", row.harmless))
            },
        }
        for row in rows
    ]
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps({"machine": where, "rows": plain}, indent=1) + "\n", "utf-8")
    table = Table(title=path.stem, box=SIMPLE)
    for name in ("score", "development prompts", "AUROC", "harmful opened", "harmless opened"):
        table.add_column(name)
    for row in rows:
        if ", layer " not in row.score:
            cells = [
                f"{100 * e.value:.1f} ({100 * e.low:.1f}–{100 * e.high:.1f})"
                for e in (row.opened, row.harmless)
            ]
            table.add_row(row.score, row.form, f"{row.auroc:.3f}", *cells)
    Console(width=150).print(table)
    figure = Figure(figsize=(9, 4), layout="constrained")
    for axes, form in zip(figure.subplots(1, 2, sharey=True), _FORMS, strict=True):
        for name, colour in (("harm score (SSD)", BLUE), ("discriminant", GREEN)):
            mine = [r for r in rows if r.form == form and r.score.startswith(f"{name}, layer ")]
            axes.plot([row.auroc for row in mine], color=colour, label=name)
        axes.set(xlabel="layer", title=f"development prompts, {form}")
        axes.grid(alpha=0.25)
    figure.axes[0].set(ylabel="AUROC")
    figure.axes[0].legend()
    figure.savefig(path.with_suffix(".png"), dpi=130)


def main(argv: list[str] | None = None) -> None:
    """Measure all scores of one model."""
    made = ArgumentParser(description=__doc__)
    made.add_argument("model", choices=(*NAMES, "coder"))
    made.add_argument("--limit", type=int, help="requests of each group at most, to try it")
    made.add_argument("--out", type=Path, default=FOLDER, help="folder for JSON and chart")
    given = made.parse_args(argv)
    model, processor = load(given.model)
    rows = list(measured(Backbone.of(model), processor, given.limit))
    show(rows, given.out / f"criteria-{given.model}.json", machine(model))


if __name__ == "__main__":
    told(main)
