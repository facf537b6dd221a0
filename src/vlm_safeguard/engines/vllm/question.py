"""A request's question: what the engine is asked about its text, and what its answer decides."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any
from uuid import uuid4

import torch

from vlm_safeguard.engines.vllm.edit_plan import EditPlan, tokens_read
from vlm_safeguard.engines.vllm.marks import Mark
from vlm_safeguard.engines.vllm.states import check_edited, coordinates_of, states_of
from vlm_safeguard.engines.vllm.verdict import Answer, Entry, Judge
from vlm_safeguard.errors import SafeguardError
from vlm_safeguard.policy.receipt import Receipt
from vlm_safeguard.policy.request import Request

_BEAM = re.compile(r"-beam-\d+$")
_READ = ("length", "stop")  # how a request for one token ends that the engine has read


class NotReadError(RuntimeError):
    """A question ended without being read, so the request's gate is neither open nor closed."""


class NotEditedError(RuntimeError):
    """An open request was not edited as planned, so its answer is not given."""


@dataclass(frozen=True)
class Question:
    """About one request: about its text, or one of its sentences.

    Attributes:
        text: token ids that are asked about.
        mark: by which workers know what to read; None where they know of nothing.
        words: of a refusal, token ids that are read behind `text`.
    """

    judge: Judge
    request: Request
    text: tuple[int, ...]
    mark: Mark | None
    words: tuple[int, ...]

    @classmethod
    def about(cls, judge: Judge, request: Request) -> Question:
        """About its text. No two questions share what workers keep.

        The words of a refusal are in it where an answer may be edited along them.
        """
        tokens = tokens_read(judge.policy, request) if judge.policy.edits else ()
        mark = judge.mark(name=uuid4().hex, position=len(request.text) - 1, tokens=tokens)
        return cls(judge, request, request.text, mark, judge.policy.followed)

    @staticmethod
    def all_about(judge: Judge, request: Request) -> list[Question]:
        """About its text, then about each of its sentences, as the policy judges them."""
        _, *sentences = judge.policy.judged(request.text)
        marks = [judge.mark(name=uuid4().hex, position=len(each) - 1) for each in sentences]
        return [
            Question.about(judge, request),
            *(Question(judge, request, *each, ()) for each in zip(sentences, marks, strict=True)),
        ]

    def further(self, answer: Answer) -> Question | None:
        """What is asked next: the words of a refusal, where the decision hangs on them.

        Raises:
            NotReadError: the answer lacks something.
        """
        alone = self.text != self.request.text
        try:
            if not self.judge.awaits_words(answer, alone=alone):
                return None
        except (ValueError, SafeguardError) as error:
            raise _not_read("text", error) from error
        return replace(self, mark=self.judge.mark(), words=self.judge.words(answer))

    @property
    def prompt(self) -> list[int]:
        """Token ids to read."""
        return [*self.text, *self.words]

    @property
    def names(self) -> list[str]:
        """Under which workers keep what they read of it: one, or none."""
        return [] if self.mark is None or self.mark.name is None else [self.mark.name]

    @property
    def params(self) -> Any:
        """How it is read: the likeliest tokens in the words' places, or in that of the next token.

        vLLM computes a prompt's last token in any case; the others may come from its prefix cache
        where nothing is read of them.
        """
        from vllm import SamplingParams

        likeliest = self.judge.likeliest
        params = SamplingParams(
            max_tokens=1,
            temperature=0.0,
            logprobs=None if self.words else likeliest,
            prompt_logprobs=likeliest if self.words else None,
            detokenize=False,
            skip_reading_prefix_cache=bool(self.words or (self.mark and self.mark.tokens)),
        )
        return marked(params, self.mark)

    def answered(self, output: Any, shown: Sequence[Sequence[Mapping[str, Any] | None]]) -> Answer:
        """What the engine gave to it, checked.

        Args:
            output: the last one that the engine gave; None where it gave nothing.
            shown: of each worker, what it read under `names`.

        Raises:
            NotReadError: it gave nothing, or stopped before all was read.
        """
        reasons = [each.finish_reason for each in output.outputs] if output is not None else []
        if len(reasons) != 1 or reasons[0] not in _READ:
            raise NotReadError(
                f"The engine did not read a request's text (it ended by {reasons or 'nothing'}), "
                "so its gate is neither open nor closed, and nothing is answered."
            )
        first, words = self._entries(output)
        if self.mark is None or not self.names:
            return Answer(first, words, self.words)
        states = states_read(self.judge, self.mark, shown)
        try:
            seen = coordinates_of(self.mark, self.judge.policy.layers, [each[0] for each in shown])
        except ValueError as error:
            raise _not_read("text", error) from error
        return Answer(first, words, self.words, states, seen)

    def _entries(self, output: Any) -> tuple[Entry, Sequence[Entry]]:
        """Of the token behind the text, and of each of the words.

        Raises:
            NotReadError: some are missing.
        """
        if self.judge.likeliest is None:
            return None, ()
        shown = output.prompt_logprobs if self.words else output.outputs[0].logprobs
        given: Sequence[Entry] = shown or ()
        expected = len(self.prompt) if self.words else 1
        if len(given) != expected:
            raise _not_read("text", f"of {expected} tokens, {len(given)} have log-probabilities")
        if not self.words:
            return given[0], ()
        words = given[len(self.text) :]
        return words[0], words

    def edit_mark(self, answer: Answer, layers: Sequence[int]) -> Mark:
        """Of the request as it came, its gate being open in these layers."""
        plan = EditPlan.of(self.judge.policy, self.request, layers, answer.coordinates)
        mark = self.judge.mark(name=uuid4().hex, edit=plan)
        assert mark is not None, "workers know of every request of a policy that edits"
        return mark

    def receipt(
        self, answers: Sequence[Answer], image: Mapping[int, torch.Tensor] | None = None
    ) -> Receipt:
        """What the engine's answers to all questions about the request decide; see `Judge.receipt`.

        Raises:
            NotReadError: it lacks something.
        """
        try:
            return self.judge.receipt(self.request, answers, image)
        except (ValueError, SafeguardError) as error:
            raise _not_read("text", error) from error


