"""Reading guards of format 3, whose gate was one class and whose span was three fields."""

from __future__ import annotations

from typing import Any

from vlm_safeguard.errors import SafeguardError
from vlm_safeguard.policy.span import Span

_SLACK = 1.0  # what format 3 did not write down, as its code had it


def from_format_3(fields: dict[str, Any]) -> dict[str, Any]:
    """The config as format 4 writes it.

    Raises:
        SafeguardError: a field is missing, or the guard edits tokens that no span of format 4 is.
    """
    try:
        old = dict(fields)
        hold, edit, gate = old.pop("hold"), dict(old.pop("edit")), dict(old.pop("gate"))
        prefix = old.pop("opening")
        return old | {
            "format": 4,
            "policy_sha256": None,
            "provenance": {**old["provenance"], "options": None},
            "generation_prompt": None,
            "refusal_prefix": prefix,
            "response": "edit",
            "edit": {**edit, "span": str(_span(edit.get("span", "last"), hold))},
            "gate": _criteria(gate),
            "tolerances": None,
        }
    except (KeyError, TypeError, ValueError) as error:
        raise SafeguardError(
            f"The guard's config says it is of format 3 but cannot be read as that ({error!r}). "
            "Fit it again."
        ) from error


def _span(span: str, hold: bool) -> Span:
    if span == "last" and hold:
        raise SafeguardError(
            "This guard of format 3 edits the prompt's last token and the whole answer but not "
            "the request, which this version cannot do. Fit it again."
        )
    if hold:
        return Span.ANSWER
    return {"last": Span.LAST, "request": Span.OPENING}[span]


def _criteria(gate: dict[str, Any]) -> list[dict[str, Any]]:
    """The calibrated gate's three rules as criteria; the other two as they were."""
    if gate["name"] != "calibrated":
        return [gate]
    share = gate["budget"] if gate["image_layer"] is None else gate["budget"] / 2
    calibrated = {"budget": share, "calibrated_on": gate["calibrated_on"]}
    criteria: list[dict[str, Any]] = []
    if gate["refusal_tokens"]:
        criteria.append(
            {
                "name": "own_refusal",
                "tokens": gate["refusal_tokens"],
                "slack": _SLACK,
                "layers": gate["layers"],
            }
        )
    criteria.append(
        {
            "name": "text_score",
            "layers": gate["layers"],
            "threshold": gate["text_threshold"],
            **calibrated,
        }
    )
    if gate["image_layer"] is not None:
        criteria.append(
            {
                "name": "image_score",
                "layer": gate["image_layer"],
                "threshold": gate["image_threshold"],
                **calibrated,
            }
        )
    return criteria
