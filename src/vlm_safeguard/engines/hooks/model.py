"""Forward hooks on a model and its decoder: every pass is located, guarded, and checked."""

from __future__ import annotations

from inspect import signature
from threading import local
from typing import TYPE_CHECKING, Any, Self
from weakref import WeakKeyDictionary

import torch

from vlm_safeguard.engines.hooks.batch import Batch
from vlm_safeguard.engines.hooks.editing import Editing
from vlm_safeguard.engines.hooks.layers import LayerHooks
from vlm_safeguard.engines.hooks.passes import Pass, Prompt, one_more_token, whole_prompt
from vlm_safeguard.engines.hooks.peers import Peers
from vlm_safeguard.engines.hooks.reader import TextReader
from vlm_safeguard.engines.hooks.text_answers import Left
from vlm_safeguard.engines.hooks.text_passes import TextReadings
from vlm_safeguard.engines.hooks.turns import Turns
from vlm_safeguard.engines.hooks.unchanged import check_unchanged
from vlm_safeguard.engines.hooks.verification import verify
from vlm_safeguard.errors import SafeguardError
from vlm_safeguard.model.backbone import Backbone
from vlm_safeguard.model.cache import cache_in
from vlm_safeguard.model.snapshot import Snapshot
from vlm_safeguard.policy.policy import Policy
from vlm_safeguard.policy.receipt import Receipt

if TYPE_CHECKING:
    from transformers import PreTrainedModel


