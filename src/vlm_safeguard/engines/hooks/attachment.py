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

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from threading import Lock
from types import TracebackType
from typing import TYPE_CHECKING, Any, NamedTuple, Self
from weakref import WeakKeyDictionary

import torch

from vlm_safeguard.engines.hooks.door import (
    OTHER_DOORS,
    Door,
    named_options,
    open_prompt,
    preparing,
    reads_in_chunks,
    refuse_door,
    uncompiled_where,
)
from vlm_safeguard.engines.hooks.judgement import Judgement, check_text_suffices
from vlm_safeguard.engines.hooks.model import ModelHooks
from vlm_safeguard.engines.hooks.passes import Prompt
from vlm_safeguard.engines.hooks.peers import Peers
from vlm_safeguard.engines.hooks.responder import Responder
from vlm_safeguard.engines.hooks.text_passes import TextReadings
from vlm_safeguard.errors import SafeguardError
from vlm_safeguard.model.backbone import Backbone
from vlm_safeguard.model.run_state import run_state_aside
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

    Attributes:
        policy: what decides and acts.

    Raises:
        SafeguardError: on entering, if the hooks cannot be shown to act; while attached, whenever
            a pass cannot be guarded. No token is generated then.
    """

    def __init__(
        self,
        policy: Policy,
        model: PreTrainedModel,
        check_fits: Callable[[Backbone], None],
        check_behaves: Callable[[Backbone], None],
        readings: TextReadings | None = None,
        *,
        wait: bool = False,
    ) -> None:
        """Of a policy, for a model that both checks let through.

        Args:
            check_fits: of what the model is made of.
            check_behaves: of what its passes give.
            wait: whether leaving the block waits for other threads' runs instead of stopping them.
        """
        self.policy = policy
        self._model = model
        self._check_fits = check_fits
        self._check_behaves = check_behaves
        self._readings = readings
        self._wait = wait
        self._door = Door(model)
        self._hooks: ModelHooks | None = None  # since it was first entered

    @property
    def receipts(self) -> list[Receipt]:
        """Of each row of the latest batch that this thread read; of any, where it read none."""
        if self._hooks is None:
            return []
        return list(getattr(self._hooks.own, "receipts", self._hooks.receipts))

    def generate(self, *args: Any, **options: Any) -> GuardedOutput:
        """The model's guarded `generate`, with the receipts of this very call.

        Raises:
            SafeguardError: it cannot be guarded; nothing is generated.
        """
        output = self._generate(*args, **options)
        return GuardedOutput(output, self.receipts)

    def judge(self, *args: Any, **options: Any) -> list[Judgement]:
        """What `generate` would decide on the same requests: their texts are read, and no more.

        Images may be left out of what is given, but not their tokens.

        Raises:
            SafeguardError: they cannot be judged, or not without a pass over their images.
        """
        check_text_suffices(self.policy)
        with self._turn() as hooks:
            _, prompt = hooks.peers.refuse_together(self._let_in, hooks, args, options)
            batch = hooks.decide(prompt)
            hooks.note(batch)
            hooks.peers.refuse_together(hooks.check_weights)
            return Judgement.of(batch, hooks.receipts)

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Let other threads run the model between two tokens of this thread's `generate`.

        For functions of the caller's that `generate` calls, a stopping criterion say. The run goes
        on under its own decisions, as if nothing had been.

        Raises:
            SafeguardError: this thread is in no `generate`, or the guard came off meanwhile.
        """
        hooks = self._hooks
        if hooks is None or hooks.prompt is None or not hooks.turns.mine:
            raise SafeguardError("There is no guarded generate of this thread to be paused.")
        prompt, hooks.prompt = hooks.prompt, None
        try:
            with run_state_aside(self._model):
                hooks.turns.give()
                try:
                    yield
                finally:
                    hooks.turns.take()
        finally:
            hooks.prompt = prompt
        if not hooks.are_on:
            raise SafeguardError(
                "The guard came off while this run was paused (its block was left), so nothing "
                "more is generated."
            )

    # --- on and off ---

    def __enter__(self) -> Self:
        model = self._model
        if self._hooks is not None and self._hooks.are_on:
            raise SafeguardError("This attachment is already in use; call guard.attach again.")
        if model.training:
            raise SafeguardError("The model is in training mode; call model.eval() first.")
        backbone = Backbone.of(model)
        check_sound(self.policy)
        peers = Peers(model, backbone)
        peers.refuse_together(self._check_fits, backbone)
        hooks = ModelHooks(self.policy, model, backbone, peers, self._readings)
        self._hooks = hooks
        with _ATTACHING:
            if model in _ATTACHED:
                raise SafeguardError(
                    "A guard is already attached to this model. Leave its `with` block first: two "
                    "guards at once would edit each other's edits."
                )
            _ATTACHED[model] = self
        try:
            hooks.verify()
            self._check_behaves(backbone)
            hooks.put_on()
            self._close_doors(hooks)
        except BaseException:
            self._remove(hooks)
            raise
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        hooks = self._hooks
        assert hooks is not None, "what is left was entered"
        hooks.turns.leaving = not self._wait
        hooks.turns.take()
        try:
            hooks.turns.leaving = True
            if hooks.prompt is None:  # else this is within a run, which takes the guard off itself
                self._remove(hooks)
        finally:
            hooks.turns.give()

    def _close_doors(self, hooks: ModelHooks) -> None:
        """Let generation pass here only."""
        model = self._model
        prepare, compiled = model.prepare_inputs_for_generation, model.get_compiled_call
        self._inner_generate = model.generate
        self._door.replace("generate", self._generate)
        self._door.replace("prepare_inputs_for_generation", preparing(prepare, hooks.prepare))
        self._door.replace(
            "get_compiled_call", uncompiled_where(model, compiled, lambda: hooks.edit_an_opening)
        )
        for door in OTHER_DOORS:
            if hasattr(model, door):
                self._door.replace(door, refuse_door)

    def _remove(self, hooks: ModelHooks) -> None:
        hooks.take_off()
        self._door.restore()
        _ATTACHED.pop(self._model, None)

    def _generate(self, *args: Any, **options: Any) -> Any:
        """The model's own `generate`, which now knows what its prompt is."""
        with self._turn() as hooks:
            options, prompt = hooks.peers.refuse_together(self._let_in, hooks, args, options)
            hooks.prompt = prompt
            if self.policy.edit.span is Span.ANSWER or reads_in_chunks(self._model, options):
                options["disable_compile"] = True  # passes with hooks on layers are not compiled
            responder = Responder(self.policy, self._model, hooks, self._inner_generate)
            try:
                output = responder.respond(prompt, options)
            except BaseException:
                if (streamer := options.get("streamer")) is not None:
                    streamer.end()  # or whoever reads it would wait for ever
                raise
            finally:
                hooks.prompt = None
                if hooks.turns.leaving:
                    self._remove(hooks)
            if prompt.batch is None or not prompt.batch.finished:
                raise SafeguardError(
                    "generate returned without a pass in which the guard saw the prompt's end; its "
                    "output is withheld."
                )
            hooks.peers.refuse_together(hooks.check_weights)
            return output

    @contextmanager
    def _turn(self) -> Iterator[ModelHooks]:
        """This thread's turn to run the model.

        Raises:
            SafeguardError: the guard is not on, or the model is running in this thread already.
        """
        hooks = self._hooks
        if hooks is None:
            raise SafeguardError("The guard is not on yet: enter the `with` block of guard.attach.")
        hooks.turns.take(lambda: hooks.are_on)
        try:
            if hooks.prompt is not None:
                raise SafeguardError("The guarded model was called while it was already running.")
            yield hooks
        finally:
            hooks.turns.give()

    def _let_in(
        self, hooks: ModelHooks, args: tuple[Any, ...], options: dict[str, Any]
    ) -> tuple[dict[str, Any], Prompt]:
        """What `generate` was given, all by name, and its prompt."""
        hooks.check_unchanged()
        named = named_options(self._model, args, options)
        return named, open_prompt(self._model, named)
