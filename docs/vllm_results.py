"""The table of the page on vLLM, from the file that `make bench-vllm` writes."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

_CONDITIONS = {"text": "nothing", "blank": "blank", "noise": "noise", "image": "rendered scene"}


def agreement(folder: Path) -> Iterator[str]:
    """Decisions and answers inside vLLM beside those under transformers."""
    result = _read(folder, "vllm-agreement")
    lines = result["counts"]
    yield (
        f"`python benchmarks/vllm_agreement.py`, {lines[0]['n']} held-out requests a line, greedy, "
        f"{_where(result)} A pair is vLLM and transformers.\n"
    )
    yield from _head(
        "requests", "beside", "gates open", "decided alike", "refused", "answered alike"
    )
    order = list(_CONDITIONS)
    for line in sorted(lines, key=lambda each: (each["kind"], order.index(each["condition"]))):
        opened, refused = (" / ".join(map(str, line[name])) for name in ("opened", "refused"))
        yield (
            f"| {line['kind']} | {_CONDITIONS[line['condition']]} | {opened} | "
            f"{line['decided_alike']} | {refused} | {line['answered_alike']}, of them "
            f"{line['answered_word_for_word']} word for word |"
        )
    differ = result["differences"]
    near = len(result["near"]) + sum(row["near"] for row in differ)
    yield (
        f"\nOf {sum(line['n'] for line in lines)}, {len(differ)} differ in the decision or in "
        f"whether they refuse; {near} lie within 0.01 logits of a threshold. Margins differ by "
        f"{result['margin_error']:.4f} logits at most. "
        "[The file](../benchmarks/results/vllm-agreement.json) lists both.\n"
    )
    for row in differ:
        yield (
            f"- {row['kind']}, {_CONDITIONS[row['condition']]}: “{row['text']}”; margins "
            f"{row['margins'][0]} and {row['margins'][1]}"
        )


def _read(folder: Path, name: str) -> Any:
    return json.loads((folder / f"{name}.json").read_text("utf-8"))


def _where(result: Any) -> str:
    machine = result["machine"]
    versions = ", ".join(f"{name} {version}" for name, version in machine["versions"].items())
    return (
        f"{machine['dtype']}, eager, on {machine['gpu'] or machine['cpu']} "
        f"({machine['cores']} CPU cores); {versions}."
    )


def _head(*titles: str) -> Iterator[str]:
    yield f"| {' | '.join(titles)} |"
    yield f"|{'---|' * len(titles)}"
