"""vLLM without a server: an `LLM` whose answers are guarded."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from itertools import chain, islice
from typing import Any

import torch

from vlm_safeguard.engines.vllm import question
from vlm_safeguard.engines.vllm.fitted import Fitted
from vlm_safeguard.engines.vllm.gate import runnable
from vlm_safeguard.engines.vllm.marks import KEPT, Mark
from vlm_safeguard.engines.vllm.question import Question
from vlm_safeguard.engines.vllm.supported import check_config, check_version
from vlm_safeguard.engines.vllm.trial import Trial
from vlm_safeguard.engines.vllm.verdict import Answer, Judge
from vlm_safeguard.engines.vllm.worker_options import check_given, subspaces, worker_options
from vlm_safeguard.errors import SafeguardError
from vlm_safeguard.policy.receipt import Receipt
from vlm_safeguard.policy.request import Request, read_request


def engine_options(guard: Fitted, *, refusal_alone: bool = False) -> dict[str, Any]:
    """Arguments of an `LLM` that this guard can be put on: its workers read what the gate needs.

    Args:
        refusal_alone: see `runnable`.

    Raises:
        SafeguardError: the policy is not one that is run here.
    """
    judge = Judge(runnable(guard.policy, refusal_alone=refusal_alone))
    # `LLM.chat` takes no salt, by which an edited request's keys would be told from others'
    caching = {"enable_prefix_caching": False} if judge.policy.edits else {}
    return worker_options(judge) | caching


def guarded(llm: Any, guard: Fitted, *, refusal_alone: bool = False) -> GuardedLLM:
    """Put an `LLM`, made with its `engine_options`, under a guard.

    Args:
        refusal_alone: see `runnable`.

    Raises:
        SafeguardError: the policy, the release, the engine or the model is not one that the guard
            was tested with.
    """
    import vllm

    check_version(vllm.__version__)
    judge = Judge(runnable(guard.policy, refusal_alone=refusal_alone))
    config = llm.llm_engine.vllm_config
    check_config(config, judge, guard.provenance)
    if judge.policy.edits:
        if config.cache_config.enable_prefix_caching:
            raise SafeguardError(
                "This guard edits states, which vLLM's prefix cache would give to other requests; "
                "make the engine with LLM(model, **engine_options(guard))."
            )
        check_given(judge, llm.collective_rpc("set_subspaces", args=(subspaces(judge),)))
    trial = Trial(guard, judge, packed=config.model_config.quantization is not None)
    texts, questions = trial.texts, trial.questions
    outputs = _generate(llm, texts, [trial.params] * len(texts), [None] * len(texts))
    asked = list(zip(questions, ask(llm, questions), strict=True))
    trial.check(outputs, asked)
    if (edit := trial.edit(asked)) is not None:
        text, mark = edit
        _generate(llm, [text], [mark.on(trial.bare_params)], [None])
        _check_edits(llm, [mark])
    return GuardedLLM(llm, judge)


class GuardedLLM:
    """In the place of an `LLM`. Of its methods it has those that answer under the guard.

    All requests are answered beside their media and, at once, asked by their text; where that
    opens the gate, the text's answer takes the place of the other, which nobody sees.

    Attributes:
        receipts: of the requests of the latest call.
    """

    def __init__(self, llm: Any, judge: Judge) -> None:
        """Around `llm`, which was checked."""
        self._llm, self._judge = llm, judge
        self.receipts: list[Receipt] = []

    def chat(self, messages: Any, sampling_params: Any = None, **options: Any) -> list[Any]:
        """As `LLM.chat`; see there.

        Raises:
            ValueError: a request cannot be guarded.
            NotReadError: the engine did not read one's text. Nothing is answered then.
            NotEditedError: the engine did not edit one as planned. Likewise.
        """
        alone = bool(messages) and isinstance(messages[0], dict)
        shown = [_shows(each) for each in ([messages] if alone else messages)]
        salts = [None] * len(shown)
        return self._answer(self._llm.chat, messages, sampling_params, options, shown, salts)

    def generate(self, prompts: Any, sampling_params: Any = None, **options: Any) -> list[Any]:
        """As `LLM.generate`; see there. Prompts of embeddings are refused.

        Raises:
            ValueError: a request cannot be guarded.
            NotReadError: the engine did not read one's text. Nothing is answered then.
            NotEditedError: the engine did not edit one as planned. Likewise.
        """
        alone = isinstance(prompts, str | dict) or not isinstance(prompts, Sequence)
        each = [prompts] if alone else list(prompts)
        for prompt in each:
            unknown = prompt.keys() - set(_PROMPTS) if isinstance(prompt, dict) else set()
            if unknown:
                raise ValueError(
                    f"the guard reads prompts of {', '.join(_PROMPTS)}; this one has "
                    f"{', '.join(sorted(unknown))}"
                )
        shown = [isinstance(p, dict) and bool(p.get("multi_modal_data")) for p in each]
        salts = [p.get("cache_salt") if isinstance(p, dict) else None for p in each]
        return self._answer(self._llm.generate, prompts, sampling_params, options, shown, salts)

    def _answer(
        self,
        run: Callable[..., list[Any]],
        asked: Any,
        sampling_params: Any,
        options: dict[str, Any],
        shown: Sequence[bool],
        salts: Sequence[str | None],
    ) -> list[Any]:
        """Answers to all requests.

        Args:
            shown: of each, whether it came with media.
            salts: of each, what salts the prefix cache for it.
        """
        question.check_options(options)
        if sampling_params is None:
            sampling_params = self._llm.get_default_sampling_params()
        judge, several = self._judge, isinstance(sampling_params, Sequence)
        params = list(sampling_params) if several else [sampling_params] * len(shown)
        marks = [judge.media_mark() if media else judge.mark() for media in shown]
        if judge.policy.image_layers and len(shown) > KEPT:
            raise ValueError(f"this guard's gate reads images, of {KEPT} requests at once at most")
        given = [question.marked(*each) for each in zip(params, marks, strict=True)]
        answers = run(asked, given, **options)
        beside = self._states(marks)
        requests = [self._read(answer, media) for answer, media in zip(answers, shown, strict=True)]
        rows = [row for row, request in enumerate(requests) if request.media.total]
        questions = {row: Question.all_about(judge, requests[row]) for row in rows}
        each_salt = [salts[row] for row, several in questions.items() for _ in several]
        told = iter(ask(self._llm, list(chain(*questions.values())), each_salt))
        read = {row: list(islice(told, len(several))) for row, several in questions.items()}
        receipts = [judge.receipt(request, ()) for request in requests]
        for row, (about, *_) in questions.items():
            receipts[row] = about.receipt(read[row])
            if judge.awaits_image(receipts[row]):
                receipts[row] = about.receipt(read[row], beside[row])
        opened = [row for row, receipt in enumerate(receipts) if receipt.guarded]
        if judge.policy.edits:
            edits = {
                row: questions[row][0].edit_mark(read[row][0], receipts[row].layers)
                for row in opened
            }
            instead = self._edited(run, asked, params, options, edits)
        else:
            instead = _generate(
                self._llm,
                [list(requests[row].text) for row in opened],
                [question.answer_params(judge, params[row]) for row in opened],
                [salts[row] for row in opened],
            )
        self.receipts = receipts
        in_place = dict(zip(opened, instead, strict=True))
        return [in_place.get(row, answer) for row, answer in enumerate(answers)]

    def _edited(
        self,
        run: Callable[..., list[Any]],
        asked: Any,
        params: Sequence[Any],
        options: dict[str, Any],
        edits: dict[int, Mark],
    ) -> list[Any]:
        """Answers to open requests as they came, edited.

        Args:
            edits: row → what is done to it.

        Raises:
            NotEditedError: one was not edited as planned. Nothing is answered then.
        """
        answers: list[Any] = []
        alone = len(params) == 1
        for start in range(0, len(edits), KEPT):  # workers keep no more than that
            some = dict(list(edits.items())[start : start + KEPT])
            again = asked if alone else [asked[row] for row in some]
            given = [mark.on(params[row]) for row, mark in some.items()]
            theirs = dict(options)
            if isinstance(priority := options.get("priority"), Sequence):
                theirs["priority"] = [priority[row] for row in some]
            answers += run(again, given, **theirs)
            _check_edits(self._llm, list(some.values()))
        return answers

    def _states(self, marks: Sequence[Mark | None]) -> dict[int, dict[int, torch.Tensor]]:
        """Row → the states that workers read of requests as they came, where the gate asks so."""
        named = [(row, mark) for row, mark in enumerate(marks) if mark is not None and mark.name]
        if not named:
            return {}
        names = [mark.name for _, mark in named]
        kept = self._llm.collective_rpc("take_states", args=(names,))
        return {
            row: question.states_read(
                self._judge, mark, [worker[place : place + 1] for worker in kept]
            )
            for place, (row, mark) in enumerate(named)
        }

    def _read(self, answer: Any, shown: bool) -> Request:
        """The request of an answer. Where its media stand is known by the policy alone here."""
        try:
            request = read_request(self._judge.policy, answer.prompt_token_ids)
        except SafeguardError as error:
            raise ValueError(str(error)) from error
        if shown and not request.media.total:
            raise ValueError("a request came with media, and the guard reads none in its prompt")
        question.check_end(self._judge, request)
        return request


def _check_edits(llm: Any, marks: Sequence[Mark]) -> None:
    """Ask workers what they edited under these marks' names.

    Raises:
        NotEditedError: that is not what was to be edited.
    """
    shown = llm.collective_rpc("take_edited", args=([mark.name for mark in marks],))
    for place, mark in enumerate(marks):
        question.check_edits(mark, [worker[place : place + 1] for worker in shown])


def ask(
    llm: Any, questions: Sequence[Question], salts: Sequence[str | None] | None = None
) -> list[Answer]:
    """The engine's answers to questions, and to what is asked further.

    Args:
        salts: of each, what salts the prefix cache for its request; nothing by default.

    Raises:
        NotReadError: one was not read.
    """
    each_salt = [None] * len(questions) if salts is None else salts
    answers = _ask(llm, questions, each_salt)
    asked = (about.further(answer) for about, answer in zip(questions, answers, strict=True))
    further = {row: each for row, each in enumerate(asked) if each is not None}
    words = _ask(llm, list(further.values()), [each_salt[row] for row in further])
    for row, each in zip(further, words, strict=True):
        answers[row] = replace(answers[row], words=each.words, said=each.said)
    return answers


def _ask(llm: Any, questions: Sequence[Question], salts: Sequence[str | None]) -> list[Answer]:
    answers: list[Answer] = []
    for start in range(0, len(questions), KEPT):  # workers keep no more than that
        some = questions[start : start + KEPT]
        outputs = _generate(
            llm,
            [each.prompt for each in some],
            [each.params for each in some],
            salts[start : start + KEPT],
        )
        names = [name for each in some for name in each.names]
        shown = llm.collective_rpc("take_states", args=(names,)) if names else []
        for place, (about, output) in enumerate(zip(some, outputs, strict=True)):
            answers.append(about.answered(output, [worker[place : place + 1] for worker in shown]))
    return answers


def _generate(
    llm: Any, texts: Sequence[list[int]], params: Sequence[Any], salts: Sequence[str | None]
) -> list[Any]:
    """The engine's answers to texts."""
    if not texts:
        return []
    prompts = [
        {"prompt_token_ids": text} | ({"cache_salt": salt} if salt else {})
        for text, salt in zip(texts, salts, strict=True)
    ]
    outputs: list[Any] = llm.generate(prompts, list(params), use_tqdm=False)
    return outputs


_PROMPTS = ("prompt", "prompt_token_ids", "multi_modal_data", "mm_processor_kwargs", "cache_salt")


def _shows(messages: Any) -> bool:
    """Whether a conversation holds anything but texts."""
    parts = [message["content"] for message in messages]
    return any(
        not isinstance(part, dict) or part.get("type") != "text"
        for content in parts
        if isinstance(content, list)
        for part in content
    )
