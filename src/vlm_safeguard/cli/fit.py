"""`vlm-safeguard fit`: fit a guard for a model and save it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from vlm_safeguard.cli.loading import AsJson, ModelName, console, loads_a_model
from vlm_safeguard.errors import SafeguardError
from vlm_safeguard.loading import Loading, load_model
from vlm_safeguard.policy.response import Response

if TYPE_CHECKING:
    from vlm_safeguard.policy.edits import Edit


@loads_a_model
def fit(
    model: ModelName,
    out: Annotated[Path, typer.Argument(help="Folder to save the guard in.")],
    anchors: Annotated[
        Path | None,
        typer.Option(help="Your anchor pairs: CSV or JSONL with 'harmful' and 'harmless'."),
    ] = None,
    calibration: Annotated[
        Path | None,
        typer.Option(help="Your harmless requests: CSV or JSONL with 'text'."),
    ] = None,
    response: Annotated[
        Response | None,
        typer.Option(help="How a request whose gate is open is answered; refusal by default."),
    ] = None,
    edit: Annotated[
        str | None,
        typer.Option(help="Answer it by this edit of its states: refuse, restore, …"),
    ] = None,
    gate: Annotated[
        str | None,
        typer.Option(help="What opens it: discriminant (the default), calibrated, paper or open."),
    ] = None,
    rank: Annotated[int | None, typer.Option(min=1, help="Directions a layer.")] = None,
    layers: Annotated[str | None, typer.Option(help="Layers to edit, e.g. 10-23.")] = None,
    span: Annotated[
        str | None,
        typer.Option(help="Tokens that are edited: last, request, opening or answer."),
    ] = None,
    budget: Annotated[
        float | None,
        typer.Option(help="Share of harmless requests that may open the gate; 0.01 by default."),
    ] = None,
    as_json: AsJson = False,
    *,
    loading: Loading,
) -> None:
    """Fit a guard for a model from text-only anchor pairs, and save it."""
    screen = console(as_json)
    window = _layers(layers)
    from vlm_safeguard.anchors import read_anchors, read_requests
    from vlm_safeguard.cli.inspect import summary
    from vlm_safeguard.guard import Guard
    from vlm_safeguard.report.figures.guard import guard_figure
    from vlm_safeguard.report.tables import facts_table

    pairs = None if anchors is None else read_anchors(anchors)
    requests = None if calibration is None else read_requests(calibration)
    chosen = _edit(edit, span)
    options: dict[str, Any] = {"gate": gate, "rank": rank, "budget": budget}
    loaded, processor = load_model(model, loading)
    guard = Guard.fit(
        loaded,
        processor,
        anchors=pairs,
        calibration=requests,
        edit=chosen,
        response=response,
        layers=window,
        **{name: value for name, value in options.items() if value is not None},
    )
    guard.save_pretrained(out)
    guard_figure(guard, out / "guard.png")
    facts = summary(guard)
    if as_json:
        print(json.dumps(facts))
    else:
        screen.print(facts_table(facts, f"Guard saved in {out}"))


def _edit(name: str | None, span: str | None) -> Edit | None:
    """The edit that is asked for; None where neither it nor its span is."""
    from vlm_safeguard.policy.edits import edit_from_config

    if name is None and span is None:
        return None
    return edit_from_config({"name": name or "refuse"} | ({} if span is None else {"span": span}))


def _layers(text: str | None) -> tuple[int, ...] | None:
    """'10-23' or '10,12,14' as layer indices."""
    if text is None:
        return None
    try:
        if "-" in text:
            first, last = map(int, text.split("-"))
            indices = tuple(range(first, last + 1))
        else:
            indices = tuple(int(part) for part in text.split(","))
    except ValueError:
        indices = ()
    if not indices:
        raise SafeguardError(f"'{text}' does not name layers; write e.g. 10-23 or 10,12,14.")
    return indices
