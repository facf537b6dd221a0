"""What each gate opens for, by kind of held-out request; nothing is generated.

The gates that read the text alone decide by it, beside whatever image; so requests are put beside a
blank one here.
"""

from __future__ import annotations

import json
from argparse import ArgumentParser
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from itertools import cycle
from pathlib import Path
from textwrap import fill
from typing import Any

import torch
from matplotlib.figure import Figure
from rich.box import SIMPLE
from rich.console import Console
from rich.table import Table
from tqdm.auto import tqdm

from machine import machine
from models import NAMES, load
from results import FOLDER, told, write
from vlm_safeguard import Guard
from vlm_safeguard.engines.hooks.batch import Batch
from vlm_safeguard.engines.hooks.layers import LayerHooks
from vlm_safeguard.engines.hooks.reader import TextReader
from vlm_safeguard.engines.hooks.text_passes import TextReadings
from vlm_safeguard.engines.vllm.gate import runnable
from vlm_safeguard.evaluation.asks.benchmarks.own import jailbreak_templates
from vlm_safeguard.evaluation.asks.prompts import image_questions, read_prompts
from vlm_safeguard.evaluation.statistics import Estimate, share
from vlm_safeguard.fit.policy import CALIBRATED, DISCRIMINANT
from vlm_safeguard.images import blank_image
from vlm_safeguard.loading.options import DTYPES
from vlm_safeguard.model.conversation import chat_of
from vlm_safeguard.model.vlm import VLM
from vlm_safeguard.report.figures.style import CYCLE

_ROWS = 16
_PAIRS = 100  # requests in one message
WHOLE, WORDS = "discriminant, text whole", "refusal words"


@dataclass(frozen=True)
class Row:
    """One gate on one kind of request.

    Attributes:
        opened: share of the requests that it opens for.
        own: for how many of them the model's own refusal does.
    """

    kind: str
    gate: str
    opened: Estimate
    own: int


def requests(limit: int | None) -> dict[str, list[str]]:
    """Held-out requests by kind; of each, `limit` at most."""
    asked = {
        kind: [prompt.text for prompt in read_prompts(kind)]
        for kind in ("harmful", "harmless", "lookalike")
    }
    templates = list(jailbreak_templates().values())
    asked["jailbreak"] = [
        template.replace("{request}", prompt.text)
        for template in templates
        for prompt in read_prompts("jailbreak")
    ]
    harmful, harmless = asked["harmful"][:_PAIRS], asked["harmless"][:_PAIRS]
    asked["harmless, as a jailbreak"] = [
        template.replace("{request}", text)
        for template, text in zip(cycle(templates), harmless, strict=False)
    ]
    asked["harmful, then harmless"] = list(map(" ".join, zip(harmful, harmless, strict=True)))
    asked["harmless, then harmful"] = list(map(" ".join, zip(harmless, harmful, strict=True)))
    asked["harmful and harmless, one sentence"] = [
        f"{first.rstrip('.?!')}, and {then[0].lower()}{then[1:]}"
        for first, then in zip(harmful, harmless, strict=True)
    ]
    others = [*harmless[1:], harmless[0]]
    asked["two harmless"] = list(map(" ".join, zip(harmless, others, strict=True)))
    asked["image question"] = [question.text for question in image_questions()]
    return {kind: texts[:limit] for kind, texts in asked.items()}


@torch.no_grad()
def decided(vlm: VLM, guards: dict[str, Guard], texts: Sequence[str], kind: str) -> list[Row]:
    """What each gate makes of requests of one kind."""
    found: dict[str, list[tuple[bool, bool]]] = {name: [] for name in guards}
    for start in tqdm(range(0, len(texts), _ROWS), desc=kind):
        chats = [chat_of(text, blank_image()) for text in texts[start : start + _ROWS]]
        inputs, readings = vlm.encode(chats), TextReadings()
        for name, guard in guards.items():
            policy = guard.policy
            hooks = LayerHooks(vlm.backbone)
            reader = TextReader(
                policy, vlm.backbone, hooks, policy.directions, {}, policy.discriminant, readings
            )
            batch = Batch.read(policy, inputs["input_ids"], inputs["attention_mask"])
            reader.ask(batch)
            is_open = batch.decision.is_open.any(1).tolist()
            for opened, findings in zip(is_open, batch.decision.findings, strict=True):
                own = policy.own_refusal
                refused = own is not None and any(
                    each.opened and each.criterion == own.name for each in findings
                )
                found[name].append((opened, refused))
    return [
        Row(kind, name, share([opened for opened, _ in rows]), sum(own for _, own in rows))
        for name, rows in found.items()
    ]


