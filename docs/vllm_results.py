"""The tables of the page on vLLM, from the files that `make bench-vllm` writes."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from grid import head

_SIZES = {"pocket": "Pocket VLM", "large": "stand-in"}
_CONDITIONS = {"text": "nothing", "blank": "blank", "noise": "noise", "image": "rendered scene"}
_STORMS = ("auto-refusal", "first-refusal", "first-edit")


def agreement(folder: Path, model: str) -> Iterator[str]:
    """Decisions and answers inside vLLM beside those under transformers."""
    result = _read(folder, f"vllm-agreement-{model}")
    lines = result["counts"]
    yield (
        f"`python benchmarks/vllm_agreement.py {model}`, {lines[0]['n']} held-out requests a line, "
        f"greedy, {_where(result)} A pair is vLLM and transformers.\n"
    )
    yield from head(
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
        f"whether they refuse; {near} lie within 0.01 of a threshold. Measures differ by "
        f"{result['margin_error']:.4f} logits at most. "
        f"[The file](../benchmarks/results/vllm-agreement-{model}.json) lists both.\n"
    )
    for row in differ:
        yield (
            f"- {row['kind']}, {_CONDITIONS[row['condition']]}: “{row['text']}”; margins "
            f"{row['margins'][0]} and {row['margins'][1]}"
        )


def storm(folder: Path) -> Iterator[str]:
    """What came of storms, one for each order and response that was tried."""
    results = [
        _read(folder, f"vllm-storm-{name}")
        for name in _STORMS
        if (folder / f"vllm-storm-{name}.json").is_file()
    ]
    yield "`python benchmarks/vllm_storm.py`, where open requests are edited with `--edit`.\n"
    rows = {
        "clients that left": "left",
        "requests that the engine stopped and read again": "preempted",
        "answers": "answered",
        "errors": "failed",
        "without their own receipt": "unguarded",
        "decided otherwise than alone": "decided_otherwise",
        "refused where they do not alone, or the other way": "contaminated",
        "in other words than alone": "worded_otherwise",
    }
    yield from head("", *(f"`{x['order']}`, response `{x['response']}`" for x in results))
    for title, name in rows.items():
        counts = [len(x) if isinstance(x := result[name], list) else x for result in results]
        yield f"| {title} | {' | '.join(map(str, counts))} |"
    yield ""
    for result in results:
        yield (
            f"- `{result['order']}`, response `{result['response']}`: {result['requests']} "
            f"requests at random moments, {result['rate']:g} a second on average; {_where(result)}"
        )


def costs(folder: Path) -> Iterator[str]:
    """Guarded over unguarded, for each model that was tried."""
    results = {
        size: _read(folder, f"vllm-cost-{size}")
        for size in _SIZES
        if (folder / f"vllm-cost-{size}.json").is_file()
    }
    yield (
        "`python benchmarks/vllm_cost.py`, for the stand-in with `--large`. Median and middle "
        "half: of rounds for throughput, of requests for the first token.\n"
    )
    yield from head(
        *("model", "guarded", "throughput, 8 at once", "first token, 1 at a time"),
        *("… without an image", "… closed gate", "… open gate"),
    )
    kinds = ("all", "text", "benign", "harmful")
    for size, result in results.items():
        for cost in result["costs"]:
            ratios = [cost["throughput"], *(cost["first_token"][kind] for kind in kinds)]
            cells = " | ".join(_ratio(ratio) for ratio in ratios)
            yield f"| {_SIZES[size]} | {cost['setting']} | {cells} |"
    yield ""
    for size, result in results.items():
        tokens = result["tokens"]
        yield (
            f"- {_SIZES[size]}: an image is {tokens['image']} tokens, and text is "
            f"{100 * (1 - tokens['image'] / tokens['prompt']):.0f} % of the prompt of a request "
            f"with one; an answer has {tokens['answer']:.0f} tokens on average; "
            f"{result['rounds']} rounds of {result['requests_a_round']} requests; unguarded "
            f"{result['unguarded_requests_a_second']:.2f} requests a second, and the first token "
            f"after {result['unguarded_first_token_ms']['all']:.0f} ms; {_where(result)}"
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


def _ratio(ratio: Any) -> str:
    low, high = ratio["middle"]
    return f"{ratio['median']:.2f} ({low:.2f}–{high:.2f})"
