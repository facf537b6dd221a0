"""Every answer, packed to be browsed in a page: columns, in which each value is stored once."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from typing import Any

from vlm_safeguard.evaluation.results.lines import Line
from vlm_safeguard.report.names import condition_name

LIMIT = 12_000_000  # characters of JSON in a page
WITHHELD = "(withheld from this copy)"
_LENGTHS = (4000, 1500, 600, 200)  # characters of a text that are shown, until all fits


def published(line: Line) -> Line:
    """A line for a copy that others see: what is folded is withheld, but for plain refusals."""
    words = [v.refused for v in line.verdicts.values() if v.refused is not None]
    return (
        line
        if not folded(line) or (words and all(words))
        else line.model_copy(update={"answer": WITHHELD})
    )


def packed(lines: Sequence[Line], limit: int = LIMIT) -> str:
    """The lines as JSON of at most `limit` characters.

    Texts are cut first, then whole requests left out, evenly; the JSON says how many answers
    there were (`total`) and where texts were cut (`cut`).
    """
    for length in _LENGTHS:
        text = _json(lines, len(lines), length)
        if len(text) <= limit:
            return text
    requests = list(dict.fromkeys((line.benchmark, line.sample) for line in lines))
    step = 2
    while True:
        kept = set(requests[::step])
        text = _json(
            [line for line in lines if (line.benchmark, line.sample) in kept],
            len(lines),
            _LENGTHS[-1],
        )
        if len(text) <= limit or len(kept) == 1:
            return text
        step *= 2


def tags(line: Line) -> list[str]:
    """Each judge's verdict on an answer, and the gate's decision."""
    shown = []
    for judge, verdict in line.verdicts.items():
        if not verdict.readable:
            shown.append(f"{judge}: unreadable")
        if verdict.unsafe is not None:
            shown.append(f"{judge}: {'unsafe' if verdict.unsafe else 'safe'}")
        if verdict.refused is not None:
            shown.append(f"{judge}: {'refused' if verdict.refused else 'not refused'}")
    if line.disputed:
        shown.append("judges disagree")
    if line.correct is not None:
        shown.append("right" if line.correct else "wrong")
    if line.receipt is not None:
        shown.append("gate open" if line.receipt.guarded else "gate closed")
    return shown


def folded(line: Line) -> bool:
    """Whether an answer may be harmful, and is shown only on a click."""
    unsafe = any(verdict.unsafe for verdict in line.verdicts.values())
    return line.kind == "harmful" or unsafe


def _json(lines: Sequence[Line], total: int, length: int) -> str:
    receipts = [_receipt(line) for line in lines]
    facts = list(dict.fromkeys(fact for receipt in receipts for fact in receipt))
    columns: dict[str, list[Any]] = {
        "benchmark": [line.benchmark for line in lines],
        "condition": [condition_name(line.condition) for line in lines],
        "defence": [line.defence for line in lines],
        "kind": [line.kind for line in lines],
        "category": [line.category for line in lines],
        "sample": [line.sample for line in lines],
        "image": [line.image for line in lines],
        "request": [line.request[:length] for line in lines],
        "answer": [line.answer[:length] for line in lines],
        "tags": ["\n".join(tags(line)) for line in lines],
        "notes": ["\n".join(_notes(line))[:length] for line in lines],
        "facts": [_facts(line) for line in lines],
        "folded": [folded(line) for line in lines],
        **{
            f"receipt {fact}": [_short(receipt.get(fact)) for receipt in receipts] for fact in facts
        },
    }
    cut = max((len(x) for line in lines for x in (line.request, line.answer)), default=0) > length
    page = {
        "rows": len(lines),
        "total": total,
        "cut": length if cut else None,
        "columns": {name: _column(values) for name, values in columns.items()},
    }
    return json.dumps(page, ensure_ascii=False, separators=(",", ":"), allow_nan=False)


def _column(values: list[Any]) -> dict[str, list[Any]]:
    """{is: values}, or, where many repeat, {of: distinct values, at: which}."""
    keys = [json.dumps(value, ensure_ascii=False) for value in values]
    places = {key: place for place, key in enumerate(dict.fromkeys(keys))}
    if 2 * len(places) > len(values):
        return {"is": values}
    return {"of": [json.loads(key) for key in places], "at": [places[key] for key in keys]}


def _notes(line: Line) -> list[str]:
    return [
        " ".join(
            filter(
                None,
                (
                    f"{judge}:",
                    "" if verdict.score is None else f"score {verdict.score:g}.",
                    verdict.note,
                ),
            )
        )
        for judge, verdict in line.verdicts.items()
        if verdict.note or verdict.score is not None
    ]


def _facts(line: Line) -> str:
    facts = []
    if line.tokens is not None:
        facts.append(f"{line.tokens} tokens")
    if line.seconds is not None:
        facts.append(f"{line.seconds:.2f} s")
    if line.perplexity is not None:
        facts.append(f"perplexity {line.perplexity:.3g}")
    return " · ".join(facts)


def _receipt(line: Line) -> dict[str, Any]:
    """A receipt's facts and what its criteria measured, by name; empty without a guard."""
    if line.receipt is None:
        return {}
    facts = line.receipt.model_dump(mode="json")
    for finding in facts.pop("findings", ()):
        facts |= finding["measures"]
    return facts


def _short(value: Any) -> Any:
    """A receipt's value, short: floats to four digits, a run of layers by its ends."""
    if isinstance(value, float):
        return float(f"{value:.4g}") if math.isfinite(value) else str(value)
    if isinstance(value, list | tuple):
        if len(value) > 1 and list(value) == list(range(value[0], value[0] + len(value))):
            return f"{value[0]}–{value[-1]}"
        return ", ".join(map(str, value))
    return value
