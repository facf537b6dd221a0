"""The server under load, guarded and unguarded in turns: throughput, latency, memory, losses."""

from __future__ import annotations

import asyncio
import ctypes
import gc
import json
import random
import socket
import threading
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from statistics import median, quantiles
from typing import Any, cast

import httpx
import uvicorn

from models import GATES, guard_for, load
from results import Cell, Sheet, parser, told
from vlm_safeguard import Guard
from vlm_safeguard.engines.hooks.attachment import GuardedOutput
from vlm_safeguard.engines.hooks.judgement import Judgement
from vlm_safeguard.engines.hooks.text_passes import TextReadings
from vlm_safeguard.errors import SafeguardError
from vlm_safeguard.evaluation.asks.images import data_url
from vlm_safeguard.evaluation.asks.prompts import read_prompts
from vlm_safeguard.images import noise_image
from vlm_safeguard.model.backbone import model_inputs
from vlm_safeguard.model.run_state import run_state_aside
from vlm_safeguard.model.vlm import VLM
from vlm_safeguard.policy.receipt import Receipt
from vlm_safeguard.serving.app import make_app
from vlm_safeguard.serving.settings import ServeSettings
from vlm_safeguard.timing import Ratio, middle_half

TIME, MEMORY = "time of a load, {}", "memory grown"
LOADS = {"harmless": 0.0, "one in ten harmful": 0.1}  # shares of the requests
AT_ONCE = 16  # clients, each with one request after the other
REQUESTS = 200  # of each server, in all rounds together
LENGTHS = (4, 8, 16, 32)  # tokens of answers
LEAVE, TEXTS = 0.1, 0.2  # shares of the requests: whose client leaves, that have no image
SHORT = 2000  # requests while memory is watched, of `_FEW` tokens each
TARGET = 0.85  # of the unguarded server's throughput
_FEW, _WARM, _PARTS = 1, 200, 4
MB = 2**20


@dataclass(frozen=True)
class Ask:
    """One request: its body, and whether the client leaves once the answer is begun."""

    body: dict[str, Any]
    image: bool
    leaves: bool


@dataclass
class Tally:
    """What came of a load.

    Attributes:
        seconds: of the whole load.
        latencies: seconds to the end of each answer that was waited for.
        firsts: seconds to the first event of each of these.
        outcomes: how many requests were answered, left, lost, or answered without being judged.
    """

    seconds: float = 0.0
    latencies: list[float] = field(default_factory=list)
    firsts: list[float] = field(default_factory=list)
    outcomes: Counter[str] = field(default_factory=Counter)


def main(argv: Sequence[str] | None = None) -> None:
    """Measure every cell that is not there yet, and show all."""
    asked = parser(__doc__, rounds=4).parse_args(argv)
    model, processor = load(asked.model)
    sheet = Sheet("serving", asked, model)
    guard = guard_for(asked.model, model, processor)
    if sheet.lacks(map(TIME.format, LOADS)):
        receipts, share = judged(model, processor, guard)
        closed = next(receipt for receipt in receipts if not receipt.guarded)
        nothing = cast(Guard, Bare(guard, closed))  # as far as the server sees
        with (
            listening(endless(VLM(model, processor)), guard) as guarded,
            listening(endless(VLM(*load(asked.model))), nothing) as bare,
        ):
            addresses = {"guarded": guarded, "unguarded": bare}
            for name, harmful in LOADS.items():
                if sheet.lacks([TIME.format(name)]):
                    tallies = in_rounds(addresses, asked.rounds, harmful)
                    sheet.add(*cells_of(name, tallies, share))
    if sheet.lacks([MEMORY]):
        with listening(endless(VLM(model, processor)), guard) as address:
            sheet.add(memory(address))
    sheet.show()


def in_rounds(addresses: dict[str, str], rounds: int, harmful: float) -> dict[str, list[Tally]]:
    """The same requests to each server, one after the other; every second round goes backwards."""
    tallies: dict[str, list[Tally]] = {name: [] for name in addresses}
    for number in range(-1, rounds):
        count = AT_ONCE if number < 0 else REQUESTS // rounds
        asks = mixed(count, harmful, seed=number)
        for name in list(addresses)[:: -1 if number % 2 else 1]:
            tally = asyncio.run(ask_all(addresses[name], asks))
            if number >= 0:  # the first one warms up
                tallies[name].append(tally)
    return tallies