def _not_read(what: str, why: object) -> NotReadError:
    return NotReadError(f"The engine did not read a request's {what}: {why}.")


def states_read(
    judge: Judge, mark: Mark, shown: Sequence[Sequence[Mapping[str, Any] | None]]
) -> dict[int, torch.Tensor]:
    """`states_of` what each worker read under a mark's name.

    Raises:
        NotReadError: that is not what was to be read.
    """
    try:
        return states_of(mark, judge.layers, [each[0] for each in shown])
    except (ValueError, IndexError) as error:
        raise _not_read("states", error) from error


def check_edits(mark: Mark, shown: Sequence[Sequence[Mapping[str, Any] | None]]) -> None:
    """`check_edited` by what each worker edited under a mark's name.

    Raises:
        NotEditedError: that is not what was to be edited.
    """
    try:
        check_edited(mark, [each[0] for each in shown])
    except (ValueError, IndexError) as error:
        raise NotEditedError(
            f"The engine did not edit a request as planned, so it is not answered: {error}."
        ) from error


def read(judge: Judge, prompt: Any) -> Request:
    """A prompt as vLLM's renderer gives it.

    Raises:
        ValueError: it is not rendered, is made of embeddings or has an encoder's part; or it cannot
            be judged.
    """
    kind = prompt.get("type") if isinstance(prompt, dict) else None
    if kind not in ("token", "multimodal") or "encoder_prompt_token_ids" in prompt:
        raise ValueError(
            "the guard reads prompts of tokens and media; embeddings, encoders' prompts and inputs "
            "that come as a stream are refused"
        )
    placed = prompt.get("mm_placeholders") or {}
    ranges = [(r.offset, r.offset + r.length) for each in placed.values() for r in each]
    try:
        request = judge.read(prompt["prompt_token_ids"], ranges)
    except SafeguardError as error:
        raise ValueError(str(error)) from error
    check_end(judge, request)
    return request


def check_end(judge: Judge, request: Request) -> None:
    """Refuse a begun answer where the gate reads the end of the multimodal prompt.

    Raises:
        ValueError: it is begun.
    """
    if judge.policy.image_layers and request.media.total and request.prefill:
        raise ValueError(
            "this guard's gate reads the request beside its media where that ends, which is not "
            "done behind an answer that is begun in the prompt; leave that out"
        )


def check_name(request_id: str) -> None:
    """Refuse a step of a beam search: it goes on from an answer, which is no request.

    Args:
        request_id: as vLLM names it; it does not say otherwise that it is one.

    Raises:
        ValueError: it is one.
    """
    if _BEAM.search(request_id):
        raise ValueError("the guard was not tested with beam search; ask without it")


def check_options(options: Mapping[str, Any]) -> None:
    """Refuse a request for an adapter.

    Raises:
        ValueError: it is one.
    """
    if options.get("lora_request") is not None:
        raise ValueError("the guard was fitted without adapters; requests for one fail")


def tokens(ids: list[int], prompt: Any) -> dict[str, Any]:
    """A rendered prompt of tokens alone; what salts the prefix cache for `prompt` does for it.

    No salt of ours is needed: a text is not edited, so its keys are an unmodified model's.
    """
    salt = {name: prompt[name] for name in ("cache_salt",) if name in prompt}
    return {"type": "token", "prompt_token_ids": ids, **salt}


def salted(prompt: Any, mark: Mark) -> Any:
    """An edited request's prompt: its keys are its own, and no other request's."""
    return {**prompt, "cache_salt": mark.name}


def marked(params: Any, mark: Mark | None) -> Any:
    """These `SamplingParams` with a mark, where there is one.

    Raises:
        ValueError: they bear one already.
    """
    return params if mark is None else mark.on(params)


def answer_params(judge: Judge, params: Any) -> Any:
    """Those of an open request's answer from its text.

    An answer whose form is constrained cannot begin with other words, so it begins as it may.

    Raises:
        ValueError: they bear a mark already.
    """
    constrained = getattr(params, "structured_outputs", None) is not None
    beginnings = () if constrained else judge.policy.beginnings
    return marked(params, judge.mark(beginnings=beginnings))
