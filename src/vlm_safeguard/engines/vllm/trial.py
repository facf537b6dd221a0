"""Before anything is answered: vLLM reads texts as the model did that the guard was fitted on."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from vlm_safeguard.engines.vllm import question
from vlm_safeguard.engines.vllm.fitted import Fitted
from vlm_safeguard.engines.vllm.marks import Mark
from vlm_safeguard.engines.vllm.question import Question
from vlm_safeguard.engines.vllm.verdict import Answer, Judge
from vlm_safeguard.errors import SafeguardError
from vlm_safeguard.model.fingerprint import Fingerprint
from vlm_safeguard.policy.media import Media
from vlm_safeguard.policy.request import Request

_TIE = 0.25  # logits; nearer to its threshold a next token may go either way (bfloat16)


class Trial:
    """The anchors that a guard knows its model by, to be asked in vLLM."""

    def __init__(self, guard: Fitted, judge: Judge, *, packed: bool) -> None:
        """Of a guard, whose policy `judge` has as it runs here.

        Args:
            packed: whether vLLM's weights are quantized.

        Raises:
            SafeguardError: the guard holds no anchors.
        """
        if not isinstance(guard.fingerprint, Fingerprint):
            raise SafeguardError(
                "This guard holds nothing to know its model by (it is of format 3). Fit it again "
                "for vLLM."
            )
        self._known, self._judge = guard.fingerprint, judge
        self._name = guard.provenance.model_name
        limits = guard.fingerprint.tolerances
        self._logits = limits.packed_logits if packed else limits.logits
        self._scores = limits.packed_scores if packed else limits.scores

    @property
    def texts(self) -> list[list[int]]:
        """Token ids of each anchor."""
        return [list(text) for text in self._known.texts]

    @property
    def params(self) -> Any:
        """By which each anchor's next token is asked for."""
        return question.marked(self.bare_params, self._judge.mark())

    @property
    def bare_params(self) -> Any:
        """The same, not marked yet."""
        from vllm import SamplingParams

        return SamplingParams(
            max_tokens=1,
            temperature=0.0,
            logprob_token_ids=self._known.tokens.tolist(),
            detokenize=False,
        )

    @property
    def questions(self) -> list[Question]:
        """About each anchor."""
        return [Question.about(self._judge, _request(text)) for text in self._known.texts]

    def edit(self, asked: Sequence[tuple[Question, Answer]]) -> tuple[list[int], Mark] | None:
        """A text to be edited for once, and its mark; None where the policy edits nothing.

        Args:
            asked: the `questions`, answered.
        """
        if not self._judge.policy.edits:
            return None
        about, answer = asked[0]
        return list(about.request.text), about.edit_mark(answer, self._judge.policy.layers)

    def check(self, outputs: Sequence[Any], asked: Sequence[tuple[Question, Answer]]) -> None:
        """Refuse a model that behaves otherwise, or readings that are not the model's.

        Args:
            outputs: the last ones to each of the `texts`.
            asked: the `questions`, answered.

        Raises:
            SafeguardError: what is off.
        """
        tokens = self._known.tokens.tolist()
        following = [output.outputs[0] for output in outputs]
        chances = [[each.logprobs[0][token].logprob for token in tokens] for each in following]
        self._check_near(
            "next token's logits", self._known.logits_error(torch.tensor(chances)), self._logits
        )
        if self._judge.layers:
            states = [
                torch.stack([answer.states[layer][0] for layer in self._judge.layers])
                for _, answer in asked
            ]
            error = self._known.scores_error(self._judge.policy, torch.stack(states))
            self._check_near("harm scores", error, self._scores)
        for (about, given), answer in zip(asked, following, strict=True):
            about.receipt([given])
            if self._judge.likeliest is None:
                continue
            refuses = answer.token_ids[0] in self._judge.policy.refusal_tokens
            for margin in self._judge.opening_leads(given):
                if abs(margin) > _TIE and refuses != (margin > 0):
                    raise SafeguardError(
                        "vLLM's log-probabilities say other than the tokens that it generates (a "
                        f"margin of {margin:+.2f} logits), so no gate can be decided by them."
                    )

    def _check_near(self, what: str, error: float, limit: float) -> None:
        if not error <= limit:
            raise SafeguardError(
                f"This guard was fitted on {self._name}; this model behaves otherwise: of requests "
                f"that it was measured on, the {what} are off by {error:.0%}, more than "
                f"{limit:.0%}. Fit a guard for this model."
            )


def _request(text: tuple[int, ...]) -> Request:
    last = len(text) - 1
    return Request(text, ((last, last),), last, (), None, Media())
