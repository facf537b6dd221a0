"""States that vLLM's workers edit: the log-probabilities of transformers' hooks, and closed doors.

On the random model of `tests/`, in float32.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import pytest
import torch

from support.tiny_engine import (
    ENGINES,
    TOKENS,
    Tiny,
    engine,
    image_of,
    make_tiny,
    messages,
    params,
    requests,
    worker_of,
)
from vlm_safeguard import Guard
from vlm_safeguard.engines.vllm import edit_passes, offline
from vlm_safeguard.engines.vllm.marks import Mark
from vlm_safeguard.engines.vllm.offline import engine_options, guarded
from vlm_safeguard.engines.vllm.question import NotEditedError, NotReadError, Question
from vlm_safeguard.engines.vllm.verdict import Judge
from vlm_safeguard.engines.vllm.worker_options import subspaces
from vlm_safeguard.errors import SafeguardError
from vlm_safeguard.model.backbone import chat_inputs
from vlm_safeguard.model.conversation import chat_of
from vlm_safeguard.policy.edits import Add, Drift, Edit, Refuse, Restore
from vlm_safeguard.policy.gate import Always
from vlm_safeguard.policy.request import read_request
from vlm_safeguard.policy.response import Response
from vlm_safeguard.policy.span import Span

#: Each edit in some engine: its own, and vLLM's options.
CASES: dict[str, tuple[Edit, dict[str, Any]]] = {
    "refuse, eager": (Refuse(strength=2.0), ENGINES["eager"]),
    "refuse, compiled, in chunks": (Refuse(strength=2.0), ENGINES["compiled, in chunks"]),
    "restore, two ranks": (Restore(one_sided=False, strength=3.0), ENGINES["two ranks"]),
    "refuse, two stages": (Refuse(strength=2.0), ENGINES["two stages"]),
    "refuse, whole answer": (Refuse(strength=2.0, span=Span.ANSWER), ENGINES["eager"]),
    "refuse, last token": (Refuse(strength=2.0, span=Span.LAST), ENGINES["eager"]),
    "drift, request": (Drift(strength=2.0, span=Span.REQUEST), ENGINES["eager"]),
    "refuse, preempted": (
        Refuse(strength=2.0),
        ENGINES["eager"]
        | {"num_gpu_blocks_override": 9, "block_size": 32, "max_model_len": 256}
        | {"disable_log_stats": False},
    ),
}
Made = Callable[[Guard, dict[str, Any]], AbstractContextManager[Any]]


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Tiny:
    return make_tiny(tmp_path_factory.mktemp("tiny"))


@pytest.fixture
def made(tiny: Tiny, tmp_path: Path) -> Made:
    """Makes an engine in which all log-probabilities can be asked for."""
    return lambda guard, options: engine(tiny, guard, tmp_path, {"max_logprobs": -1, **options})


def edits(tiny: Tiny, edit: Edit, **more: Any) -> Guard:
    return tiny.guard.variant(edit=edit, response=Response.EDIT, **more)


@torch.no_grad()
def by_hooks(
    tiny: Tiny, guard: Guard | None, count: int, tokens: int = TOKENS
) -> list[torch.Tensor]:
    """Of each request, (tokens, vocabulary) log-probabilities of its greedy answer."""
    made = []
    for number, text in enumerate(requests()[:count]):
        inputs = chat_inputs(tiny.model, tiny.processor, [chat_of(text, image_of(number))])
        asked = {"max_new_tokens": tokens, "do_sample": False, "output_logits": True}
        if guard is None:
            out = tiny.model.generate(**inputs, **asked, return_dict_in_generate=True)
        else:
            with guard.attach(tiny.model):
                out = tiny.model.generate(**inputs, **asked, return_dict_in_generate=True)
        made.append(torch.cat(out.logits).log_softmax(-1))
    return made


def logprobs(answer: Any, vocabulary: int) -> torch.Tensor:
    """(tokens, vocabulary) log-probabilities that vLLM gave."""
    each = answer.outputs[0].logprobs
    return torch.tensor([[step[n].logprob for n in range(vocabulary)] for step in each])


@pytest.mark.parametrize("case", list(CASES))
def test_log_probabilities_are_those_of_the_hooks(case: str, tiny: Tiny, made: Made) -> None:
    edit, options = CASES[case]
    guard, count = edits(tiny, edit), len(requests())
    tokens = 40 if "preempted" in case else TOKENS  # so long that more blocks are needed than are
    expected, plain = (by_hooks(tiny, each, count, tokens) for each in (guard, None))
    with made(guard, options) as llm:
        safe = guarded(llm, guard)
        answers = safe.chat(messages(count), params(logprobs=-1, max_tokens=tokens), use_tqdm=False)
        if "preempted" in case:
            assert preemptions(llm) > 0
    opened = [receipt.guarded for receipt in safe.receipts]
    assert set(opened) == {True, False}
    effect = 0.0
    for is_open, answer, own, bare in zip(opened, answers, expected, plain, strict=True):
        assert list(answer.outputs[0].token_ids) == own.argmax(-1).tolist()
        torch.testing.assert_close(logprobs(answer, own.shape[1]), own, atol=1e-3, rtol=0)
        if is_open:
            effect = max(effect, float((own - bare)[0].abs().max()))
        else:
            torch.testing.assert_close(own, bare)
    assert effect > 0.1  # so the tolerance is far below what an edit does
    for receipt in safe.receipts:
        assert receipt.response is (Response.EDIT if receipt.guarded else None)
        assert receipt.layers == (guard.policy.layers if receipt.guarded else ())


def preemptions(llm: Any) -> int:
    """How often the engine took a request's cache away."""
    metrics = {each.name: each for each in llm.get_metrics()}
    return int(metrics["vllm:num_preemptions"].value)


