"""Rows of results with a given share of successes."""

from __future__ import annotations

from typing import Any

from vlm_safeguard.evaluation.results.rows import Row


def row(benchmark: str, condition: str, defence: str, value: float, **names: Any) -> Row:
    """A row of n = 200 by default: attack success, judged by Llama Guard."""
    given: dict[str, Any] = {
        "prompts": "harmful",
        "metric": "attack_success",
        "judge": "llama-guard",
        "n": 200,
    }
    given |= names
    n = given.pop("n")
    outcomes = [place < round(value * n) for place in range(n)]
    return Row.count(outcomes, benchmark=benchmark, condition=condition, defence=defence, **given)


def harmless(condition: str, defence: str, value: float) -> Row:
    """Harmless requests refused."""
    return row(
        "benign", condition, defence, value, prompts="harmless", metric="refusal", judge="refusal"
    )


def utility(defence: str, value: float) -> Row:
    """Questions about an image answered right."""
    return row("scenes", "image", defence, value, prompts="utility", metric="accuracy", judge=None)


#: All but the guarded blank image, which is each test's own.
BASE = [
    row("evil", "text", "none", 0.10),
    row("evil", "blank", "none", 0.50),
    row("evil", "noise", "none", 0.05),
    row("evil", "text", "default", 0.10),
    row("evil", "noise", "default", 0.05),
]
