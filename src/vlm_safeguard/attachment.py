"""A guard at work on a model: verified, requests edited, everything off again.

Every forward pass is located in its prompt (`passes`). Then:

- before the first pass over a prompt, the request gets its text-only pass through the same
  decoder, which decides the gate and measures the edit's reference coordinates;
- after each guarded layer, the rows whose gate is open are edited at the prompt's tokens that the
  edit spans, at the answer's for as long as it opens as the model's refusals do, and if the guard
  holds at all of them; other rows are not touched;
- after the pass, it is checked that every guarded layer took part.

Layers carry hooks only during passes that need them.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import wraps
from inspect import signature
from math import isfinite
from types import TracebackType
from typing import TYPE_CHECKING, Any, Never, Self
from weakref import WeakKeyDictionary

import torch

from vlm_safeguard.errors import SafeguardError
from vlm_safeguard.model.activations import hidden_states, with_hidden_states
from vlm_safeguard.model.backbone import Backbone
from vlm_safeguard.passes import Pass, Prompt, one_more_token, whole_prompt
from vlm_safeguard.policy.edits import Reference
from vlm_safeguard.policy.gate import CalibratedGate
from vlm_safeguard.policy.receipt import Receipt
from vlm_safeguard.refusal import refusal_margin, words_margin
from vlm_safeguard.request_batch import RequestBatch, TextReadings

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from vlm_safeguard.guard import Guard

_ATTACHED: WeakKeyDictionary[torch.nn.Module, Attachment] = WeakKeyDictionary()
_FROM_THE_HUB = "a way of decoding that transformers takes from a Hub repository"
#: Options of `generate` whose passes cannot be located in the prompt, and what they are.
_UNSUPPORTED = {
    "custom_generate": "a decoding loop of your own",
    "assistant_early_exit": "drafting with a part of the guarded model itself",
    "guidance_scale": "guidance by a second prompt, which is not the request",
    "penalty_alpha": _FROM_THE_HUB,
    "dola_layers": _FROM_THE_HUB,
    "num_beam_groups": _FROM_THE_HUB,
    "constraints": _FROM_THE_HUB,
    "force_words_ids": _FROM_THE_HUB,
}
#: Other doors to generation, which do not pass through `generate`.
_OTHER_DOORS = (
    "generate_batch",
    "init_continuous_batching",
    "continuous_batching_context_manager",
)
_CANARY_NOISE = 100  # a canary's effect must be this many times what equal rows differ by


@dataclass(frozen=True)
class _EditHere:
    """What one layer edits in one pass: (n,) rows, positions and whether last, and the aim."""

    rows: torch.Tensor
    positions: torch.Tensor
    last: torch.Tensor
    at: Reference


class Attachment:
    """Context manager made by `Guard.attach`; see there.

    Raises:
        SafeguardError: on entering, if the hooks cannot be shown to act; while attached, whenever
            a pass cannot be guarded. No token is generated then.
    """

    def __init__(
        self, guard: Guard, model: PreTrainedModel, readings: TextReadings | None = None
    ) -> None:
        self._guard = guard
        self._model = model
        self._shared_readings = readings
        self._handles: list[Any] = []  # on the model and its decoder, as long as attached
        self._layer_handles: list[Any] = []  # on layers, during a pass
        self._armed: list[int] = []  # those layers
        self._mode: str | None = None  # None, "text", "canary" or "guard"
        self._fired: list[int] = []
        self._finite: list[torch.Tensor] = []  # of each edit in a pass, whether it is
        self._text_states: dict[int, torch.Tensor] = {}
        self._prompt: Prompt | None = None  # while `generate` runs
        self._pass: Pass | None = None  # the current one, where there is something to do
        # layer → what it edits in the current pass; None until the first one asks
        self._edits: dict[int, _EditHere] | None = None
        self._continuing: WeakKeyDictionary[Any, RequestBatch] = WeakKeyDictionary()
        self._replaced: dict[str, Any] = {}

    # --- on and off ---

    def __enter__(self) -> Self:
        guard, model = self._guard, self._model
        if self._handles:
            raise SafeguardError("This attachment is already in use; call guard.attach again.")
        if model in _ATTACHED:
            raise SafeguardError(
                "A guard is already attached to this model. Leave its `with` block first: two "
                "guards at once would edit each other's edits."
            )
        if model.training:
            raise SafeguardError("The model is in training mode; call model.eval() first.")
        self._backbone = Backbone.of(model)
        self._placed = (self._backbone.device, model.dtype)
        guard.check_fits(self._backbone)
        guard.check_sound()
        dtype = torch.float64 if model.dtype == torch.float64 else torch.float32
        device = self._backbone.device
        self._directions = guard.directions.to(device)
        basis = guard.basis().to(device, dtype)
        self._basis = {layer: basis[layer, : guard.rank] for layer in guard.layers}
        harmful, drift = (x.to(device, dtype) for x in (guard.directions.harmful_mean, guard.drift))
        self._harmful = {n: self._basis[n] @ harmful[n] for n in guard.layers}
        self._drift = {n: self._basis[n] @ drift[n] for n in guard.layers}
        self._watched = sorted({*guard.layers, *guard.gate.watched})
        self._layers = {layer: self._backbone.layers[layer] for layer in self._watched}
        self._forward_signature = signature(model.forward)
        self._inner_generate = model.generate
        self._inner_compiled_call = model.get_compiled_call
        _ATTACHED[model] = self
        try:
            keep = self._handles.append
            keep(model.register_forward_pre_hook(self._before_model, with_kwargs=True))
            keep(model.register_forward_hook(self._after_model, always_call=True))
            keep(self._backbone.decoder.register_forward_pre_hook(self._before_decoder))
            self._replace("generate", self._generate)
            self._replace("prepare_inputs_for_generation", self._preparing())
            self._replace("get_compiled_call", self._compiled_unless_edited)
            for door in _OTHER_DOORS:
                if hasattr(model, door):
                    self._replace(door, self._refuse_door)
            self._verify()
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
        self._remove()

    def _replace(self, name: str, function: Any) -> None:
        """Set an attribute of the model itself; `_remove` brings back what was there."""
        self._replaced[name] = vars(self._model).get(name)
        setattr(self._model, name, function)

    def _remove(self) -> None:
        self._disarm()
        for handle in self._handles:
            handle.remove()
        self._handles = []
        for name, before in self._replaced.items():
            vars(self._model).pop(name, None)
            if before is not None:
                setattr(self._model, name, before)
        self._replaced = {}
        self._mode = self._pass = self._prompt = None
        self._continuing.clear()
        self._text_states = {}
        _ATTACHED.pop(self._model, None)

    def _arm(self, layers: list[int]) -> None:
        """Hook these layers, for one pass."""
        self._disarm()
        for layer in layers:
            handle = self._layers[layer].register_forward_hook(
                self._layer_hook(layer),
                prepend=True,  # whoever else looks sees the edited state
            )
            self._layer_handles.append(handle)
        self._armed, self._fired, self._finite = layers, [], []

    def _disarm(self) -> None:
        for handle in self._layer_handles:
            handle.remove()
        self._layer_handles, self._armed, self._fired, self._finite = [], [], [], []
        self._edits = None

    @torch.no_grad()
    def _verify(self) -> None:
        """One pass that proves every guarded layer's hook acts on the logits.

        All rows are alike; row 2 + i is pushed at the i-th watched layer only, so each row that
        differs from row 0 proves one hook. Rows 0 and 1 tell how much equal rows differ anyway.
        """
        vocabulary = self._model.get_input_embeddings().weight.shape[0]
        token = next(i for i in range(3, vocabulary) if i not in self._backbone.placeholder_ids)
        ids = torch.full((2 + len(self._watched), 2), token, device=self._backbone.device)
        self._mode = "canary"
        self._arm(self._watched)
        keep = (
            {"logits_to_keep": 1} if "logits_to_keep" in self._forward_signature.parameters else {}
        )
        logits = self._model(
            input_ids=ids, attention_mask=torch.ones_like(ids), use_cache=False, **keep
        ).logits[:, -1]
        effect = (logits - logits[0]).float().abs().amax(-1)
        noise = effect[1] * _CANARY_NOISE + torch.finfo(logits.dtype).tiny
        silent = [
            layer
            for layer, moved in zip(self._watched, effect[2:] > noise, strict=True)
            if not moved
        ]
        if silent or not torch.isfinite(effect).all():
            raise SafeguardError(
                f"The guard's hooks on layers {silent or self._watched} of "
                f"{self._backbone.decoder_path} do not act on the model's output, so it was not "
                "attached and nothing is generated."
            )

    # --- around the model ---

    def _generate(self, *args: Any, **kwargs: Any) -> Any:
        """The model's own `generate`, which now knows what its prompt is."""
        config = kwargs.get("generation_config") or self._model.generation_config
        for name, what in _UNSUPPORTED.items():
            if kwargs.get(name, getattr(config, name, None)) not in (None, 0, 1):
                raise SafeguardError(
                    f"generate({name}=…) is {what}, which the guard does not support. Leave it "
                    "out; nothing was generated."
                )
        if self._prompt is not None:
            raise SafeguardError("The guarded model was called while it was already running.")
        self._check_unchanged()
        ids = kwargs.get("input_ids", kwargs.get("inputs", args[0] if args else None))
        if kwargs.get("inputs_embeds") is not None or not isinstance(ids, torch.Tensor):
            raise SafeguardError(
                "generate was called without input_ids, or with inputs_embeds: the text-only "
                "view of the request cannot be known, so nothing is generated."
            )
        mask = kwargs.get("attention_mask")
        if mask is not None and mask.shape != ids.shape:
            raise SafeguardError(
                f"generate was given {ids.shape[-1]} tokens and an attention_mask for "
                f"{mask.shape[-1]}. Give it the whole conversation's tokens, also where a cache "
                "already holds some: the guard judges the whole."
            )
        prompt = self._prompt = Prompt(ids, mask, self._guard.hold)
        chunks = kwargs.get("prefill_chunk_size", getattr(config, "prefill_chunk_size", None))
        if self._guard.hold or chunks is not None:
            kwargs["disable_compile"] = True  # passes with hooks on layers are not compiled
        try:
            output = self._inner_generate(*args, **kwargs)
        finally:
            self._prompt = None
        if prompt.requests is None or not prompt.requests.finished:
            raise SafeguardError(
                "generate returned without a pass in which the guard saw the prompt's end; its "
                "output is withheld."
            )
        return output

    def _preparing(self) -> Any:
        """The model's preparation of a pass of `generate`, which is told all that is written."""
        prepare = self._model.prepare_inputs_for_generation

        @wraps(prepare)  # generate reads its signature
        def preparing(input_ids: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
            inputs = prepare(input_ids, *args, **kwargs)
            if self._prompt is not None:
                ids = inputs.get("input_ids")
                self._prompt.prepare(input_ids, None if ids is None else ids.shape[1])
            return inputs

        return preparing

    def _compiled_unless_edited(self, *args: Any, **kwargs: Any) -> Any:
        """The model's compiled call; passes over an answer's edited opening carry hooks."""
        compiled = self._inner_compiled_call(*args, **kwargs)

        def call(*given: Any, **named: Any) -> Any:
            edits = self._prompt is not None and self._prompt.opening is not None
            return (self._model if edits else compiled)(*given, **named)

        return call

    def _refuse_door(self, *args: Any, **kwargs: Any) -> Never:
        raise SafeguardError(
            "Continuous batching does not pass through the model's own forward, so the guard "
            "cannot act there. Use generate; nothing was generated."
        )

    def _check_unchanged(self) -> None:
        """Refuse a model that other code has changed since it was attached to."""
        there = {
            *self._model._forward_pre_hooks,
            *self._model._forward_hooks,
            *self._backbone.decoder._forward_pre_hooks,
        }
        if not self._handles or not {handle.id for handle in self._handles} <= there:
            raise SafeguardError(
                "The guard's hooks on the model are gone (its block was left, or they were "
                "removed by other code), so nothing is generated. Attach again."
            )
        if self._model.training or self._backbone.decoder.training:
            raise SafeguardError("The model is in training mode; call model.eval() first.")
        if (self._backbone.device, self._model.dtype) != self._placed:
            raise SafeguardError(
                "The model was moved or cast after attaching, so nothing is generated. Attach "
                "again."
            )

    def _before_decoder(self, module: torch.nn.Module, args: Any) -> None:
        if self._mode is None:
            raise SafeguardError(
                "The decoder ran outside the guarded model. Call the model itself, not one of "
                "its parts, while a guard is attached."
            )

    def _before_model(self, module: torch.nn.Module, args: Any, kwargs: dict[str, Any]) -> None:
        if self._mode == "canary":
            return
        if self._mode is not None:
            raise SafeguardError("The guarded model was called while it was already running.")
        if self._prompt is not None and self._prompt.answering:
            ids = kwargs.get("input_ids")
            if ids is not None and ids.shape[1] < self._prompt.ids.shape[1]:
                self._pass = self._prompt.answer(ids)
                self._mode = "guard"
                if self._pass is not None:
                    self._arm(self._needed(self._pass))
                return
        self._check_unchanged()
        given = self._forward_signature.bind_partial(*args, **kwargs)
        given.arguments.update(given.arguments.pop("kwargs", {}))
        inputs = given.arguments
        cache = inputs.get("past_key_values")
        cached = int(cache.get_seq_length()) if cache is not None else 0
        ids, mask = inputs.get("input_ids"), inputs.get("attention_mask")
        if ids is None:
            raise SafeguardError(
                "The guarded model was called without input_ids (with inputs_embeds?): its "
                "text-only view cannot be known, so nothing is generated."
            )
        if self._prompt is not None:
            self._pass = self._prompt.locate(ids, mask, cached, self._begin)
        elif cached:
            known = self._continuing.get(cache)
            self._pass = one_more_token(known, ids, hold=self._guard.hold)
        else:
            self._pass = whole_prompt(ids, mask, self._begin)
            if cache is not None:
                self._continuing[cache] = self._pass.requests
        if self._pass is not None:
            self._arm(self._needed(self._pass))
        self._mode = "guard"

    def _after_model(self, module: torch.nn.Module, args: Any, output: Any) -> None:
        mode, self._mode = self._mode, None
        this, self._pass = self._pass, None
        armed, fired, finite = self._armed, self._fired, self._finite
        self._disarm()
        if output is None:
            return  # the pass failed; the error is on its way
        if mode is None:
            raise SafeguardError(
                "The guarded model was called while it was already running, so this pass was not "
                "guarded to its end."
            )
        _check_all_took_part(armed, fired, "this pass")
        if not _all_true(finite):
            raise SafeguardError(
                "An edit in this pass gave a state that is not finite; nothing more is generated."
            )
        if mode == "guard" and this is not None and this.reads_end and not this.requests.finished:
            requests = this.requests
            requests.finished = True
            cache = getattr(output, "past_key_values", None)
            if cache is not None and self._prompt is not None:
                self._prompt.answering = True
            elif cache is not None:
                self._continuing[cache] = requests
            self._guard._keep_receipts(self._make_receipts(requests))

    def _needed(self, this: Pass) -> list[int]:
        """The layers that have to be hooked in a pass: none where nothing is to be done."""
        requests = this.requests
        image_layer = getattr(self._guard.gate, "image_layer", None)
        looks = this.reads_end and not requests.settled and bool(requests.editable.any())
        if image_layer is not None and looks:
            return sorted({*self._guard.layers, image_layer})
        return list(self._guard.layers) if requests.is_open.any() else []

    # --- a new request ---

    @torch.no_grad()
    def _begin(self, ids: torch.Tensor, mask: torch.Tensor | None) -> RequestBatch:
        """Read a batch of prompts: text-only views, gates, and reference coordinates."""
        guard = self._guard
        if not self._backbone.in_place():
            raise SafeguardError(
                "The model's decoder or a layer was replaced after attaching, so nothing is "
                "generated. Attach again."
            )
        requests = RequestBatch.read(
            ids,
            mask,
            view=guard.text_view,
            edit=guard.edit,
            layers=len(guard.layers),
            opening=guard.opening,
            follows=guard.edit.span == "request" and not guard.hold,
        )
        if requests.editable.any() and (guard.edit.needs_text or guard.gate.needs_text):
            self._ask_without_images(requests)
        return requests

    def _ask_without_images(self, requests: RequestBatch) -> None:
        """The text-only pass: each different text of an editable row once."""
        guard, texts = self._guard, requests.texts
        asked = requests.editable.nonzero()[:, 0].tolist()
        place = {text: i for i, text in enumerate(dict.fromkeys(texts[row] for row in asked))}
        readings = TextReadings() if self._shared_readings is None else self._shared_readings
        opening = requests.opening
        if unread := readings.missing(place, opening, self._watched):
            self._read_texts(unread, opening, readings)
        final = torch.stack([readings.final[text + opening] for text in place])  # text, opening
        states = {
            layer: torch.stack(
                [readings.states[text + opening][layer][len(text) - 1] for text in place]
            )
            for layer in self._watched
        }
        if not _all_true([torch.isfinite(values).all() for values in (final, *states.values())]):
            raise SafeguardError(
                "The text-only pass gave states that are not finite; the request cannot be "
                "judged, so nothing is generated."
            )
        of_row = torch.tensor([place[texts[row]] for row in asked], device=final.device)
        rows = torch.tensor(asked)
        different = dict.fromkeys(texts)  # in the order that the places count tokens in
        for layer in guard.layers:
            basis = self._basis[layer]
            requests.text[layer] = torch.cat(
                [
                    readings.states[text + opening][layer].to(basis.dtype) @ basis.mT
                    if text in place
                    else basis.new_zeros(len(text + opening), guard.rank)
                    for text in different
                ]
            )
        if guard.gate.needs_text:
            is_open, scores = guard.gate.text_open(states, self._directions, guard.layers)
            values = scores.tolist()
            if not all(map(isfinite, values)):
                raise SafeguardError(
                    "The text-only pass gave a score that is not a number; the request cannot be "
                    "judged, so nothing is generated."
                )
            requests.is_open[rows] = is_open[of_row].cpu()
            for row in asked:
                requests.facts[row]["text_score"] = values[place[texts[row]]]
        if isinstance(guard.gate, CalibratedGate) and guard.gate.refusal_tokens:
            odds = refusal_margin(self._backbone, final[:, 0], guard.gate.refusal_tokens)
            words = words_margin(self._backbone, final, opening, odds)
            if not torch.isfinite(torch.cat([odds, words])).all():
                raise SafeguardError(
                    "The text-only pass gave no probabilities; the request cannot be judged, so "
                    "nothing is generated."
                )
            for row in asked:
                facts, here = requests.facts[row], place[texts[row]]
                margin, word = float(odds[here]), float(words[here])
                facts["own_refusal"] = margin
                if margin > 0:
                    facts["own_opening"] = word
                if guard.gate.heeds(margin, word, facts["text_score"]):
                    requests.is_open[row] = True

    def _read_texts(
        self, texts: list[tuple[int, ...]], opening: tuple[int, ...], readings: TextReadings
    ) -> None:
        """One pass of texts, and the opening behind each, through the decoder alone."""
        self._mode, self._text_states = "text", {}
        self._arm(self._watched)
        try:
            final = self._backbone.run_text(texts, opening)
            _check_all_took_part(self._watched, self._fired, "the text-only pass")
        finally:
            self._mode = None
            self._disarm()
        states, self._text_states = self._text_states, {}
        for row, text in enumerate(texts):
            read = text + opening
            readings.final[read] = final[row]
            readings.states[read] = {
                layer: values[row, -len(read) :] for layer, values in states.items()
            }

    # --- in the layers ---

    def _layer_hook(self, layer: int) -> Any:
        place = self._watched.index(layer)
        edited_here = layer in self._guard.layers
        image_layer = getattr(self._guard.gate, "image_layer", None)
        streams_at = self._backbone.streams_at

        def hook(module: torch.nn.Module, args: Any, output: Any) -> Any:
            self._fired.append(layer)
            h = hidden_states(output, streams_at)
            if self._mode == "text":
                self._text_states[layer] = h.clone()  # or later layers may write to it
                return None
            if self._mode == "canary":
                pushed = h.clone()
                push = self._directions.vectors[layer, 0].to(h.dtype)
                pushed[2 + place] += push * h[2 + place].norm(dim=-1, keepdim=True)
                return with_hidden_states(output, pushed, streams_at)
            this = self._pass
            assert this is not None, "layers are hooked only where there is something to do"
            if layer == image_layer and this.reads_end and not this.requests.settled:
                self._score_image(h, this)
            if not edited_here:
                return None
            edited = self._edit(layer, h, this)
            return None if edited is None else with_hidden_states(output, edited, streams_at)

        return hook

    def _edit(self, layer: int, h: torch.Tensor, this: Pass) -> torch.Tensor | None:
        """`h` with the open rows edited, or None where all are closed."""
        requests = this.requests
        if this.reads_end and not requests.settled:
            self._settle(requests)
        if self._edits is None:  # an empty one stands, too: nothing is open
            self._edits = self._edits_here(this, h.device)
        if layer not in self._edits:
            return None
        here = self._edits[layer]
        positions, inside = _positions_in(h, this.width, here.positions, here.last)
        rows, last, at = here.rows, here.last, here.at
        if inside is not None:
            rows, last, positions = rows[inside], last[inside], positions[inside]
            if at.text is not None:
                at = replace(at, text=at.text[inside], harmful=at.harmful[inside])
        states = h[rows, positions]
        edited = self._guard.edit(states, self._basis[layer].to(h.device), at)
        self._finite.append(torch.isfinite(edited).all())
        if not requests.finished and this.reads_end and layer in requests.first_edited:
            self._note_harm(layer, rows[last], states[last], edited[last], requests)
        out = h.clone()
        out[rows, positions] = edited
        return out

    def _note_harm(
        self,
        layer: int,
        rows: torch.Tensor,
        states: torch.Tensor,
        edited: torch.Tensor,
        requests: RequestBatch,
    ) -> None:
        """Put the harm scores of the rows that are edited here first into their receipts."""
        scores = [
            self._directions.harm_score(x.to(self._directions.vectors.device), layer).tolist()
            for x in (states, edited)
        ]
        for row, before, after in zip(rows.tolist(), *scores, strict=True):
            if "harm_before" in requests.facts[row]:
                continue
            if not (isfinite(before) and isfinite(after)):
                raise SafeguardError(
                    f"Row {row}: the edit at layer {layer} gave a state that is not finite; "
                    "nothing is generated."
                )
            requests.facts[row].update(harm_before=before, harm_after=after)

    def _score_image(self, h: torch.Tensor, this: Pass) -> None:
        """Let the multimodal pass open the gate, too, of requests that have an image."""
        gate = self._guard.gate
        assert isinstance(gate, CalibratedGate)
        assert gate.image_layer is not None
        assert gate.image_threshold is not None
        requests = this.requests
        ends = (requests.last - this.start).to(h.device)
        places, _ = _positions_in(h, this.width, ends, torch.ones_like(ends, dtype=torch.bool))
        states = h[torch.arange(len(h), device=h.device), places]
        scores = self._directions.harm_score(
            states.to(self._directions.vectors.device), gate.image_layer
        ).tolist()
        for row, (fact, score) in enumerate(zip(requests.facts, scores, strict=True)):
            if not fact["images"]:
                continue
            if not isfinite(score):
                raise SafeguardError(
                    "The multimodal pass gave a score that is not a number; the request cannot "
                    "be judged, so nothing is generated."
                )
            fact["image_score"] = score
            if score > gate.image_threshold:
                requests.is_open[row] = True

    def _settle(self, requests: RequestBatch) -> None:
        """Fix which rows are edited in each layer, for this prefill and all that follows it."""
        requests.settled = True
        first = requests.is_open.int().argmax(1)[requests.is_open.any(1)]
        requests.first_edited = {self._guard.layers[column] for column in first.tolist()}

    def _edits_here(self, this: Pass, device: torch.device) -> dict[int, _EditHere]:
        """What each guarded layer where some row is open edits in a pass."""
        requests, places, found = this.requests, this.places, {}
        chosen: dict[tuple[bool, ...], tuple[torch.Tensor, ...]] = {}  # most layers share one
        for column, layer in enumerate(self._guard.layers):
            is_open = requests.is_open[:, column]
            pattern = tuple(is_open.tolist())
            if pattern not in chosen:
                here = is_open[places.row]
                chosen[pattern] = tuple(
                    each[here].to(device)
                    for each in (places.row, places.position, places.token, places.last)
                )
            rows, positions, tokens, last = chosen[pattern]
            if not len(rows):
                continue
            harmful, text = self._harmful[layer].to(device), None
            if requests.text:
                text = requests.text[layer].to(device)[tokens]
                harmful = torch.where(last[:, None], harmful, text)
            at = Reference(text=text, harmful=harmful, drift=self._drift[layer].to(device))
            found[layer] = _EditHere(rows, positions, last, at)
        return found

    def _make_receipts(self, requests: RequestBatch) -> list[Receipt]:
        guard = self._guard
        return [
            Receipt.of(
                fact,
                guard.gate,
                guard.edit,
                window=guard.layers,
                layers=tuple(n for n, is_open in zip(guard.layers, opened, strict=True) if is_open),
                editable=editable,
            )
            for fact, opened, editable in zip(
                requests.facts,
                requests.is_open.tolist(),
                requests.editable.tolist(),
                strict=True,
            )
        ]


def _check_all_took_part(armed: list[int], fired: list[int], where: str) -> None:
    """Refuse a pass in which not every hooked layer ran exactly once."""
    if sorted(fired) != armed:
        raise SafeguardError(
            f"Of the guarded layers {armed}, only {sorted(fired)} took part in {where}: a hook "
            "was removed or a layer replaced after attaching. Attach again."
        )


def _all_true(found: list[torch.Tensor]) -> bool:
    """Whether all of these are true, asking the device once."""
    return not found or bool(torch.stack([each.to(found[0].device) for each in found]).all())


def _positions_in(
    h: torch.Tensor, width: int, positions: torch.Tensor, last: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Positions of a pass of this width in `h`, and which of them it holds; None for all.

    Gemma 4's layers with shared keys and values drop the tokens that need no logits.
    """
    dropped = max(width - h.shape[1], 0)
    if not dropped:
        return positions, None
    inside = positions >= dropped
    if bool((last & ~inside).any()):
        raise SafeguardError(
            f"A guarded layer was given only the last {h.shape[1]} of {width} tokens, "
            "so a request's end cannot be guarded there. Pad on the left, and leave "
            "logits_to_keep out."
        )
    return positions - dropped, inside
