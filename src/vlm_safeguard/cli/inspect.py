"""`vlm-safeguard inspect`: what a saved guard is."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from vlm_safeguard.cli.loading import AsJson, console

if TYPE_CHECKING:
    from vlm_safeguard.guard import Guard
    from vlm_safeguard.policy.criterion import Criterion
    from vlm_safeguard.policy.policy import Policy


def inspect(
    guard: Annotated[
        str, typer.Argument(help="A guard's folder or Hub id (owner/name, owner/name@revision).")
    ],
    figure: Annotated[Path | None, typer.Option(help="Also draw it into this PNG file.")] = None,
    as_json: AsJson = False,
) -> None:
    """Show a guard: its model, layers, spectrum, held-out AUROC, and thresholds."""
    from vlm_safeguard.errors import SafeguardError
    from vlm_safeguard.loading import read_guard
    from vlm_safeguard.report.figures.guard import guard_figure
    from vlm_safeguard.report.tables import facts_table, guard_table

    screen = console(as_json)
    loaded = read_guard(guard)
    if figure is not None:
        try:
            guard_figure(loaded, figure)
        except (OSError, ValueError) as error:
            raise SafeguardError(f"The figure cannot be written to {figure}: {error}") from error
    facts = summary(loaded)
    if as_json:
        facts["held_out_auroc"] = [round(float(x), 4) for x in loaded.policy.directions.auroc]
        facts["singular_values"] = [
            [round(float(x), 4) for x in row[:8]] for row in loaded.policy.directions.spectrum
        ]
        print(json.dumps(facts))
        return
    screen.print(facts_table(facts, f"Guard {guard}"), guard_table(loaded))
    if figure is not None:
        screen.print(f"figure: {figure}")


def summary(guard: Guard) -> dict[str, Any]:
    """The facts of a guard that a person asks for first."""
    made, policy = guard.provenance, guard.policy
    window = [float(policy.directions.auroc[layer]) for layer in policy.layers]
    facts: dict[str, Any] = {
        "model": made.model_name,
        "architecture": f"{made.architecture}, {made.num_layers} layers of {made.hidden_size}",
        "decoder": made.decoder_path,
        "edit": policy.edit.name,
        "layers": f"{policy.layers[0]}–{policy.layers[-1]}",
        "rank": policy.rank,
        "edited tokens": _edited_tokens(policy),
        "held-out AUROC in them": f"{min(window):.3f}–{max(window):.3f}",
        "gate opens by": " or ".join(criterion.name for criterion in policy.gate),
        "gate judges": "a request whole"
        if policy.sentences is None
        else f"a request whole, and its sentences alone, {policy.sentences.most} at most",
        "anchor pairs": made.anchor_pairs,
        "calibration requests": made.calibration_requests,
        "text-only view": "exact" if policy.text_view.exact else "approximate",
        "fitted with": ", ".join(f"{name} {number}" for name, number in made.versions.items()),
    }
    facts |= {f"· {criterion.name}": _numbers(criterion) for criterion in policy.gate}
    if (score := policy.text_criterion) is not None:
        caught = (guard.scores["harmful"] > score.threshold).float().mean()
        facts[f"harmful anchors above {score.name}, held out"] = f"{float(caught):.1%}"
    return facts


def _numbers(criterion: Criterion) -> str:
    """All that a criterion decides by, in words."""
    shown = []
    for name, value in criterion:
        if isinstance(value, float):
            shown.append(f"{name} {value:.3g}")
        elif isinstance(value, tuple):
            shown.append(f"{name} {', '.join(map(str, value))}")
        elif name != "name":
            shown.append(f"{name} {value}")
    return "; ".join(shown) or "without conditions"


def _edited_tokens(policy: Policy) -> str:
    """Which tokens of an open request are edited."""
    from vlm_safeguard.policy.span import Span

    words = {
        Span.LAST: "the last of the prompt",
        Span.REQUEST: "the request's",
        Span.OPENING: "the request's"
        + (
            f", and an answer's first {len(policy.refusal_prefix)} while it opens as a refusal"
            if policy.refusal_prefix
            else ""
        ),
        Span.ANSWER: "the request's, and the answer's",
    }
    return words[policy.edit.span]