class ModelHooks:
    """One policy's, on one model.

    Attributes:
        backbone: the model's decoder.
        prompt: what `generate` was given, while it runs.
        turns: whose turn it is to run the model.
        peers: other processes that run it together with this one.
        receipts: of the latest batch that was read.
        own: `receipts` of the latest batch that each thread read.
    """

    def __init__(
        self,
        policy: Policy,
        model: PreTrainedModel,
        backbone: Backbone,
        peers: Peers,
        readings: TextReadings | None,
    ) -> None:
        """Of a policy that is sound and for this model; none are on yet."""
        self._policy = policy
        self._sha256 = policy.sha256()
        self._model = model
        self.backbone = backbone
        self._placed = (backbone.device, model.dtype)
        self._directions = policy.directions.to(backbone.device)
        self._subspaces = policy.subspaces(*self._placed)
        self._layers = LayerHooks(backbone)
        discriminant = policy.discriminant
        self._reader = TextReader(
            policy,
            backbone,
            self._layers,
            self._directions,
            self._subspaces,
            None if discriminant is None else discriminant.to(backbone.device),
            readings,
        )
        self._forward_signature = signature(model.forward)
        self._handles: list[Any] = []
        self._snapshot: Snapshot | None = None  # while they are on
        self._pass: Editing | None = None  # where there is something to do
        self._continuing: WeakKeyDictionary[Any, Batch] = WeakKeyDictionary()
        self.turns = Turns()
        self.peers = peers
        self.prompt: Prompt | None = None
        self.receipts: list[Receipt] = []
        self.own = local()

    def verify(self) -> None:
        """Prove that hooks on the layers act.

        Raises:
            SafeguardError: they do not act, or not on whole states.
        """
        self.peers.check_whole(self._layers, self._policy.watched)
        verify(self._model, self.backbone, self._layers, self._policy, self._directions)

    def put_on(self) -> None:
        """Watch every pass, and the model itself, from here on."""
        self._snapshot = Snapshot(self._model)
        model, decoder = self._model, self.backbone.decoder
        self._handles = [
            model.register_forward_pre_hook(self._before_model, with_kwargs=True),
            model.register_forward_hook(self._after_model, always_call=True),
            decoder.register_forward_pre_hook(self._before_decoder),
        ]

    def take_off(self) -> None:
        """Leave the model as it was; requests that are being answered are forgotten."""
        self._layers.disarm()
        for handle in self._handles:
            handle.remove()
        self._handles, self._snapshot = [], None
        self._pass = self.prompt = None
        self._continuing.clear()
        self._reader.starts.clear()

    def __deepcopy__(self, memo: dict[int, Any]) -> Self:
        """A copied module carries the same hooks, so it does not run unguarded."""
        return self

    @property
    def are_on(self) -> bool:
        """Whether passes are watched."""
        return bool(self._handles)

    @property
    def edit_an_opening(self) -> bool:
        """Whether the next pass edits an answer's opening, by hooks on layers."""
        return self.prompt is not None and self.prompt.opening is not None

    def check_unchanged(self) -> None:
        """Refuse a model that other code has changed since these were put on.

        Raises:
            SafeguardError: what changed.
        """
        check_unchanged(self._model, self.backbone, self._handles, self._placed)
        self.check_weights()

    def check_weights(self) -> None:
        """Refuse a model whose parts, weights or adapters changed, while these are on.

        Raises:
            SafeguardError: what changed.
        """
        if self._snapshot is not None:
            self._snapshot.check()

    def prepare(self, written: torch.Tensor, new: int | None) -> None:
        """Take note of what is written, before the pass of `generate` over its last `new` tokens.

        Raises:
            SafeguardError: processes that run the model together wrote different tokens.
        """
        if self.prompt is not None:
            self.peers.check_agree("the tokens that they wrote", written)
            self.prompt.prepare(written, new)

    def _check_adapters(self) -> None:
        if self._snapshot is not None and not torch.compiler.is_compiling():
            self._snapshot.check_adapters()

    def _before_decoder(self, module: torch.nn.Module, args: Any) -> None:
        if not self._layers.in_pass:
            raise SafeguardError(
                "The decoder ran outside the guarded model. Call the model itself, not one of "
                "its parts, while a guard is attached."
            )

    def _before_model(self, module: torch.nn.Module, args: Any, kwargs: dict[str, Any]) -> None:
        if not torch.compiler.is_compiling():  # then it is a `generate`, whose turn it is already
            self.turns.take(lambda: self.are_on)
        self.turns.check_may_go_on()
        if self._layers.in_pass:
            raise SafeguardError("The guarded model was called while it was already running.")
        current = self._locate(args, kwargs)
        if current is None:
            self._pass = None
            self._layers.arm()
        else:
            self._pass = Editing(self._policy, self._directions, self._subspaces, current)
            self._layers.arm(self._pass.layers, self._pass)

    def _locate(self, args: Any, kwargs: dict[str, Any]) -> Pass | None:
        """The pass that begins now; None where nothing is to be done in it."""
        if self.prompt is not None and self.prompt.answering:
            ids = kwargs.get("input_ids")
            if ids is not None and ids.shape[1] < self.prompt.ids.shape[1]:
                self._check_adapters()
                return self.prompt.answer(ids)
        self.check_unchanged()
        inputs = self._forward_signature.bind_partial(*args, **kwargs).arguments
        inputs.update(inputs.pop("kwargs", {}))
        cache = cache_in(inputs)
        cached = int(cache.get_seq_length()) if cache is not None else 0
        ids, mask = inputs.get("input_ids"), inputs.get("attention_mask")
        if ids is None:
            raise SafeguardError(
                "The guarded model was called without input_ids (with inputs_embeds?): its "
                "text-only view cannot be known, so nothing is generated."
            )
        if self.prompt is not None:
            return self.prompt.locate(ids, mask, cached, self._read)
        if cached:
            self.peers.check_agree("the tokens that they were given", ids)
            return one_more_token(self._continuing.get(cache), ids)
        current = whole_prompt(ids, mask, self._read)
        _check_answers_beside(self._policy, current.batch, self.prompt)
        if cache is not None:
            self._continuing[cache] = current.batch
        return current

    def decide(self, prompt: Prompt) -> Batch:
        """What is decided on a prompt by its text, before any pass over its images.

        Raises:
            SafeguardError: it cannot be judged.
        """
        if prompt.mask is None and len(prompt.ids) > 1:
            raise SafeguardError("Pass attention_mask to generate: the guard needs it.")
        return prompt.decide(self._read)

    def note(self, batch: Batch) -> None:
        """Keep the receipts of the latest batch."""
        self.receipts = self.own.receipts = batch.receipts(self._sha256)

    @torch.no_grad()
    def _read(self, ids: torch.Tensor, mask: torch.Tensor | None) -> Batch:
        """Read a batch of prompts: text-only views, decisions, and reference coordinates."""
        self.peers.check_agree("the requests that they were given", ids, mask)
        batch = Batch.read(self._policy, ids, mask)
        if batch.editable.any() and self._policy.needs_text:
            self._reader.ask(batch)
        self._check_decision(batch)
        return batch

    def _check_decision(self, batch: Batch) -> None:
        self.peers.check_agree("what they decided", batch.decision.is_open)

    def _after_model(self, module: torch.nn.Module, args: Any, output: Any) -> None:
        if torch.compiler.is_compiling():
            self._check_pass(output)
            return
        if not self.turns.mine:
            return  # it did not get its turn; the error is on its way
        try:
            self._check_pass(output)
        finally:
            self.turns.give()

    def _check_pass(self, output: Any) -> None:
        """Refuse a pass that was not guarded to its end; take off its hooks."""
        current, self._pass = self._pass, None
        in_pass = self._layers.in_pass
        try:
            if output is None:
                return  # the pass failed; the error is on its way
            if not in_pass:
                raise SafeguardError(
                    "The guarded model was called while it was already running, so this pass was "
                    "not guarded to its end."
                )
            self._layers.check_all_took_part(() if current is None else current.layers, "this pass")
        finally:
            self._layers.disarm()
        if current is not None:
            self._finish(current, cache_in(output))

    def _finish(self, editing: Editing, cache: Any) -> None:
        """Take note of a pass that is over."""
        editing.check_finite()
        batch = editing.current.batch
        if not editing.current.reads_end or batch.finished:
            return
        self._check_decision(batch)
        batch.finished = True
        if cache is not None and self.prompt is not None:
            self.prompt.answering = True
        elif cache is not None:
            self._continuing[cache] = batch
        if self.prompt is None or self.prompt.noted:
            self.note(batch)
        _check_answers_beside(self._policy, batch, self.prompt)


def _check_answers_beside(policy: Policy, batch: Batch, prompt: Prompt | None) -> None:
    """Leave passes beside images whose answers nobody is to read.

    Args:
        prompt: what `generate` was given, if it makes the pass.

    Raises:
        SafeguardError: a plain `forward` of an open request that is not to be edited.
        Left: in `generate`, all requests are answered from their texts.
    """
    is_open = batch.decision.is_open.any(1)
    if policy.edits or not is_open.any():
        return
    if prompt is None:
        raise SafeguardError(
            "The gate is open, and a plain forward cannot answer a request from its text "
            "alone. Use generate, or a guard that edits: "
            "guard.variant(response=Response.EDIT)."
        )
    if is_open.all():
        raise Left
