"""The wrapped engine client: what the engine is given, and what leaves it."""

from __future__ import annotations

import asyncio
import sys
from collections.abc import Callable
from dataclasses import replace
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch

from support.vllm import Engine, SamplingParams
from vlm_safeguard.engines.vllm.client import GuardedClient
from vlm_safeguard.engines.vllm.ledger import Ledger, ledger
from vlm_safeguard.engines.vllm.marks import Mark
from vlm_safeguard.engines.vllm.order import Order
from vlm_safeguard.engines.vllm.question import NotEditedError, NotReadError
from vlm_safeguard.engines.vllm.verdict import Judge
from vlm_safeguard.errors import SafeguardError
from vlm_safeguard.guard import Guard
from vlm_safeguard.policy.edits import Refuse
from vlm_safeguard.policy.gate import ImageScore, TextScore
from vlm_safeguard.policy.own_refusal import RefusalWords
from vlm_safeguard.policy.response import Response
from vlm_safeguard.policy.sentences import Sentences

REFUSES, WIDTH = 30, 8  # a text with this token is refused
ORDERS = pytest.mark.parametrize("order", list(Order))


@pytest.fixture(autouse=True)
def vllm(monkeypatch: pytest.MonkeyPatch) -> None:
    module = ModuleType("vllm")
    module.SamplingParams = SamplingParams  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "vllm", module)


@pytest.fixture(scope="module")
def judge(guard: Guard) -> Judge:
    gate = (RefusalWords(tokens=(7,), slack=0.5),)
    known = replace(guard.policy, gate=gate, refusal_prefix=(7, 11), response=Response.TEXT)
    return Judge(known)


def logits(ids: list[int]) -> torch.Tensor:
    """Of a model that says the refusal prefix, or what is not in it."""
    made = torch.zeros(len(ids), 600)
    for place, token in enumerate([*ids[1:], 7]):
        made[place, token if REFUSES in ids else 1] = 5.0
    return made


@pytest.fixture
def render(judge: Judge) -> Callable[..., dict[str, Any]]:
    """A rendered request with an image, harmful or not."""
    (image,) = judge.policy.text_view.placeholder_ids
    assert judge.policy.generation_prompt is not None
    end = list(judge.policy.generation_prompt.direct)

    def make(*, harmful: bool, text: tuple[int, ...] = (20, 21), **more: Any) -> dict[str, Any]:
        return {
            "type": "multimodal",
            "prompt_token_ids": [*[image] * 4, *text, REFUSES if harmful else 31, *end],
            "mm_placeholders": {"image": [SimpleNamespace(offset=0, length=4)]},
            **more,
        }

    return make


async def collect(client: GuardedClient, prompt: Any, **options: Any) -> list[Any]:
    given = client.generate(prompt, SamplingParams(), "r", **options)
    return [output async for output in given]


def ask(client: GuardedClient, prompt: Any, **options: Any) -> tuple[list[Any], Ledger]:
    """Outputs, and what was noted."""
    noted = Ledger()

    async def within() -> list[Any]:
        ledger.set(noted)
        return await collect(client, prompt, **options)

    return asyncio.run(within()), noted


@ORDERS
def test_a_closed_gate_is_answered_by_the_request_as_it_came(
    judge: Judge, render: Callable[..., Any], order: Order
) -> None:
    engine, prompt = Engine(logits), render(harmful=False)
    outputs, noted = ask(GuardedClient(engine, judge, order), prompt)
    assert [(each.kind, each.number) for each in outputs] == [("multimodal", n) for n in range(3)]
    assert any(each is prompt for each in engine.prompts)
    assert engine.aborted == []
    (receipt,) = noted.receipts
    assert not receipt.guarded
    assert receipt.images == 1


@ORDERS
def test_an_open_one_is_answered_from_its_text(
    judge: Judge, render: Callable[..., Any], order: Order
) -> None:
    engine = Engine(logits)
    prompt = render(harmful=True, cache_salt="theirs")
    outputs, noted = ask(GuardedClient(engine, judge, order), prompt)
    assert [(each.kind, each.number) for each in outputs] == [("token", n) for n in range(3)]
    assert engine.prompts[-1]["prompt_token_ids"] == prompt["prompt_token_ids"][4:]
    assert all(each.get("cache_salt") == "theirs" for each in engine.prompts)
    assert [receipt.guarded for receipt in noted.receipts] == [True]
    together = order is Order.TOGETHER
    assert [kind for _, kind in engine.given].count("multimodal") == together
    assert engine.aborted == (["r"] if together else [])