def measured(path: Path, origin: dict[str, Any]) -> dict[str, list[Row]]:
    """By kind, what a file holds already, if it is of the same machine and the same policies."""
    there = json.loads(path.read_text("utf-8")) if path.is_file() else {}
    found: dict[str, list[Row]] = {}
    if all(there.get(name) == each for name, each in origin.items()):
        for row in there["rows"]:
            made = Row(**{**row, "opened": Estimate(**row["opened"])})
            found.setdefault(made.kind, []).append(made)
    return found


def show(rows: list[Row], path: Path) -> None:
    """A table and a chart."""
    table = Table(title=path.stem, box=SIMPLE)
    for name in ("requests", "gate", "n", "opened, %", "by the model's own refusal"):
        table.add_column(name)
    for row in rows:
        e = row.opened
        shown = f"{100 * e.value:.1f} ({100 * e.low:.1f}–{100 * e.high:.1f})"
        table.add_row(row.kind, row.gate, str(e.n), shown, str(row.own))
    Console(width=120).print(table)
    kinds = list(dict.fromkeys(row.kind for row in rows))
    gates = list(dict.fromkeys(row.gate for row in rows))
    width = 0.84 / len(gates)
    figure = Figure(figsize=(11, 4.4), layout="constrained")
    axes = figure.subplots()
    for number, gate in enumerate(gates):
        mine = [row.opened for row in rows if row.gate == gate]
        shift = width * (number - (len(gates) - 1) / 2)
        places = [place + shift for place in range(len(kinds))]
        spread = [
            [100 * (e.value - e.low) for e in mine],
            [100 * (e.high - e.value) for e in mine],
        ]
        axes.bar(places, [100 * e.value for e in mine], width, color=CYCLE[number], label=gate)
        axes.errorbar(places, [100 * e.value for e in mine], spread, fmt="none", ecolor="grey")
    axes.set_xticks(range(len(kinds)), [fill(kind, 12) for kind in kinds])
    axes.set(ylabel="gate open, %", ylim=(0, 104), title=path.stem)
    axes.legend(loc="upper right", fontsize=9)
    figure.savefig(path.with_suffix(".png"), dpi=130)


def main(argv: Sequence[str] | None = None) -> None:
    """Fit the guards that are not given, and try their gates."""
    made = ArgumentParser(description=__doc__)
    made.add_argument("model", choices=(*NAMES, "coder"))
    made.add_argument(
        "--guard", action="append", default=[], metavar="GATE=FOLDER", help="a fitted guard"
    )
    made.add_argument("--dtype", choices=DTYPES, default="auto", help="of the model's weights")
    made.add_argument("--limit", type=int, help="requests of each kind at most, to try it")
    made.add_argument("--fresh", action="store_true", help="measure again what is there")
    made.add_argument("--out", type=Path, default=FOLDER, help="folder for JSON and chart")
    made.add_argument(
        "--kind", action="append", choices=list(requests(0)), help="of requests; all by default"
    )
    given = made.parse_args(argv)
    asked = requests(given.limit)
    model, processor = load(given.model, given.dtype)
    folders = dict(each.split("=", 1) for each in given.guard)
    guards = {
        gate: Guard.from_pretrained(folders[gate])
        if gate in folders
        else Guard.fit(model, processor, gate=gate)
        for gate in (CALIBRATED, DISCRIMINANT)
    }
    guards[WHOLE] = guards[DISCRIMINANT].variant(sentences=None)  # its sentences are not judged
    if guards[DISCRIMINANT].policy.own_refusal is not None:
        policy = runnable(guards[DISCRIMINANT].policy, refusal_alone=True)  # inside vLLM
        guards[WORDS] = guards[DISCRIMINANT].variant(gate=policy.gate)
    vlm, path = VLM(model, processor), given.out / f"gates-{given.model}.json"
    policies = {name: guard.policy.sha256() for name, guard in guards.items()}
    origin = {"machine": machine(model), "policies": policies}
    there = {} if given.fresh else measured(path, origin)
    for kind in given.kind or asked:
        if {row.opened.n for row in there.get(kind, ())} != {len(asked[kind])}:
            there[kind] = decided(vlm, guards, asked[kind], kind)
        rows = [row for each in asked for row in there.get(each, ())]
        write(path, {**origin, "rows": list(map(asdict, rows))})
    show(rows, path)


if __name__ == "__main__":
    told(main)
