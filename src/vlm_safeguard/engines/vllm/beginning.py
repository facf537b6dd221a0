"""Answers that begin with given words, as vLLM's own logits processor; and the first closed door.

vLLM's front asks it about every request, whatever way that came: one that is not marked is refused.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from vllm.v1.sample.logits_processor import AdapterLogitsProcessor

from vlm_safeguard.engines.vllm.marks import Mark
from vlm_safeguard.errors import SafeguardError
from vlm_safeguard.policy.refusal import likeliest_prefixes, prefix_begun


class Beginning(AdapterLogitsProcessor):  # type: ignore[misc]  # vLLM is not in every environment
    """Of each request, one of the beginnings that its mark names."""

    @classmethod
    def validate_params(cls, sampling_params: Any) -> None:
        """Refuse a request that did not come through the guarded client.

        Raises:
            ValueError: it did not.
        """
        try:
            Mark.of(sampling_params.extra_args)
        except SafeguardError as error:
            raise ValueError(str(error)) from error

    def is_argmax_invariant(self) -> bool:
        """It chooses the tokens, so greedy sampling asks it, too."""
        return False

    def new_req_logits_processor(
        self, params: Any
    ) -> Callable[[list[int], torch.Tensor], torch.Tensor] | None:
        """What chooses a request's first tokens; None where nothing does."""
        beginnings = Mark.of(params.extra_args).beginnings
        if not beginnings:
            return None

        def choose(answered: list[int], logits: torch.Tensor) -> torch.Tensor:
            if answered:
                beginning = prefix_begun(answered[0], beginnings)
            else:
                (beginning,) = likeliest_prefixes(logits[None], beginnings)
            if len(answered) < len(beginning):
                logits.fill_(-torch.inf)
                logits[beginning[len(answered)]] = 0.0
            return logits

        return choose