def cells_of(load: str, tallies: dict[str, list[Tally]], share: float) -> Iterator[Cell]:
    """Of a load in rounds.

    Args:
        load: its name.
        share: of the prompts' tokens that are text.
    """
    ratio = Ratio.of(
        *([tally.seconds for tally in tallies[name]] for name in ("guarded", "unguarded"))
    )
    low, high = ratio.middle
    yield Cell.ratio(
        TIME.format(load),
        ratio,
        1 / TARGET,
        f"throughput {1 / ratio.median:.2f} ({1 / high:.2f}–{1 / low:.2f}) of the unguarded "
        f"server's; text is {share:.0%} of the tokens of prompts with an image, {TEXTS:.0%} of "
        "the requests have none",
    )
    for name, some in tallies.items():
        outcomes = sum((tally.outcomes for tally in some), Counter[str]())
        waited = [each for tally in some for each in tally.latencies]
        firsts = [each for tally in some for each in tally.firsts]
        rates = [len(tally.latencies) / tally.seconds for tally in some]
        counts, count = ", ".join(_said(outcomes)), f"n = {len(waited)}"
        yield Cell(
            f"{load}, {name}: answers a second",
            median(rates),
            "/s",
            middle_half(rates),
            len(rates),
            note=counts,
        )
        yield Cell(f"{load}, {name}: whole answer, p50", median(waited), "s", note=count)
        yield Cell(f"{load}, {name}: whole answer, p99", _p99(waited), "s")
        yield Cell(f"{load}, {name}: first event, p50", median(firsts), "s")
        yield Cell(f"{load}, {name}: first event, p99", _p99(firsts), "s")
        yield Cell(f"{load}, {name}: lost", outcomes["lost"], "requests", target=0)
        if name == "guarded":
            yield Cell(f"{load}, guarded: not judged", outcomes["not judged"], "requests", target=0)


def memory(address: str) -> Cell:
    """By how much the server's process grows over many requests, once it is warm."""
    asks = [
        replace(ask, body={**ask.body, "max_tokens": _FEW}, leaves=False)
        for ask in mixed(SHORT, 0.1, seed=0)
    ]
    asyncio.run(ask_all(address, asks[: min(_WARM, SHORT)]))
    sizes, outcomes, part = [resident()], Counter[str](), SHORT // _PARTS
    for start in range(0, SHORT, part):
        outcomes += asyncio.run(ask_all(address, asks[start : start + part])).outcomes
        sizes.append(resident())
    each = ", ".join(f"{size:.0f}" for size in sizes)
    return Cell(
        MEMORY,
        sizes[-1] - sizes[0],
        "MB",
        note=f"{each} MB before and after each {part} of {SHORT} requests; "
        f"{', '.join(_said(outcomes))}",
    )


# --- requests ---


def mixed(count: int, harmful: float, seed: int) -> list[Ask]:
    """Requests of all lengths, most with an image, some harmful, some whose client leaves."""
    draw = random.Random(seed)
    texts = {kind: [prompt.text for prompt in read_prompts(kind)] for kind in GATES.values()}
    asks = []
    for _ in range(count):
        text = draw.choice(texts["harmful" if draw.random() < harmful else "harmless"])
        image, leaves = draw.random() >= TEXTS, draw.random() < LEAVE
        parts: list[dict[str, Any]] = [{"type": "text", "text": text}]
        if image:
            url = data_url(noise_image(draw.randrange(1000)).resize((64, 64)))
            parts = [{"type": "image_url", "image_url": {"url": url}}, *parts]
        body = {
            "model": "model",
            "messages": [{"role": "user", "content": parts}],
            "max_tokens": max(LENGTHS) if leaves else draw.choice(LENGTHS),
            "temperature": 0,
            "stream": True,
        }
        asks.append(Ask(body, image, leaves))
    return asks


async def ask_all(address: str, asks: Sequence[Ask]) -> Tally:
    """Send all requests, so many at once."""
    tally, left = Tally(), iter(asks)
    started = time.perf_counter()

    async def client(http: httpx.AsyncClient) -> None:
        for ask in left:
            tally.outcomes[await one(http, ask, tally)] += 1

    async with httpx.AsyncClient(base_url=address, trust_env=False, timeout=300) as http:
        await asyncio.gather(*(client(http) for _ in range(AT_ONCE)))
    tally.seconds = time.perf_counter() - started
    return tally


