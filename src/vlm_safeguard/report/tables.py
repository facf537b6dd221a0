"""Results and guards as tables for the terminal."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from rich.table import Table

if TYPE_CHECKING:
    from vlm_safeguard.evaluation.results.rows import Row
    from vlm_safeguard.guard import Guard
    from vlm_safeguard.policy.receipt import Receipt


def results_table(rows: Sequence[Row], title: str) -> Table:
    """Shares of defences and of prompts by image condition; whichever are more go down."""
    defences = list(dict.fromkeys(row.defence for row in rows))
    asked = {(row.prompts, row.condition): row.n for row in rows}
    cells = {(row.defence, row.prompts, row.condition): _percent(row) for row in rows}
    table = Table(title=title, caption="per cent; small print: 95 % Wilson interval")
    if len(asked) > len(defences):
        table.add_column("prompts", style="bold")
        for defence in defences:
            table.add_column(defence, justify="right")
        for (prompts, condition), n in asked.items():
            shares = (cells.get((defence, prompts, condition), "") for defence in defences)
            table.add_row(f"{prompts}, {condition}\n[dim]n={n}[/dim]", *shares)
    else:
        table.add_column("defence", style="bold")
        for (prompts, condition), n in asked.items():
            table.add_column(f"{prompts}\n{condition}\nn={n}", justify="right")
        for defence in defences:
            table.add_row(defence, *(cells.get((defence, *column), "") for column in asked))
    return table


def _percent(row: Row) -> str:
    return f"{100 * row.value:.0f}\n[dim]{100 * row.low:.0f}–{100 * row.high:.0f}[/dim]"


def guard_table(guard: Guard) -> Table:
    """One line a decoder layer: spectrum, held-out AUROC, and what the guard does there."""
    table = Table(title="Layers")
    for name in (
        "layer",
        "held-out AUROC",
        "singular values",
        "first one's share",
        "edited",
        "in gate",
    ):
        table.add_column(name, justify="right")
    gate_layers = {layer for criterion in guard.policy.gate for layer in criterion.watched}
    directions = guard.policy.directions
    for layer, (values, shares, auroc) in enumerate(
        zip(directions.spectrum, directions.energy_shares, directions.auroc, strict=True)
    ):
        table.add_row(
            str(layer),
            f"{float(auroc):.3f}",
            " ".join(f"{float(value):.3g}" for value in values[:4]) + " …",
            f"{float(shares[0]):.0%}",
            "yes" if layer in guard.policy.layers else "",
            "yes" if layer in gate_layers else "",
        )
    return table


def facts_table(facts: dict[str, object], title: str) -> Table:
    """Names and values, one a line."""
    table = Table(title=title, show_header=False)
    table.add_column(style="bold")
    table.add_column()
    for name, value in facts.items():
        table.add_row(name, str(value))
    return table


def receipt_table(receipt: Receipt) -> Table:
    """What the guard did to one request."""
    facts: dict[str, object] = {
        "guarded": "yes" if receipt.guarded else "no",
        "because": receipt.reason,
    }
    if receipt.guarded:
        facts["response"] = str(receipt.response)
    if receipt.not_used:
        facts["not used"] = receipt.not_used
    if receipt.edit:
        facts["edit"] = f"{receipt.edit}, layers {receipt.layers[0]}–{receipt.layers[-1]}"
    if receipt.harm_before is not None and receipt.harm_after is not None:
        facts["harm score"] = f"{receipt.harm_before:+.2f} → {receipt.harm_after:+.2f}"
    scores = receipt.scores
    if "own_refusal" in scores:
        facts["the model's own refusal"] = f"{scores['own_refusal']:+.2f} logits (text only)"
    if "image_score" in scores:
        facts["score with its media"] = f"{scores['image_score']:+.2f}"
    shown = f"{receipt.media} in {receipt.media_tokens} tokens, " if receipt.media else ""
    facts["request"] = f"{shown}{receipt.text_tokens} tokens of text"
    return facts_table(facts, "Receipt")
