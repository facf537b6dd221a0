"""vLLM without a server: an `LLM` whose answers are guarded."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from vlm_safeguard.engines.vllm import question
from vlm_safeguard.engines.vllm.fitted import Fitted
from vlm_safeguard.engines.vllm.gate import runnable
from vlm_safeguard.engines.vllm.supported import check_config, check_version
from vlm_safeguard.engines.vllm.trial import Trial
from vlm_safeguard.engines.vllm.verdict import Judge
from vlm_safeguard.errors import SafeguardError
from vlm_safeguard.policy.receipt import Receipt
from vlm_safeguard.policy.request import Request, read_request


def guarded(llm: Any, guard: Fitted, *, refusal_alone: bool = False) -> GuardedLLM:
    """Put an `LLM` under a guard.

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
    trial = Trial(guard, judge, packed=config.model_config.quantization is not None)
    prompts, params = zip(*trial.attempts, strict=True)
    ids = [{"prompt_token_ids": prompt["prompt_token_ids"]} for prompt in prompts]
    trial.check(llm.generate(ids, list(params), use_tqdm=False))
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
        several = isinstance(sampling_params, Sequence)
        params = list(sampling_params) if several else [sampling_params] * len(shown)
        answers = run(asked, sampling_params, **options)
        requests = [self._read(answer, media) for answer, media in zip(answers, shown, strict=True)]
        rows = [row for row, request in enumerate(requests) if request.media.total]
        questions = [self._judge.question(requests[row]) for row in rows]
        read = self._generate(questions, [question.params(self._judge)] * len(rows), rows, salts)
        receipts = [
            question.receipt_of(self._judge, request, read[row])
            if row in read
            else self._judge.receipt(request, None)
            for row, request in enumerate(requests)
        ]
        opened = [row for row, receipt in enumerate(receipts) if receipt.guarded]
        texts = [list(requests[row].text) for row in opened]
        instead = self._generate(texts, [params[row] for row in opened], opened, salts)
        self.receipts = receipts
        return [instead.get(row, answer) for row, answer in enumerate(answers)]

    def _generate(
        self,
        texts: Sequence[list[int]],
        params: Sequence[Any],
        rows: Sequence[int],
        salts: Sequence[str | None],
    ) -> dict[int, Any]:
        """Row → the engine's answer to its text."""
        if not rows:
            return {}
        prompts = [
            {"prompt_token_ids": text} | ({"cache_salt": salt} if (salt := salts[row]) else {})
            for text, row in zip(texts, rows, strict=True)
        ]
        answers = self._llm.generate(prompts, list(params), use_tqdm=False)
        return dict(zip(rows, answers, strict=True))

    def _read(self, answer: Any, shown: bool) -> Request:
        """The request of an answer. Where its media stand is known by the policy alone here."""
        try:
            request = read_request(self._judge.policy, answer.prompt_token_ids)
        except SafeguardError as error:
            raise ValueError(str(error)) from error
        if shown and not request.media.total:
            raise ValueError("a request came with media, and the guard reads none in its prompt")
        return request


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