async def one(http: httpx.AsyncClient, ask: Ask, tally: Tally) -> str:
    """What came of a request."""
    started, first = time.perf_counter(), 0.0
    chunks: list[Any] = []
    try:
        async with http.stream("POST", "/v1/chat/completions", json=ask.body) as answer:
            async for line in answer.aiter_lines():
                if line == "data: [DONE]":
                    break
                if line.startswith("data: "):
                    chunks.append(json.loads(line[6:]))
                    first = first or time.perf_counter() - started
                if ask.leaves and len(chunks) > 3:
                    return "left"
            else:
                return "lost"
    except httpx.HTTPError:
        return "lost"
    tally.latencies.append(time.perf_counter() - started)
    tally.firsts.append(first)
    receipt = chunks[-1].get("guard", {})
    if receipt.get("policy") is None or (ask.image and "text" in receipt["not_judged"]):
        return "not judged"
    return "answered"


# --- servers ---


@contextmanager
def listening(vlm: VLM, guard: Guard) -> Iterator[str]:
    """A server in this process: its address, once it is ready."""
    settings = ServeSettings.model_validate(
        {"model": "model", "name": "model", "max_new_tokens": max(LENGTHS)}
    )
    app, engine = make_app(settings, lambda: (vlm, guard))
    server = uvicorn.Server(uvicorn.Config(app, log_config=None, access_log=False))
    with socket.create_server(("127.0.0.1", 0)) as port:
        thread = threading.Thread(target=server.run, kwargs={"sockets": [port]}, daemon=True)
        thread.start()
        while not engine.ready:
            if engine.failure is not None:
                raise SafeguardError(engine.failure)
            time.sleep(0.05)
        try:
            yield f"http://127.0.0.1:{port.getsockname()[1]}"
        finally:
            server.should_exit = True
            thread.join()


def endless(vlm: VLM) -> VLM:
    """The model without a token that ends answers: each is as long as was asked for."""
    vlm.model.generation_config.eos_token_id = None
    return vlm


class Bare:
    """The server without its guard; only this program can have one.

    Attributes:
        policy: whose receipts it hands out, as the server wants some.
    """

    def __init__(self, guard: Guard, receipt: Receipt) -> None:
        """With a receipt to hand out, of a request whose gate is closed."""
        self.policy, self._receipt = guard.policy, receipt
        self.receipts: list[Any] = []

    @contextmanager
    def attach(self, model: Any, *, readings: TextReadings, wait: bool) -> Iterator[Bare]:
        """In the place of `Guard.attach`."""
        self._model = model
        yield self

    def judge(self, **options: Any) -> list[Judgement]:
        """Nothing is read, and every gate is closed."""
        return [Judgement(self._receipt, (), ())] * len(options["input_ids"])

    def generate(self, **options: Any) -> GuardedOutput:
        """The model's own, and receipts that say nothing."""
        self.receipts = [self._receipt] * len(options["input_ids"])
        return GuardedOutput(self._model.generate(**options), self.receipts)

    @contextmanager
    def paused(self) -> Iterator[None]:
        """In the place of `Attachment.paused`."""
        with run_state_aside(self._model):
            yield


# --- figures ---


def judged(model: Any, processor: Any, guard: Guard) -> tuple[list[Receipt], float]:
    """Receipts of harmless requests with an image, and the share of their tokens that is text."""
    texts = [prompt.text for prompt in read_prompts(GATES["closed"])][:32]
    inputs = model_inputs(model, processor, texts, [noise_image(0)] * len(texts))
    with guard.attach(model) as attachment:
        receipts = attachment.generate(**inputs, max_new_tokens=1, do_sample=False).receipts
    return receipts, sum(r.text_tokens for r in receipts) / int(inputs["attention_mask"].sum())


def resident() -> float:
    """Memory of this process in MB, without what its allocator holds free."""
    gc.collect()
    if trim := getattr(ctypes.CDLL(None), "malloc_trim", None):
        trim(0)
    lines = Path("/proc/self/status").read_text("utf-8").splitlines()
    (size,) = (line.split()[1] for line in lines if line.startswith("VmRSS:"))
    return int(size) * 1024 / MB


def _p99(values: Sequence[float]) -> float:
    return quantiles(values, n=100, method="inclusive")[98]


def _said(outcomes: Counter[str]) -> list[str]:
    return [f"{count} {outcome}" for outcome, count in sorted(outcomes.items())]


if __name__ == "__main__":
    told(main)