@ORDERS
def test_a_request_without_media_goes_through(judge: Judge, order: Order) -> None:
    engine = Engine(logits)
    prompt = {"type": "token", "prompt_token_ids": [20, REFUSES]}
    outputs, noted = ask(GuardedClient(engine, judge, order), prompt)
    assert len(outputs) == 3
    assert engine.given == [("r", "token")]
    assert not noted.receipts[0].findings


@ORDERS
@pytest.mark.parametrize("ends", ["abort", "error", None])
def test_a_text_that_was_not_read_is_no_verdict(
    judge: Judge, render: Callable[..., Any], order: Order, ends: str
) -> None:
    engine = Engine(logits, ends=ends)
    noted = Ledger()
    with pytest.raises(NotReadError, match="neither open nor closed"):
        asyncio.run(collect(GuardedClient(engine, judge, order), render(harmful=False)))
    assert noted.receipts == []


@ORDERS
def test_log_probabilities_that_are_missing_are_no_verdict(
    judge: Judge, render: Callable[..., Any], order: Order
) -> None:
    for engine, harmful in ((Engine(lambda ids: None), False), (Engine(logits, lost=1), True)):
        client = GuardedClient(engine, judge, order)
        with pytest.raises(NotReadError, match="log-probabilities"):
            asyncio.run(collect(client, render(harmful=harmful)))


@ORDERS
@pytest.mark.parametrize("harmful", [True, False])
def test_words_are_read_only_behind_a_text_whose_first_token_refuses(
    judge: Judge, render: Callable[..., Any], order: Order, harmful: bool
) -> None:
    engine, prompt = Engine(logits), render(harmful=harmful, cache_salt="theirs")
    ask(GuardedClient(engine, judge, order), prompt)
    text, words = prompt["prompt_token_ids"][4:], list(judge.policy.refusal_prefix)
    asked = {
        name: (given["prompt_token_ids"], params.logprobs, params.prompt_logprobs)
        for (name, _), given, params in zip(
            engine.given, engine.prompts, engine.params, strict=True
        )
        if name != "r"
    }
    further = {"r-guard-0-words": ([*text, *words], None, 2)} if harmful else {}
    assert asked == {"r-guard-0": (text, 2, None), **further}


@ORDERS
def test_a_client_that_leaves_ends_all_that_was_asked_of_its_request(
    judge: Judge, order: Order
) -> None:
    engine = Engine(logits)
    asyncio.run(GuardedClient(engine, judge, order).abort("r"))
    assert engine.aborted == ["r", "r-guard-0", "r-guard-0-words"]


@ORDERS
def test_an_engine_that_fails_gives_no_answer(
    judge: Judge, render: Callable[..., Any], order: Order
) -> None:
    engine = Engine(logits, failure=RuntimeError("dead"))
    with pytest.raises(RuntimeError, match="dead"):
        asyncio.run(collect(GuardedClient(engine, judge, order), render(harmful=False)))


@ORDERS
def test_a_client_that_leaves_before_the_verdict_leaves_nothing_behind(
    judge: Judge, render: Callable[..., Any], order: Order
) -> None:
    engine = Engine(logits, delay=60)

    async def leave() -> None:
        client = GuardedClient(engine, judge, order)
        task = asyncio.create_task(collect(client, render(harmful=False)))
        await asyncio.sleep(0.02)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task

    asyncio.run(leave())
    assert "r-guard-0" in engine.aborted
    assert sorted(engine.aborted) == sorted(name for name, _ in engine.given)


@ORDERS
@pytest.mark.parametrize(
    ("prompt", "options"),
    [
        ("a text", {}),
        ({"type": "embeds", "prompt_embeds": None}, {}),
        ({"type": "enc_dec"}, {}),
        ({"type": "token", "prompt_token_ids": []}, {}),
        ({"type": "token", "prompt_token_ids": [1]}, {"lora_request": object()}),
    ],
)
def test_what_cannot_be_guarded_is_refused(
    judge: Judge, order: Order, prompt: Any, options: dict[str, Any]
) -> None:
    engine = Engine(logits)
    with pytest.raises(ValueError, match=r"guard|no text"):
        asyncio.run(collect(GuardedClient(engine, judge, order), prompt, **options))
    assert engine.given == []


