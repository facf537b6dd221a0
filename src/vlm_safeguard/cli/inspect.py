"""`vlm-safeguard inspect`: what a saved guard is."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from vlm_safeguard.cli.loading import AsJson, console

if TYPE_CHECKING:
    from vlm_safeguard.guard import Guard


def inspect(
    guard: Annotated[str, typer.Argument(help="A guard's folder or Hugging Face Hub id.")],
    figure: Annotated[Path | None, typer.Option(help="Also draw it into this PNG file.")] = None,
    as_json: AsJson = False,
) -> None:
    """Show a guard: its model, layers, spectrum, held-out AUROC, and thresholds."""
    from vlm_safeguard.errors import SafeguardError
    from vlm_safeguard.guard import Guard
    from vlm_safeguard.report.figures import guard_figure
    from vlm_safeguard.report.tables import facts_table, guard_table

    screen = console(as_json)
    loaded = Guard.from_pretrained(guard)
    if figure is not None:
        try:
            guard_figure(loaded, figure)
        except (OSError, ValueError) as error:
            raise SafeguardError(f"The figure cannot be written to {figure}: {error}") from error
    facts = summary(loaded)
    if as_json:
        facts["held_out_auroc"] = [round(float(x), 4) for x in loaded.directions.auroc]
        facts["singular_values"] = [
            [round(float(x), 4) for x in row[:8]] for row in loaded.directions.spectrum
        ]
        print(json.dumps(facts))
        return
    screen.print(facts_table(facts, f"Guard {guard}"), guard_table(loaded))
    if figure is not None:
        screen.print(f"figure: {figure}")


def summary(guard: Guard) -> dict[str, Any]:
    """The facts of a guard that a person asks for first."""
    made, gate = guard.provenance, guard.gate
    window = [float(guard.directions.auroc[layer]) for layer in guard.layers]
    facts: dict[str, Any] = {
        "model": made.model_name,
        "architecture": f"{made.architecture}, {made.num_layers} layers of {made.hidden_size}",
        "decoder": made.decoder_path,
        "edit": guard.edit.name,
        "layers": f"{guard.layers[0]}–{guard.layers[-1]}",
        "rank": guard.rank,
        "edited tokens": _edited_tokens(guard),
        "held-out AUROC in them": f"{min(window):.3f}–{max(window):.3f}",
        "gate": gate.name,
        "anchor pairs": made.anchor_pairs,
        "calibration requests": made.calibration_requests,
        "text-only view": "exact" if guard.text_view.exact else "approximate",
        "fitted with": ", ".join(f"{name} {number}" for name, number in made.versions.items()),
    }
    if gate.name == "calibrated":
        caught = (guard.scores["harmful"] > gate.text_threshold).float().mean()
        facts["false-positive budget"] = f"{gate.budget:.1%}"
        facts["text threshold"] = round(gate.text_threshold, 3)
        if gate.image_threshold is not None:
            facts["image threshold"] = round(gate.image_threshold, 3)
        facts["the model's own refusal"] = (
            "not asked for: it refuses too little"
            if not gate.refusal_tokens
            else f"in its usual {len(guard.opening)} first tokens, or where the text scores above 0"
        )
        facts["harmful anchors above it, held out"] = f"{float(caught):.1%}"
    return facts


def _edited_tokens(guard: Guard) -> str:
    """Which tokens of an open request are edited."""
    if guard.hold:
        answer = ", and the answer's"
    elif guard.opening and guard.edit.span == "request":
        answer = f", and an answer's first {len(guard.opening)} while it opens as a refusal"
    else:
        answer = ""
    return ("the request's" if guard.edit.span == "request" else "the last of the prompt") + answer
