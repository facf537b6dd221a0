"""Format 1 of `results.json`, whose facts lay in one dictionary of details."""

from __future__ import annotations

from typing import Any

_SAME = ("time_ratio_range", "agreement", "frontier", "unreadable", "provenance")
_MOVED = ("mcnemar", "closed_gate_rows", "closed_gate_rows_identical")


def upgraded(values: dict[str, Any]) -> dict[str, Any]:
    """The same results in format 2; nothing is lost."""
    details = values.get("details", {})
    result = {name: value for name, value in values.items() if name != "details"}
    result |= {name: details[name] for name in _SAME if name in details}
    result["format"] = 2
    result["comparisons"] = details.get("mcnemar", [])
    if "closed_gate_rows" in details:
        result["closed_gates"] = {
            "answers": details["closed_gate_rows"],
            "identical": details["closed_gate_rows_identical"],
        }
    result["other"] = {
        name: value for name, value in details.items() if name not in (*_SAME, *_MOVED)
    }
    return result
