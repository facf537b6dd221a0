"""The processes that run one model together: all of them see, decide and write the same, or stop.

Tensor parallelism gives every process the whole states after each layer, bit for bit the same, as
each is a sum that all of them get. So each process guards its own copy, and all decide alike as
long as they were given the same. Whether they were, and did, is compared.
"""

from __future__ import annotations

from hashlib import blake2b
from typing import TYPE_CHECKING, Any

import torch
from torch import distributed

from vlm_safeguard.engines.hooks.layers import LayerHooks
from vlm_safeguard.errors import SafeguardError
from vlm_safeguard.model.backbone import Backbone
from vlm_safeguard.model.parallel import SHARE_WEIGHTS, is_shard, process_groups

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from transformers import PreTrainedModel

_TOKENS = 5  # of the text whose states have to be whole


class Peers:
    """Of this process, for one model; none where it runs the model by itself."""

    def __init__(self, model: PreTrainedModel, backbone: Backbone) -> None:
        self._backbone = backbone
        self._groups = process_groups(model)

    def check_whole(self, hooks: LayerHooks, layers: Sequence[int]) -> None:
        """Refuse a model after one of whose layers this process lacks a part of the states.

        Raises:
            SafeguardError: where.
        """
        if not self._groups:
            return
        whole = (1, _TOKENS, self._backbone.hidden_size)
        partial: list[int] = []

        def look(layer: int, hidden: torch.Tensor) -> None:
            if is_shard(hidden) or tuple(hidden.shape) != whole:
                partial.append(layer)

        hooks.arm(layers, look)
        try:
            with torch.no_grad():
                self._backbone.run_text([[self._backbone.text_token] * _TOKENS])
            hooks.check_all_took_part(layers, "the pass that looks for shards")
        finally:
            hooks.disarm()
        if partial:
            raise SafeguardError(
                f"After layers {partial} of {self._backbone.decoder_path} this process has the "
                f"states of some tokens only, or a part of each. {SHARE_WEIGHTS}."
            )

    def refuse_together(self, check: Callable[..., Any], *given: Any) -> Any:
        """What a check of this process alone gives; if one process refuses, all of them do.

        Or the others would wait for it.

        Raises:
            SafeguardError: its own, or that another one has its own.
        """
        result, refusal = None, None
        try:
            result = check(*given)
        except SafeguardError as error:
            refusal = error
        for group in self._groups:
            refused = torch.tensor([refusal is not None], device=self._backbone.device).long()
            distributed.all_reduce(refused, distributed.ReduceOp.MAX, group)
            if refusal is None and bool(refused):
                refusal = SafeguardError(
                    "Another of the processes that run this model together refuses, and says why, "
                    "so nothing is generated."
                )
        if refusal is not None:
            raise refusal
        return result

    def check_agree(self, what: str, *seen: torch.Tensor | None) -> None:
        """Refuse to go on where another process has other values; all of them refuse.

        Args:
            what: these values are.

        Raises:
            SafeguardError: they differ.
        """
        if not self._groups:
            return
        shown = [None if each is None else (each.shape, each.tolist()) for each in seen]
        digest = int.from_bytes(blake2b(repr(shown).encode(), digest_size=7).digest())
        for group in self._groups:
            extremes = torch.tensor([digest, -digest], device=self._backbone.device)
            distributed.all_reduce(extremes, distributed.ReduceOp.MAX, group)
            if extremes.tolist() != [digest, -digest]:
                raise SafeguardError(
                    f"The processes that run this model together differ in {what}, so nothing "
                    "more is generated. Give each the same requests and options, and, where "
                    "tokens are sampled, the same seed (transformers.set_seed)."
                )