@ORDERS
def test_media_that_are_placed_elsewhere_are_refused_after_the_engine_has_their_images(
    judge: Judge, render: Callable[..., Any], order: Order
) -> None:
    engine, prompt = Engine(logits), render(harmful=False)
    prompt["mm_placeholders"] = {"image": [SimpleNamespace(offset=1, length=4)]}
    with pytest.raises(ValueError, match="medium"):
        asyncio.run(collect(GuardedClient(engine, judge, order), prompt))
    given = [("r", "multimodal")] if order is Order.TOGETHER else []
    assert engine.given == given


@ORDERS
def test_steps_of_beam_search_are_refused(
    render: Callable[..., dict[str, Any]], judge: Judge, order: Order
) -> None:
    """Their prompts go on in an answer."""
    engine = Engine(logits)
    step = GuardedClient(engine, judge, order).generate(
        render(harmful=False), SamplingParams(), "chatcmpl-1-2-beam-0"
    )
    with pytest.raises(ValueError, match="beam search"):
        asyncio.run(anext(step))
    assert [kind for _, kind in engine.given] == ["multimodal"] * (order is Order.TOGETHER)


def test_what_is_not_known_of_the_engine_is_not_there(judge: Judge) -> None:
    client = GuardedClient(Engine(logits), judge, Order.FIRST)
    assert client.is_running
    for name in ("encode", "add_lora", "update_weights", "collective_rpc", "add_request"):
        with pytest.raises(AttributeError, match="not guarded"):
            getattr(client, name)
    assert asyncio.run(client.get_supported_tasks()) == ("generate",)


# --- where workers read states ---


@pytest.fixture(scope="module")
def reader(guard: Guard) -> Judge:
    """Opens by states alone; refusals begin with the model's own words."""
    gate = (TextScore(layers=(1,), threshold=0.0, budget=0.1, calibrated_on=20),)
    known = replace(guard.policy, gate=gate, refusal_prefix=(7, 11), response=Response.REFUSAL)
    return Judge(known)


def reads(judge: Judge) -> Callable[[list[int], dict[str, Any]], Any]:
    """Workers that read the harmful anchors' mean of a harmful text, else the harmless ones'."""
    made = judge.policy.directions

    def states(ids: list[int], mark: dict[str, Any]) -> Any:
        mean = made.harmful_mean if REFUSES in ids else made.harmless_mean
        shown = {str(n): mean[n].numpy().tobytes() for n in judge.layers}
        return {"policy": mark["policy"], "position": mark["position"], "states": shown}

    return states


@ORDERS
def test_states_decide_where_workers_read_them(
    reader: Judge, render: Callable[..., Any], order: Order
) -> None:
    for harmful in (True, False):
        engine = Engine(lambda ids: None, states=reads(reader))
        outputs, noted = ask(GuardedClient(engine, reader, order), render(harmful=harmful))
        kind = "token" if harmful else "multimodal"
        assert [each.kind for each in outputs] == [kind] * 3
        (receipt,) = noted.receipts
        assert receipt.guarded == harmful
        assert receipt.scores["text_score"] == pytest.approx(1.0 if harmful else -1.0, abs=1e-4)
        marks = [Mark.of(each.extra_args) for each in engine.params]
        assert {mark.policy for mark in marks} == {reader.sha256}
        assert [mark.beginnings for mark in marks if mark.beginnings] == [((7, 11),)] * harmful
        question = engine.prompts[[mark.position is not None for mark in marks].index(True)]
        assert question["prompt_token_ids"] == render(harmful=harmful)["prompt_token_ids"][4:]
        assert engine.kept == {}


def parting(judge: Judge) -> Judge:
    """Judges the sentences of a request, too; token 20 ends one."""
    return Judge(replace(judge.policy, sentences=Sentences(frozenset({20}), (), 1, 3)))


