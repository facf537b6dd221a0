"""Before anything is answered: vLLM reads texts as the model did that the guard was fitted on."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from vlm_safeguard.engines.vllm import question
from vlm_safeguard.engines.vllm.fitted import Fitted
from vlm_safeguard.engines.vllm.verdict import Judge
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
        self._limit = limits.packed_logits if packed else limits.logits

    @property
    def attempts(self) -> list[tuple[dict[str, Any], Any]]:
        """(prompt, `SamplingParams`) of each anchor's next token, then of each one's question."""
        from vllm import SamplingParams

        following = SamplingParams(
            max_tokens=1,
            temperature=0.0,
            logprob_token_ids=self._known.tokens.tolist(),
            detokenize=False,
        )
        asked = question.params(self._judge)
        texts = self._known.texts
        return [
            *((question.tokens(list(text), {}), following) for text in texts),
            *((question.tokens(self._judge.question(_request(t)), {}), asked) for t in texts),
        ]

    def check(self, outputs: Sequence[Any]) -> None:
        """Refuse a model that behaves otherwise, or log-probabilities that are not the model's.

        Args:
            outputs: the last ones to `attempts`.

        Raises:
            SafeguardError: what is off.
        """
        texts, tokens = self._known.texts, self._known.tokens.tolist()
        following = [output.outputs[0] for output in outputs[: len(texts)]]
        chances = [[each.logprobs[0][token].logprob for token in tokens] for each in following]
        error = self._known.logits_error(torch.tensor(chances))
        if not error <= self._limit:
            raise SafeguardError(
                f"This guard was fitted on {self._name}; this model behaves otherwise: of requests "
                f"that it was measured on, the next token's logits are off by {error:.0%}, more "
                f"than {self._limit:.0%}. Fit a guard for this model."
            )
        asked = zip(texts, following, outputs[len(texts) :], strict=True)
        for text, answer, output in asked:
            receipt = question.receipt_of(self._judge, _request(text), output)
            margin = receipt.scores["own_refusal"]
            refuses = answer.token_ids[0] in self._judge.policy.refusal_tokens
            if abs(margin) > _TIE and refuses != (margin > 0):
                raise SafeguardError(
                    "vLLM's log-probabilities of a prompt say other than the tokens that it "
                    f"generates behind it (a margin of {margin:+.2f} logits), so no gate can be "
                    "decided by them."
                )


def _request(text: tuple[int, ...]) -> Request:
    return Request(text, (), len(text) - 1, (), None, Media())
