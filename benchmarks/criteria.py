"""How well scores of a text tell harm: AUROC, and what opens where 1 % of harmless requests do.

All have their threshold by conformal rank on the calibration requests, each scored by what was
fitted without it, and are tried on the development prompts, as they are and in wrappers that
neither the fit nor the threshold has seen.
"""

from __future__ import annotations

import json
from argparse import ArgumentParser
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property
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
    Ordinary,
    Pair,
    further_calibration,
    further_pairs,
    shipped_wrappers,
)
from vlm_safeguard.loading.options import DTYPES
from vlm_safeguard.model.activations import hidden_states
from vlm_safeguard.model.backbone import Backbone
from vlm_safeguard.policy.directions import auroc, choose_layers, fit_directions, legible_layers
from vlm_safeguard.policy.discriminant import Shrunk, choose_discriminant, held_out_scores
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


@dataclass(frozen=True)
class Forms:
    """What scores are fitted on and have their threshold from; of each kind, `limit` at most.

    Half of the wrappers are left to try them on.
    """

    limit: int | None

    @cached_property
    def pairs(self) -> list[Pair]:
        """The anchors in all forms."""
        options, anchors = FitOptions(), shipped_anchors()
        plain = [Pair(a.harmful, a.harmless, topic) for topic, a in enumerate(anchors)]
        seen = shipped_wrappers()[::2]
        more = further_pairs(anchors, seen, options.wrappings, options.folds)
        return [*plain[: self.limit], *more[: self.limit]]

    @cached_property
    def ordinary(self) -> list[Ordinary]:
        """The calibration requests in all forms."""
        calibration = shipped_calibration()
        plain = [Ordinary(text, topic) for topic, text in enumerate(calibration)]
        more = further_calibration(calibration, shipped_wrappers()[::2], FitOptions().folds)
        return [*plain[: self.limit], *more[: self.limit]]

    @property
    def anchors(self) -> int:
        """How many of the pairs are anchors as they are."""
        return len(shipped_anchors()[: self.limit])

    @property
    def folds(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Of the pairs, and of the ordinary requests."""
        count = FitOptions().folds
        return (
            torch.tensor([pair.topic for pair in self.pairs]) % count,
            torch.tensor([each.topic for each in self.ordinary]) % count,
        )

    @property
    def requests(self) -> dict[str, list[Request]]:
        """All by what they are for, the development prompts to try scores on among them."""
        asked: dict[str, list[Request]] = {
            "harmful": [pair.harmful for pair in self.pairs],
            "harmless": [pair.harmless for pair in self.pairs],
            "calibration": [each.request for each in self.ordinary],
        }
        unseen = shipped_wrappers()[1::2]
        for kind in ("harmful", "harmless"):
            texts = [prompt.text for prompt in read_prompts(kind, "development")][: self.limit]
            asked[f"plain, {kind}"] = [*texts]
            asked[f"wrapped, {kind}"] = [
                unseen[number % len(unseen)].around(text) for number, text in enumerate(texts)
            ]
        return asked


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


def last_and_mean(states: torch.Tensor, mask: torch.Tensor, layer: int) -> torch.Tensor:
    """(rows, 2, hidden) the last token's states, and the tokens' mean."""
    means = (states * mask[..., None]).sum(1) / mask.sum(1, keepdim=True)
    return torch.stack([states[:, -1], means], dim=1)


def rows_of(
    name: str,
    scores: Callable[[torch.Tensor], torch.Tensor],
    by: States,
    ordinary: torch.Tensor | None = None,
) -> list[Row]:
    """A score on both forms.

    Args:
        ordinary: what the calibration requests score where each is left out of what is fitted;
            by default nothing was fitted on any.
    """
    calibration = scores(by["calibration"]) if ordinary is None else ordinary
    threshold = threshold_for(calibration, FitOptions().budget)
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
    options, forms = FitOptions(), Forms(limit)
    states = read(backbone, processor, forms.requests, last_and_mean, "texts")
    by, pooled = ({group: x[:, :, i] for group, x in states.items()} for i in range(2))
    plain = by["harmful"][: forms.anchors], by["harmless"][: forms.anchors]
    made = fit_directions(*plain, 1)
    window = choose_layers(len(backbone.layers), options.first_layer, options.last_layer)
    legible = list(legible_layers(made, window, options.near_best))
    name = f"harm score (SSD), layers {legible[0]}–{legible[-1]}"
    yield from rows_of(name, lambda x: made.harm_scores(x)[:, legible].mean(1), by)

    alone, (folds, others) = torch.arange(forms.anchors) % options.folds, forms.folds
    yield from _rows(_chosen(plain, (alone, alone)), "discriminant, anchors alone", by)
    paired = _chosen((by["harmful"], by["harmless"]), (folds, folds))
    yield from _rows(paired, "discriminant, pairs in all forms", by)
    name, whole = "and harmless requests", _with_ordinary(by)
    both = folds, torch.cat([folds, others])
    chosen = _chosen(whole, both)
    yield from _rows(chosen, f"discriminant, pairs {name}", by, len(others))
    unseen = held_out_scores(*whole, both, [chosen.shrinkage])[1][0, -len(others) :]
    for layer in range(len(backbone.layers)):
        yield from rows_of(f"harm score (SSD), layer {layer}", _at(made.harm_score, layer), by)
        score = _at(chosen.discriminant.score, layer)
        yield from rows_of(f"discriminant, layer {layer}", score, by, unseen[:, layer])
    left_out = torch.empty(len(others))
    for fold in range(options.folds):
        probe = _probe(whole[0][both[0] != fold], whole[1][both[1] != fold], legible)
        left_out[others == fold] = probe(by["calibration"][others == fold])
    yield from rows_of(f"logistic probe, pairs {name}", _probe(*whole, legible), by, left_out)

    yield from _rows(
        _chosen(_with_ordinary(pooled), both),
        f"discriminant of the tokens' mean, pairs {name}",
        pooled,
        len(others),
    )

    def highest(states: torch.Tensor, mask: torch.Tensor, layer: int) -> torch.Tensor:
        made = paired.discriminant
        scores = states @ made.weights[layer].to(states.device) - made.offset[layer]
        return scores.masked_fill(~mask, -torch.inf).amax(1)

    tried = {name: x for name, x in forms.requests.items() if name not in ("harmful", "harmless")}
    peaks = read(backbone, processor, tried, highest, "maxima over tokens")
    yield from rows_of(
        "discriminant, pairs in all forms, highest of the tokens",
        lambda x: x[:, list(paired.layers)].mean(1),
        peaks,
    )


def _at(
    scorer: Callable[[torch.Tensor, int], torch.Tensor], layer: int
) -> Callable[[torch.Tensor], torch.Tensor]:
    return lambda states: scorer(states[:, layer], layer)


def _with_ordinary(by: States) -> tuple[torch.Tensor, torch.Tensor]:
    """Harmful states, and harmless ones with the calibration requests' behind them."""
    return by["harmful"], torch.cat([by["harmless"], by["calibration"]])


def _chosen(
    classes: tuple[torch.Tensor, torch.Tensor], folds: tuple[torch.Tensor, torch.Tensor]
) -> Shrunk:
    """With its shrinkage and layers chosen as the fit does it."""
    options = FitOptions()
    return choose_discriminant(*classes, folds, options.shrinkages, options.near_best)


def _rows(chosen: Shrunk, name: str, by: States, ordinary: int = 0) -> list[Row]:
    """Averaged over its layers.

    Args:
        ordinary: how many of what it was fitted on, at the end, are calibration requests.
    """
    layers = list(chosen.layers)

    def scores(states: torch.Tensor) -> torch.Tensor:
        return chosen.discriminant.scores(states)[:, layers].mean(1)

    title = f"{name}, layers {layers[0]}–{layers[-1]}, δ {chosen.shrinkage:g}"
    return rows_of(title, scores, by, chosen.harmless[-ordinary:] if ordinary else None)


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
    made.add_argument("--dtype", choices=DTYPES, default="auto", help="of the model's weights")
    made.add_argument("--limit", type=int, help="requests of each group at most, to try it")
    made.add_argument("--out", type=Path, default=FOLDER, help="folder for JSON and chart")
    given = made.parse_args(argv)
    model, processor = load(given.model, given.dtype)
    rows = list(measured(Backbone.of(model), processor, given.limit))
    show(rows, given.out / f"criteria-{given.model}.json", machine(model))


if __name__ == "__main__":
    told(main)