@ORDERS
@pytest.mark.parametrize("harmful", [True, False])
def test_a_sentence_opens_a_gate_that_the_whole_text_leaves_closed(
    reader: Judge, render: Callable[..., Any], order: Order, harmful: bool
) -> None:
    """All are asked about, each under a name of its own; and workers are asked once."""
    parts, states = parting(reader), reads(reader)

    def hidden(ids: list[int], mark: dict[str, Any]) -> Any:
        return states([] if 22 in ids else ids, mark)

    engine = Engine(lambda ids: None, states=hidden)
    prompt = render(harmful=harmful, text=(22, 20))
    outputs, noted = ask(GuardedClient(engine, parts, order), prompt)
    assert [each.kind for each in outputs] == ["token" if harmful else "multimodal"] * 3
    (receipt,) = noted.receipts
    assert receipt.guarded == harmful
    assert receipt.reason.startswith("of one of its sentences alone") == harmful
    text = prompt["prompt_token_ids"][4:]
    end = text[3:]
    asked = {
        name: given["prompt_token_ids"]
        for (name, _), given in zip(engine.given, engine.prompts, strict=True)
        if name != "r"
    }
    assert asked == {
        "r-guard-0": text,
        "r-guard-1": [22, 20, *end],
        "r-guard-2": [text[2], *end],
    }
    assert engine.kept == {}
    if harmful:
        assert engine.prompts[-1]["prompt_token_ids"] == text


@ORDERS
def test_words_are_read_behind_the_sentence_that_is_refused(
    judge: Judge, render: Callable[..., Any], order: Order
) -> None:
    def hidden(ids: list[int]) -> torch.Tensor:
        return logits([31] * len(ids) if 22 in ids else ids)

    engine, parts = Engine(hidden), parting(judge)
    prompt = render(harmful=True, text=(22, 20))
    _, noted = ask(GuardedClient(engine, parts, order), prompt)
    assert [receipt.guarded for receipt in noted.receipts] == [True]
    names = [name for name, _ in engine.given if name != "r"]
    assert names == ["r-guard-0", "r-guard-1", "r-guard-2", "r-guard-2-words"]
    engine.aborted.clear()
    asyncio.run(GuardedClient(engine, parts, order).abort("r"))
    assert {"r", *names} <= {*engine.aborted}


@ORDERS
def test_a_sentence_that_was_not_read_is_no_verdict(
    reader: Judge, render: Callable[..., Any], order: Order
) -> None:
    states = reads(reader)
    engine = Engine(
        lambda ids: None, states=lambda ids, mark: states(ids, mark) if 22 in ids else None
    )
    noted = Ledger()
    client = GuardedClient(engine, parting(reader), order)
    with pytest.raises(NotReadError):
        asyncio.run(collect(client, render(harmful=False, text=(22, 20))))
    assert noted.receipts == []


@pytest.fixture(scope="module")
def looker(reader: Judge) -> Judge:
    """Opens by the multimodal pass, too."""
    image = ImageScore(layer=1, threshold=0.0, budget=0.1, calibrated_on=20)
    return Judge(replace(reader.policy, gate=(*reader.policy.gate, image)))


@ORDERS
@pytest.mark.parametrize("shown", [True, False])
def test_the_multimodal_pass_opens_a_gate_that_its_text_leaves_closed(
    looker: Judge, render: Callable[..., Any], order: Order, shown: bool
) -> None:
    """Its image is what is harmful, or nothing is."""
    states = reads(looker)

    def with_image(ids: list[int], mark: dict[str, Any]) -> Any:
        return states([REFUSES] if mark["position"] == -1 and shown else ids, mark)

    engine = Engine(lambda ids: None, states=with_image)
    outputs, noted = ask(GuardedClient(engine, looker, order), render(harmful=False))
    assert [each.kind for each in outputs] == ["token" if shown else "multimodal"] * 3
    (receipt,) = noted.receipts
    assert receipt.guarded == shown
    assert [finding.criterion for finding in receipt.findings] == ["text_score", "image_score"]
    assert [kind for _, kind in engine.given].count("multimodal") == 1


@ORDERS
def test_a_begun_answer_is_refused_where_the_multimodal_pass_is_read(
    looker: Judge, render: Callable[..., Any], order: Order
) -> None:
    prompt = render(harmful=False)
    prompt["prompt_token_ids"] += [40]
    client = GuardedClient(Engine(lambda ids: None, states=reads(looker)), looker, order)
    with pytest.raises(ValueError, match="begun in the prompt"):
        asyncio.run(collect(client, prompt))


