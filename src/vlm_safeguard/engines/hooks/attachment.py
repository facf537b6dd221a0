"""A guard at work on a transformers model: verified, requests edited, everything off again.

Every forward pass is located in its prompt (`passes`). Then:

- before the first pass over a prompt, the request gets its text-only pass through the same
  decoder (`reader`), which decides the gate and measures the edit's reference coordinates;
- after each guarded layer, the rows whose gate is open are edited (`editing`); other rows are not
  touched;
- after the pass, it is checked that every guarded layer took part (`layers`).

Layers carry hooks only during passes that need them.
"""

from __future__ import annotations

from collections.abc import Callable
from inspect import signature
from threading import Lock, local
from types import TracebackType
from typing import TYPE_CHECKING, Any, NamedTuple, Self
from weakref import WeakKeyDictionary

import torch

from vlm_safeguard.engines.hooks.batch import Batch
from vlm_safeguard.engines.hooks.door import (
    OTHER_DOORS,
    Door,
    open_prompt,
    preparing,
    reads_in_chunks,
    refuse_door,
)
from vlm_safeguard.engines.hooks.editing import Editing
from vlm_safeguard.engines.hooks.layers import LayerHooks
from vlm_safeguard.engines.hooks.passes import Pass, Prompt, one_more_token, whole_prompt
from vlm_safeguard.engines.hooks.reader import TextReader, TextReadings
from vlm_safeguard.engines.hooks.turns import Turns
from vlm_safeguard.engines.hooks.unchanged import check_unchanged
from vlm_safeguard.engines.hooks.verification import verify
from vlm_safeguard.errors import SafeguardError
from vlm_safeguard.model.backbone import Backbone
from vlm_safeguard.policy.policy import Policy
from vlm_safeguard.policy.receipt import Receipt
from vlm_safeguard.policy.soundness import check_sound
from vlm_safeguard.policy.span import Span

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_ATTACHED: WeakKeyDictionary[torch.nn.Module, Attachment] = WeakKeyDictionary()
_ATTACHING = Lock()


class GuardedOutput(NamedTuple):
    """What one guarded `generate` gave.

    Attributes:
        output: as the model's own `generate` returns it.
        receipts: one for each row that was run, beams and returned sequences each.
    """

    output: Any
    receipts: list[Receipt]