def test_kept_graphs_are_of_the_same_edit(tiny: Tiny, made: Made) -> None:
    """vLLM starts from what it compiled before; an edit is compiled into it."""
    guards = [edits(tiny, Refuse(strength=strength)) for strength in (2.0, 0.5)]
    for guard in (guards[0], guards[1], guards[0]):
        with made(guard, ENGINES["compiled, in chunks"]) as llm:
            safe = guarded(llm, guard)
            answers = safe.chat(messages(5), params(logprobs=-1), use_tqdm=False)
        for answer, own in zip(answers, by_hooks(tiny, guard, 5), strict=True):
            torch.testing.assert_close(logprobs(answer, own.shape[1]), own, atol=1e-3, rtol=0)


@pytest.fixture
def always(tiny: Tiny) -> Guard:
    """Whose gate is always open."""
    return edits(tiny, Refuse(strength=2.0), gate=(Always(),))


def about(tiny: Tiny, judge: Judge) -> tuple[Question, dict[str, Any]]:
    """A request's question, and the request as vLLM takes it."""
    text = requests()[-2]
    chat = chat_of(text, image_of(0))
    ids = chat_inputs(tiny.model, tiny.processor, [chat])["input_ids"][0].tolist()
    prompt = f"<|im_start|>user\n<image>{text}<|im_end|>\n<|im_start|>assistant\n"
    shown = {"prompt": prompt, "multi_modal_data": {"image": image_of(0)}}
    return Question.about(judge, read_request(judge.policy, ids)), shown