@ORDERS
def test_an_answer_whose_form_is_constrained_begins_as_it_may(
    reader: Judge, render: Callable[..., Any], order: Order
) -> None:
    engine = Engine(lambda ids: None, states=reads(reader))
    client = GuardedClient(engine, reader, order)
    params = SamplingParams(structured_outputs=object())

    async def within() -> None:
        async for _ in client.generate(render(harmful=True), params, "r"):
            pass

    asyncio.run(within())
    assert all(not Mark.of(each.extra_args).beginnings for each in engine.params)


@pytest.mark.parametrize("harmful", [True, False])
@pytest.mark.parametrize("delay", [0.0, 0.05])  # of a question's output, behind which states follow
def test_an_idle_engine_is_held_until_it_has_a_request_and_its_questions(
    reader: Judge, render: Callable[..., Any], harmful: bool, delay: float
) -> None:
    engine = Engine(lambda ids: None, states=reads(reader), delay=delay)
    client = GuardedClient(engine, parting(reader), Order.AUTO)
    outputs, noted = ask(client, render(harmful=harmful, text=(22, 20)))
    assert engine.called[:5] == ["hold", "r", "r-guard-0", "r-guard-1", "r-guard-2"]
    assert engine.called[5:] == ["take_states", *(["r"] if harmful else [])]
    assert engine.kept == {}
    assert [each.kind for each in outputs] == ["token" if harmful else "multimodal"] * 3
    assert [receipt.guarded for receipt in noted.receipts] == [harmful]


def test_states_that_are_asked_for_before_they_are_there_are_asked_for_again(
    reader: Judge, render: Callable[..., Any]
) -> None:
    class Early(Engine):
        async def collective_rpc(self, method: str, args: tuple[Any]) -> list[Any]:
            return [None] * 2 if method == "hold" else await super().collective_rpc(method, args)

    engine = Early(lambda ids: None, states=reads(reader), delay=0.02)
    outputs, _ = ask(GuardedClient(engine, reader, Order.AUTO), render(harmful=False))
    assert engine.called.count("take_states") == 2
    assert len(outputs) == 3


def test_a_request_waits_for_its_verdict_where_the_engine_has_others(
    reader: Judge, render: Callable[..., Any]
) -> None:
    engine = Engine(lambda ids: None, states=reads(reader), delay=0.02)
    client = GuardedClient(engine, reader, Order.AUTO)

    async def both() -> None:
        prompt = render(harmful=False)
        every = (client.generate(prompt, SamplingParams(), name) for name in ("r", "s", "t"))
        await asyncio.gather(*(anext(each) for each in every))

    asyncio.run(both())
    assert engine.called.count("hold") == 1
    assert engine.called.index("s") > engine.called.index("s-guard-0")
    assert engine.called.index("r") < engine.called.index("r-guard-0")


@ORDERS
@pytest.mark.parametrize("changed", ["gone", "position", "policy", "states"])
def test_a_reading_that_is_not_the_plan_is_no_verdict(
    reader: Judge, render: Callable[..., Any], order: Order, changed: str
) -> None:
    other = {"position": 0, "policy": "0" * 64, "states": {}}

    def states(ids: list[int], mark: dict[str, Any]) -> Any:
        if changed == "gone":
            return None
        return reads(reader)(ids, mark) | {changed: other[changed]}

    client = GuardedClient(Engine(lambda ids: None, states=states), reader, order)
    with pytest.raises(NotReadError, match="did not read"):
        asyncio.run(collect(client, render(harmful=False)))


def test_clients_cannot_mark_their_requests(reader: Judge, render: Callable[..., Any]) -> None:
    engine = Engine(lambda ids: None, states=reads(reader))
    client = GuardedClient(engine, reader, Order.TOGETHER)
    params = SamplingParams(extra_args={"vlm_safeguard": {"policy": reader.sha256}})

    async def within() -> None:
        async for _ in client.generate(render(harmful=True), params, "r"):
            pass

    with pytest.raises(ValueError, match="not a client's to give"):
        asyncio.run(within())
    assert engine.given == []


# --- where workers edit states ---


@pytest.fixture(scope="module")
def editor(reader: Judge) -> Judge:
    """Edits what the reader opens for, beside its image."""
    return Judge(replace(reader.policy, response=Response.EDIT, edit=Refuse()))