class Attachment:
    """Context manager made by `Guard.attach`; see there.

    Threads take turns: a `generate` waits until another one's is over.

    Raises:
        SafeguardError: on entering, if the hooks cannot be shown to act; while attached, whenever
            a pass cannot be guarded. No token is generated then.
    """

    def __init__(
        self,
        policy: Policy,
        model: PreTrainedModel,
        check_fits: Callable[[Backbone], None],
        readings: TextReadings | None = None,
        *,
        wait: bool = False,
    ) -> None:
        """Of a policy, for a model that `check_fits` lets through.

        Args:
            wait: whether leaving the block waits for other threads' runs instead of stopping them.
        """
        self._policy = policy
        self._model = model
        self._check_fits = check_fits
        self._readings = readings
        self._wait = wait
        self._turns = Turns()
        self._door = Door(model)
        self._handles: list[Any] = []  # on the model and its decoder, as long as attached
        self._prompt: Prompt | None = None  # while `generate` runs
        self._pass: Editing | None = None  # where there is something to do
        self._continuing: WeakKeyDictionary[Any, Batch] = WeakKeyDictionary()
        self._latest: list[Receipt] = []
        self._local = local()  # `receipts` of the latest batch that this thread read

    @property
    def receipts(self) -> list[Receipt]:
        """Of each row of the latest batch that this thread read; of any, where it read none."""
        return list(getattr(self._local, "receipts", self._latest))

    def generate(self, *args: Any, **options: Any) -> GuardedOutput:
        """The model's guarded `generate`, with the receipts of this very call.

        Raises:
            SafeguardError: it cannot be guarded; nothing is generated.
        """
        self._local.receipts = []
        output = self._generate(*args, **options)
        return GuardedOutput(output, self.receipts)

    # --- on and off ---

    def __enter__(self) -> Self:
        model = self._model
        if self._handles:
            raise SafeguardError("This attachment is already in use; call guard.attach again.")
        if model.training:
            raise SafeguardError("The model is in training mode; call model.eval() first.")
        self._backbone = Backbone.of(model)
        self._placed = (self._backbone.device, model.dtype)
        self._check_fits(self._backbone)
        check_sound(self._policy)
        self._sha256 = self._policy.sha256()
        self._directions = self._policy.directions.to(self._backbone.device)
        self._subspaces = self._policy.subspaces(*self._placed)
        self._hooks = LayerHooks(self._backbone)
        self._reader = TextReader(
            self._policy,
            self._backbone,
            self._hooks,
            self._directions,
            self._subspaces,
            self._readings,
        )
        self._forward_signature = signature(model.forward)
        with _ATTACHING:
            if model in _ATTACHED:
                raise SafeguardError(
                    "A guard is already attached to this model. Leave its `with` block first: two "
                    "guards at once would edit each other's edits."
                )
            _ATTACHED[model] = self
        self._turns = Turns()
        try:
            verify(model, self._backbone, self._hooks, self._policy, self._directions)
            keep = self._handles.append
            keep(model.register_forward_pre_hook(self._before_model, with_kwargs=True))
            keep(model.register_forward_hook(self._after_model, always_call=True))
            keep(self._backbone.decoder.register_forward_pre_hook(self._before_decoder))
            self._inner_generate = model.generate
            self._inner_compiled_call = model.get_compiled_call
            prepare = model.prepare_inputs_for_generation
            self._door.replace("generate", self._generate)
            self._door.replace(
                "prepare_inputs_for_generation", preparing(prepare, lambda: self._prompt)
            )
            self._door.replace("get_compiled_call", self._compiled_unless_edited)
            for door in OTHER_DOORS:
                if hasattr(model, door):
                    self._door.replace(door, refuse_door)
        except BaseException:
            self._remove()
            raise
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._turns.leaving = not self._wait
        self._turns.take()
        try:
            self._turns.leaving = True
            if self._prompt is None:  # else this is within a run, which takes the guard off itself
                self._remove()
        finally:
            self._turns.give()

    def _remove(self) -> None:
        self._hooks.disarm()
        for handle in self._handles:
            handle.remove()
        self._handles = []
        self._door.restore()
        self._pass = self._prompt = None
        self._continuing.clear()
        _ATTACHED.pop(self._model, None)

    # --- around `generate` ---

    def _generate(self, *args: Any, **options: Any) -> Any:
        """The model's own `generate`, which now knows what its prompt is."""
        self._turns.take(lambda: bool(self._handles))
        try:
            if self._prompt is not None:
                raise SafeguardError("The guarded model was called while it was already running.")
            self._check_unchanged()
            prompt = self._prompt = open_prompt(self._model, args, options)
            if self._policy.edit.span is Span.ANSWER or reads_in_chunks(self._model, options):
                options["disable_compile"] = True  # passes with hooks on layers are not compiled
            try:
                output = self._inner_generate(*args, **options)
            except BaseException:
                if (streamer := options.get("streamer")) is not None:
                    streamer.end()  # or whoever reads it would wait for ever
                raise
            finally:
                self._prompt = None
                if self._turns.leaving:
                    self._remove()
            if prompt.batch is None or not prompt.batch.finished:
                raise SafeguardError(
                    "generate returned without a pass in which the guard saw the prompt's end; its "
                    "output is withheld."
                )
            return output
        finally:
            self._turns.give()

    def _compiled_unless_edited(self, *args: Any, **options: Any) -> Any:
        """The model's compiled call; passes over an answer's edited opening carry hooks."""
        compiled = self._inner_compiled_call(*args, **options)

        def call(*inputs: Any, **named: Any) -> Any:
            edits = self._prompt is not None and self._prompt.opening is not None
            return (self._model if edits else compiled)(*inputs, **named)

        return call

    def _check_unchanged(self) -> None:
        check_unchanged(self._model, self._backbone, self._handles, self._placed)

    # --- around a pass ---

    def _before_decoder(self, module: torch.nn.Module, args: Any) -> None:
        if not self._hooks.in_pass:
            raise SafeguardError(
                "The decoder ran outside the guarded model. Call the model itself, not one of "
                "its parts, while a guard is attached."
            )

    def _before_model(self, module: torch.nn.Module, args: Any, kwargs: dict[str, Any]) -> None:
        if not torch.compiler.is_compiling():  # then it is a `generate`, whose turn it is already
            self._turns.take(lambda: bool(self._handles))
        self._turns.check_may_go_on()
        if self._hooks.in_pass:
            raise SafeguardError("The guarded model was called while it was already running.")
        current = self._locate(args, kwargs)
        if current is None:
            self._pass = None
            self._hooks.arm()
        else:
            self._pass = Editing(self._policy, self._directions, self._subspaces, current)
            self._hooks.arm(self._pass.layers, self._pass)

    def _locate(self, args: Any, kwargs: dict[str, Any]) -> Pass | None:
        """The pass that begins now; None where nothing is to be done in it."""
        if self._prompt is not None and self._prompt.answering:
            ids = kwargs.get("input_ids")
            if ids is not None and ids.shape[1] < self._prompt.ids.shape[1]:
                return self._prompt.answer(ids)
        self._check_unchanged()
        inputs = self._forward_signature.bind_partial(*args, **kwargs).arguments
        inputs.update(inputs.pop("kwargs", {}))
        cache = inputs.get("past_key_values")
        cached = int(cache.get_seq_length()) if cache is not None else 0
        ids, mask = inputs.get("input_ids"), inputs.get("attention_mask")
        if ids is None:
            raise SafeguardError(
                "The guarded model was called without input_ids (with inputs_embeds?): its "
                "text-only view cannot be known, so nothing is generated."
            )
        if self._prompt is not None:
            return self._prompt.locate(ids, mask, cached, self._read)
        if cached:
            return one_more_token(self._continuing.get(cache), ids)
        current = whole_prompt(ids, mask, self._read)
        if cache is not None:
            self._continuing[cache] = current.batch
        return current

    @torch.no_grad()
    def _read(self, ids: torch.Tensor, mask: torch.Tensor | None) -> Batch:
        """Read a batch of prompts: text-only views, decisions, and reference coordinates."""
        if not self._backbone.in_place():
            raise SafeguardError(
                "The model's decoder or a layer was replaced after attaching, so nothing is "
                "generated. Attach again."
            )
        batch = Batch.read(self._policy, ids, mask)
        if batch.editable.any() and self._policy.needs_text:
            self._reader.ask(batch)
        return batch

    def _after_model(self, module: torch.nn.Module, args: Any, output: Any) -> None:
        if torch.compiler.is_compiling():
            self._check_pass(output)
            return
        if not self._turns.mine:
            return  # it did not get its turn; the error is on its way
        try:
            self._check_pass(output)
        finally:
            self._turns.give()

    def _check_pass(self, output: Any) -> None:
        """Refuse a pass that was not guarded to its end; take off its hooks."""
        current, self._pass = self._pass, None
        in_pass = self._hooks.in_pass
        try:
            if output is None:
                return  # the pass failed; the error is on its way
            if not in_pass:
                raise SafeguardError(
                    "The guarded model was called while it was already running, so this pass was "
                    "not guarded to its end."
                )
            self._hooks.check_all_took_part(() if current is None else current.layers, "this pass")
        finally:
            self._hooks.disarm()
        if current is not None:
            self._finish(current, getattr(output, "past_key_values", None))

    def _finish(self, editing: Editing, cache: Any) -> None:
        """Take note of a pass that is over."""
        editing.check_finite()
        batch = editing.current.batch
        if not editing.current.reads_end or batch.finished:
            return
        batch.finished = True
        if cache is not None and self._prompt is not None:
            self._prompt.answering = True
        elif cache is not None:
            self._continuing[cache] = batch
        self._latest = self._local.receipts = batch.receipts(self._sha256)