def test_edited_keys_are_given_to_no_other_request(tiny: Tiny, made: Made, always: Guard) -> None:
    """In an engine that keeps prefixes, as a server's does."""
    judge, layers = Judge(always.policy), always.policy.layers
    asked, shown = about(tiny, judge)
    bare = judge.mark()
    assert bare is not None
    options = {"enforce_eager": True, "enable_prefix_caching": True, "block_size": 32}
    with made(always, options) as llm:

        def first(mark: Mark, salt: str | None) -> torch.Tensor:
            """Log-probabilities of an answer's first token."""
            salted = shown | ({} if salt is None else {"cache_salt": salt})
            (answer,) = llm.generate([salted], [mark.on(params(logprobs=-1))], use_tqdm=False)
            return logprobs(answer, 507)[0]

        def moved(one: torch.Tensor, other: torch.Tensor) -> float:
            return float((one - other).abs().max())

        llm.collective_rpc("set_subspaces", args=(subspaces(judge),))
        (read,) = offline.ask(llm, [asked])
        plain = first(bare, "alone")
        marks = [asked.edit_mark(read, layers) for _ in range(3)]
        edited = [first(mark, mark.name) for mark in marks]
        assert moved(edited[0], plain) > 0.1
        assert max(moved(each, edited[0]) for each in edited) < 1e-4
        assert moved(first(bare, None), plain) < 1e-4
        offline._check_edits(llm, marks)
        stale = first(marks[0], "alone")  # with an unedited request's salt its keys are taken
        assert moved(stale, edited[0]) > 0.05
        with pytest.raises(NotEditedError, match="edited"):
            offline._check_edits(llm, [marks[0]])


def test_an_engine_that_keeps_prefixes_is_refused(tiny: Tiny, made: Made, always: Guard) -> None:
    with (
        made(always, {"enforce_eager": True, "enable_prefix_caching": True}) as llm,
        pytest.raises(SafeguardError, match="prefix cache"),
    ):
        guarded(llm, always)


def test_edits_of_requests_without_media_are_refused(tiny: Tiny) -> None:
    with pytest.raises(SafeguardError, match="'add' acts on requests without media"):
        engine_options(edits(tiny, Add()))


# --- faults ---


def test_what_workers_do_not_say_they_edited_is_not_answered(
    tiny: Tiny, made: Made, always: Guard, monkeypatch: pytest.MonkeyPatch
) -> None:
    with made(always, ENGINES["eager"]) as llm:
        safe, worker = guarded(llm, always), worker_of(llm)
        take = worker.take_edited
        wrong: list[tuple[str, Any]] = [
            ("edited nothing", lambda each: None),
            ("edited tokens", lambda each: each | {"positions": each["positions"][:-1]}),
            ("of layers", lambda each: each | {"layers": each["layers"][1:]}),
        ]
        for words, change in wrong:
            with monkeypatch.context() as patch:
                patch.setattr(
                    worker, "take_edited", lambda names, c=change: [c(x) for x in take(names)]
                )
                with pytest.raises(NotEditedError, match=words):
                    safe.chat(messages(1), params(), use_tqdm=False)
        monkeypatch.setattr(edit_passes, "keep", keep_newest)
        with pytest.raises(NotReadError, match="edited layers"):
            safe.chat(messages(2), params(), use_tqdm=False)


def keep_newest(kept: OrderedDict[str, Any], name: str, value: Any) -> None:
    """As if a worker had room for one reading."""
    kept.clear()
    kept[name] = value


def hook_gone(llm: Any) -> None:
    worker_of(llm).get_model().get_language_model().model.layers[3]._forward_hooks.clear()


def no_subspace(llm: Any) -> None:
    worker_of(llm)._edited._filled.clear()


def not_finite(llm: Any) -> None:
    worker_of(llm).get_model().get_language_model().model.layers[3].guard_edit_V.fill_(torch.nan)


@pytest.mark.parametrize("fault", [hook_gone, no_subspace, not_finite])
def test_an_edit_that_cannot_be_made_ends_the_engine(
    fault: Callable[[Any], None], tiny: Tiny, made: Made, always: Guard
) -> None:
    with made(always, ENGINES["eager"]) as llm:
        safe = guarded(llm, always)
        assert safe.chat(messages(1), params(), use_tqdm=False)
        fault(llm)
        with pytest.raises((SafeguardError, NotReadError)):
            safe.chat(messages(1), params(), use_tqdm=False)