def reads_coordinates(judge: Judge) -> Callable[[list[int], dict[str, Any]], Any]:
    """As `reads`, and of each token that is asked for, coordinates of its number."""
    states, policy = reads(judge), judge.policy

    def made(ids: list[int], mark: dict[str, Any]) -> Any:
        rows = torch.tensor(mark["tokens"]).float()[:, None].expand(-1, policy.rank)
        each = {str(n): rows.contiguous().numpy().tobytes() for n in policy.layers}
        return states(ids, mark) | {"coordinates": each}

    return made


def as_planned(mark: dict[str, Any]) -> dict[str, Any]:
    return {"positions": list(mark["edit"]["positions"]), "layers": list(mark["edit"]["layers"])}


@pytest.mark.parametrize("harmful", [True, False])
def test_an_open_request_is_edited_beside_its_image(
    editor: Judge, render: Callable[..., Any], harmful: bool
) -> None:
    states = reads_coordinates(editor)
    engine = Engine(lambda ids: None, states=states, edited=as_planned)
    prompt = render(harmful=harmful, cache_salt="theirs")
    outputs, noted = ask(GuardedClient(engine, editor, Order.FIRST), prompt)
    assert [(each.kind, each.number) for each in outputs] == [("multimodal", n) for n in range(3)]
    (receipt,) = noted.receipts
    assert receipt.guarded == harmful
    assert receipt.layers == (editor.policy.layers if harmful else ())
    assert engine.kept == {}
    given = [
        (each, Mark.of(params.extra_args))
        for each, params in zip(engine.prompts, engine.params, strict=True)
        if each["type"] == "multimodal"
    ]
    assert len(given) == 1, "a request is given to the engine once"
    ((whole, mark),) = given
    if not harmful:
        assert mark.edit is None
        assert whole["cache_salt"] == "theirs"
        return
    assert mark.edit is not None
    assert whole["cache_salt"] == mark.name, "no other request's keys"
    request = editor.read(prompt["prompt_token_ids"], [(0, 4)])
    assert list(zip(mark.edit.positions, read_back(mark, editor.policy.rank), strict=True)) == list(
        request.spanned
    )
    assert mark.edit.follows == editor.policy.refusal_prefix


def read_back(mark: Mark, rank: int) -> list[int]:
    """Of each edited token of the prompt, the number of its counterpart, as coordinates hold it."""
    plan = mark.edit
    assert plan is not None
    numbers = plan.coordinates_of(plan.layers[0], rank)[:, 0]
    return numbers[list(plan.counterparts)].int().tolist()


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda each: None, "edited nothing"),
        (lambda each: each | {"positions": each["positions"][1:]}, "edited tokens"),
        (lambda each: each | {"layers": each["layers"][1:]}, "of layers"),
    ],
)
def test_an_edit_that_is_not_the_plan_gives_no_answer(
    editor: Judge, render: Callable[..., Any], change: Callable[[Any], Any], words: str
) -> None:
    engine = Engine(
        lambda ids: None,
        states=reads_coordinates(editor),
        edited=lambda mark: change(as_planned(mark)),
    )
    client, outputs = GuardedClient(engine, editor, Order.FIRST), []

    async def within() -> None:
        async for output in client.generate(render(harmful=True), SamplingParams(), "r"):
            outputs.append(output)

    with pytest.raises(NotEditedError, match=words):
        asyncio.run(within())
    assert outputs == []


def test_coordinates_that_are_missing_are_no_verdict(
    editor: Judge, render: Callable[..., Any]
) -> None:
    states = reads_coordinates(editor)

    def without(ids: list[int], mark: dict[str, Any]) -> Any:
        return states(ids, mark) | {"coordinates": {}}

    client = GuardedClient(Engine(lambda ids: None, states=without), editor, Order.FIRST)
    with pytest.raises(NotReadError, match=r"of the edited layers .* were read"):
        asyncio.run(collect(client, render(harmful=True)))


def test_an_edit_waits_for_the_verdict(editor: Judge) -> None:
    with pytest.raises(SafeguardError, match="--guard-order auto or first"):
        GuardedClient(Engine(lambda ids: None), editor, Order.TOGETHER)
