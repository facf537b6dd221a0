"""A guard at work on a model: hooks on, verified, requests edited, hooks off again.

One forward pass goes through three kinds of hook:

- before the model runs, a new request gets its text-only pass through the same decoder, which
  decides the gate and measures the edit's reference coordinates;
- after each guarded layer, the rows whose gate is open are edited at the last prompt token, and
  if the guard holds at every token generated after it; other rows are not touched;
- after the model has run, it is checked that every guarded layer took part.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from inspect import signature
from math import isfinite
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self
from weakref import WeakKeyDictionary

import torch

from vlm_safeguard.activations import hidden_states
from vlm_safeguard.backbone import Backbone
from vlm_safeguard.edits import Reference
from vlm_safeguard.errors import SafeguardError
from vlm_safeguard.gate import CalibratedGate
from vlm_safeguard.receipt import Receipt
from vlm_safeguard.refusal import refusal_log_odds

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from vlm_safeguard.guard import Guard

_ATTACHED: WeakKeyDictionary[torch.nn.Module, Attachment] = WeakKeyDictionary()
#: Options of `generate` that are refused: their usual value, and what another one means.
_UNSUPPORTED: dict[str, tuple[Any, str]] = {
    "use_cache": (True, "generation that reads the prompt anew for every token"),
    "prefill_chunk_size": (None, "chunked prefill"),
    "assistant_model": (None, "assisted decoding"),
    "prompt_lookup_num_tokens": (None, "assisted decoding"),
    "assistant_early_exit": (None, "assisted decoding"),
    "custom_generate": (None, "a decoding loop of your own"),
}
_CANARY_NOISE = 100  # a canary's effect must be this many times what equal rows differ by


@dataclass
class _Requests:
    """A batch of requests from its prefill to its last decoded token.

    Attributes:
        is_open: (rows, guarded layers) gate decisions.
        text: layer → (rows, m) coordinates of the text-only pass; empty where it was not run.
        last: (rows,) position of each row's last prompt token.
        editable: (rows,) rows the edit acts on at all.
        edits: layer → indices of the rows to edit and what to aim at, for layers where any is
            open; set once, at the first guarded layer.
        first_edited: the layers where some row is edited first; its receipt is filled there.
        prefill: whether the prompt is being read, rather than an answer written.
    """

    receipts: list[dict[str, Any]]
    is_open: torch.Tensor
    text: dict[int, torch.Tensor]
    last: torch.Tensor
    editable: torch.Tensor
    edits: dict[int, tuple[torch.Tensor, Reference]] = field(default_factory=dict)
    first_edited: set[int] = field(default_factory=set)
    prefill: bool = True


class Attachment:
    """Context manager made by `Guard.attach`; see there.

    Raises:
        SafeguardError: on entering, if the hooks cannot be shown to act; while attached, whenever
            a pass cannot be guarded. No token is generated then.
    """

    def __init__(self, guard: Guard, model: PreTrainedModel) -> None:
        self._guard = guard
        self._model = model
        self._handles: list[Any] = []
        self._mode: str | None = None  # None, "text", "canary" or "guard"
        self._fired: list[int] = []
        self._text_states: dict[int, torch.Tensor] = {}
        self._current: _Requests | None = None
        self._continuing: WeakKeyDictionary[Any, _Requests] = WeakKeyDictionary()

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
        self._forward_signature = signature(model.forward)
        _ATTACHED[model] = self
        try:
            keep = self._handles.append
            keep(model.register_forward_pre_hook(self._before_model, with_kwargs=True))
            keep(model.register_forward_hook(self._after_model, always_call=True))
            for layer in self._watched:
                hook = self._layer_hook(layer)
                keep(self._backbone.layers[layer].register_forward_hook(hook))
            model.generate = self._generate
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

    def _remove(self) -> None:
        for handle in self._handles:
            handle.remove()
        self._handles = []
        self._model.__dict__.pop("generate", None)
        self._mode = self._current = None
        self._continuing.clear()
        self._text_states = {}
        _ATTACHED.pop(self._model, None)

    @torch.no_grad()
    def _verify(self) -> None:
        """One pass that proves every guarded layer's hook acts on the logits.

        All rows are alike; row 2 + i is pushed at the i-th watched layer only, so each row that
        differs from row 0 proves one hook. Rows 0 and 1 tell how much equal rows differ anyway.
        """
        vocabulary = self._model.get_input_embeddings().weight.shape[0]
        token = next(i for i in range(3, vocabulary) if i not in self._backbone.placeholder_ids)
        ids = torch.full((2 + len(self._watched), 2), token, device=self._backbone.device)
        self._mode, self._fired = "canary", []
        logits = self._model(
            input_ids=ids, attention_mask=torch.ones_like(ids), use_cache=False
        ).logits[:, -1]
        effect = (logits - logits[0]).float().abs().amax(-1)
        noise = effect[1] * _CANARY_NOISE + torch.finfo(logits.dtype).tiny
        silent = [
            layer for layer, moved in zip(self._watched, effect[2:] > noise, strict=True)
            if not moved
        ]  # fmt: skip
        if silent or not torch.isfinite(effect).all():
            raise SafeguardError(
                f"The guard's hooks on layers {silent or self._watched} of "
                f"{self._backbone.decoder_path} do not act on the model's output, so it was not "
                "attached and nothing is generated."
            )

    # --- around the model ---

    def _generate(self, *args: Any, **kwargs: Any) -> Any:
        """The model's own `generate`, refused where it would go ways that are not guarded."""
        config = kwargs.get("generation_config") or self._model.generation_config
        for name, (usual, what) in _UNSUPPORTED.items():
            value = kwargs.get(name, getattr(config, name, None))
            if value is not None and value != usual:
                raise SafeguardError(
                    f"generate({name}=…) is {what}, which the guard does not support yet. Leave "
                    "it out; nothing was generated."
                )
        return type(self._model).generate(self._model, *args, **kwargs)

    def _before_model(self, module: torch.nn.Module, args: Any, kwargs: dict[str, Any]) -> None:
        if self._mode == "canary":
            return
        if self._mode is not None:
            raise SafeguardError("The guarded model was called while it was already running.")
        self._fired = []
        given = self._forward_signature.bind_partial(*args, **kwargs)
        given.arguments.update(given.arguments.pop("kwargs", {}))
        inputs = given.arguments
        cache = inputs.get("past_key_values")
        cached = int(cache.get_seq_length()) if cache is not None else 0
        ids = inputs.get("input_ids")
        if ids is None:
            raise SafeguardError(
                "The guarded model was called without input_ids (with inputs_embeds?): its "
                "text-only view cannot be known, so nothing is generated."
            )
        if cached:
            self._current = self._continued(cache, ids)
        else:
            kept = inputs.get("logits_to_keep", 0)
            if isinstance(kept, int) and kept > 1:
                raise SafeguardError(
                    "This prefill holds more than the prompt (assisted decoding?), which the "
                    "guard does not support yet. Generate without an assistant model."
                )
            self._current = self._begin(ids, inputs.get("attention_mask"))
            if cache is not None:
                self._continuing[cache] = self._current
        self._mode = "guard"

    def _after_model(self, module: torch.nn.Module, args: Any, output: Any) -> None:
        mode, self._mode = self._mode, None
        requests, self._current = self._current, None
        if output is None or mode is None:
            return  # the pass failed; the error is on its way
        self._check_all_took_part("this pass")
        cache = getattr(output, "past_key_values", None)
        if requests is not None and requests.prefill:
            requests.prefill = False
            if cache is not None:
                self._continuing[cache] = requests
            self._guard._keep_receipts(self._make_receipts(requests))

    def _check_all_took_part(self, where: str) -> None:
        """Refuse a pass in which not every watched layer's hook ran exactly once."""
        if sorted(self._fired) != self._watched:
            raise SafeguardError(
                f"Of the guarded layers {self._watched}, only {sorted(self._fired)} took part in "
                f"{where}: a hook was removed or a layer replaced after attaching. Attach again."
            )

    def _continued(self, cache: Any, ids: torch.Tensor) -> _Requests:
        """The requests whose answers go on in `cache`."""
        requests = self._continuing.get(cache)
        if requests is None:
            raise SafeguardError(
                "This pass continues a cache that was not filled under this guard, so it cannot "
                "be guarded. Pass the whole conversation with a new cache."
            )
        if ids.shape[1] != 1:
            raise SafeguardError(
                f"{ids.shape[1]} new tokens on a cache that is already filled (a new turn, "
                "chunked prefill or assisted decoding?): the guard does not support this yet. "
                "Pass the whole conversation with a new cache."
            )
        if ids.shape[0] != len(requests.receipts):
            raise SafeguardError(
                f"The batch changed from {len(requests.receipts)} to {ids.shape[0]} rows within "
                "one generation, so rows cannot be told apart."
            )
        return requests

    # --- a new request ---

    @torch.no_grad()
    def _begin(self, ids: torch.Tensor, mask: torch.Tensor | None) -> _Requests:
        """Read a batch of prompts: text-only views, gates, and reference coordinates."""
        if mask is not None and mask.shape != ids.shape:
            raise SafeguardError(
                f"attention_mask has shape {tuple(mask.shape)}, input_ids {tuple(ids.shape)}: "
                "the text-only view cannot be made from other masks than one per token."
            )
        guard, view = self._guard, self._guard.text_view
        tokens = ids.tolist()
        kept = [[True] * len(row) for row in tokens] if mask is None else mask.bool().tolist()
        facts, texts, last = [], [], []
        for number, (row, keep) in enumerate(zip(tokens, kept, strict=True)):
            seen = [token for token, k in zip(row, keep, strict=True) if k]
            text = view(seen)
            if not text:
                raise SafeguardError(f"Row {number} of the batch holds no text to judge.")
            images, image_tokens = view.count(seen)
            facts.append({"images": images, "image_tokens": image_tokens,
                          "text_tokens": len(text)})  # fmt: skip
            texts.append(text)
            last.append(max(position for position, k in enumerate(keep) if k))
        editable = torch.tensor([guard.edit.edits_text or fact["images"] > 0 for fact in facts])
        requests = _Requests(
            receipts=facts,
            is_open=editable[:, None].repeat(1, len(guard.layers)),
            text={},
            last=torch.tensor(last),
            editable=editable,
        )
        if not editable.any() or not (guard.edit.needs_text or guard.gate.needs_text):
            return requests
        self._mode, self._fired, self._text_states = "text", [], {}
        try:
            final = self._backbone.run_text(texts)
        finally:
            self._mode = None
        self._check_all_took_part("the text-only pass")
        self._fired = []
        states, self._text_states = self._text_states, {}
        requests.text = {
            layer: states[layer].to(self._basis[layer].dtype) @ self._basis[layer].mT
            for layer in guard.layers
        }
        if guard.gate.needs_text:
            is_open, scores = guard.gate.text_open(states, self._directions, guard.layers)
            values = scores.tolist()
            if not all(map(isfinite, values)):
                raise SafeguardError(
                    "The text-only pass gave a score that is not a number; the request cannot be "
                    "judged, so nothing is generated."
                )
            requests.is_open = is_open.cpu() & editable[:, None]
            for fact, value in zip(facts, values, strict=True):
                fact["text_score"] = value
        tokens_of_refusal = getattr(guard.gate, "refusal_tokens", ())
        if tokens_of_refusal:
            odds = refusal_log_odds(self._backbone, final, tokens_of_refusal)
            if not torch.isfinite(odds).all():
                raise SafeguardError(
                    "The text-only pass gave no probabilities; the request cannot be judged, so "
                    "nothing is generated."
                )
            requests.is_open |= ((odds > 0) & editable)[:, None]
            for fact, value in zip(facts, odds.tolist(), strict=True):
                fact["own_refusal"] = value
        return requests

    # --- in the layers ---

    def _layer_hook(self, layer: int) -> Any:
        place = self._watched.index(layer)
        edited_here = layer in self._guard.layers
        image_layer = getattr(self._guard.gate, "image_layer", None)

        def hook(module: torch.nn.Module, args: Any, output: Any) -> Any:
            self._fired.append(layer)
            h = hidden_states(output)
            if self._mode == "text":
                self._text_states[layer] = h[:, -1]
                return None
            if self._mode == "canary":
                pushed = h.clone()
                push = self._directions.vectors[layer, 0].to(h.dtype)
                pushed[2 + place] += push * h[2 + place].norm(dim=-1, keepdim=True)
                return _with_states(output, pushed)
            if self._mode is None or self._current is None:
                raise SafeguardError(
                    "A guarded layer ran outside the guarded model. Call the model itself, not "
                    "one of its parts, while a guard is attached."
                )
            if self._current.prefill and layer == image_layer:
                self._score_image(h, self._current)
            if not edited_here:
                return None
            edited = self._edit(layer, h, self._current)
            return None if edited is None else _with_states(output, edited)

        return hook

    def _edit(self, layer: int, h: torch.Tensor, requests: _Requests) -> torch.Tensor | None:
        """`h` with the open rows edited, or None where all are closed."""
        guard = self._guard
        if requests.prefill and layer == guard.layers[0]:
            self._settle(h.device, requests)
        if layer not in requests.edits or not (requests.prefill or guard.hold):
            return None
        rows, at = requests.edits[layer]
        positions = requests.last.to(h.device)[rows] if requests.prefill else 0
        states = h[rows, positions]
        edited = guard.edit(states, self._basis[layer].to(h.device), at)
        if requests.prefill and layer in requests.first_edited:
            scores = [
                self._directions.harm_score(x.to(self._directions.vectors.device), layer).tolist()
                for x in (states, edited)
            ]
            for row, before, after in zip(rows.tolist(), *scores, strict=True):
                if "harm_before" in requests.receipts[row]:
                    continue
                if not (isfinite(before) and isfinite(after)):
                    raise SafeguardError(
                        f"Row {row}: the edit at layer {layer} gave a state that is not finite; "
                        "nothing is generated."
                    )
                requests.receipts[row].update(harm_before=before, harm_after=after)
        out = h.clone()
        out[rows, positions] = edited
        return out

    def _score_image(self, h: torch.Tensor, requests: _Requests) -> None:
        """Let the multimodal pass open the gate, too, of requests that have an image."""
        gate = self._guard.gate
        assert isinstance(gate, CalibratedGate)
        assert gate.image_layer is not None
        assert gate.image_threshold is not None
        states = h[torch.arange(len(h), device=h.device), requests.last.to(h.device)]
        scores = self._directions.harm_score(
            states.to(self._directions.vectors.device), gate.image_layer
        ).tolist()
        for row, (fact, score) in enumerate(zip(requests.receipts, scores, strict=True)):
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

    def _settle(self, device: torch.device, requests: _Requests) -> None:
        """Fix which rows are edited in each layer, for this prefill and all that follows it."""
        guard, is_open = self._guard, requests.is_open
        first = is_open.int().argmax(1)[is_open.any(1)]
        requests.first_edited = {guard.layers[column] for column in first.tolist()}
        for column, layer in enumerate(guard.layers):
            rows = is_open[:, column].nonzero()[:, 0].to(device)
            if len(rows):
                text = requests.text[layer].to(device)[rows] if requests.text else None
                requests.edits[layer] = (
                    rows,
                    Reference(
                        text=text,
                        harmful=self._harmful[layer].to(device),
                        drift=self._drift[layer].to(device),
                    ),
                )

    # --- receipts ---

    def _make_receipts(self, requests: _Requests) -> list[Receipt]:
        guard, gate = self._guard, self._guard.gate
        receipts = []
        for row, fact in enumerate(requests.receipts):
            layers = tuple(
                layer
                for layer, is_open in zip(guard.layers, requests.is_open[row], strict=True)
                if is_open
            )
            limits: dict[str, Any] = {}
            if isinstance(gate, CalibratedGate):
                if "text_score" in fact:
                    limits["text_threshold"] = gate.text_threshold
                if "image_score" in fact:
                    limits["image_threshold"] = gate.image_threshold
            receipts.append(
                Receipt(
                    **fact,
                    **limits,
                    guarded=bool(layers),
                    reason=self._reason(fact, bool(requests.editable[row]), len(layers)),
                    edit=guard.edit.name if layers else None,
                    layers=layers,
                )
            )
        return receipts

    def _reason(self, fact: dict[str, Any], editable: bool, layers: int) -> str:
        gate, edit = self._guard.gate, self._guard.edit
        if not editable:
            return f"no image in the request, and '{edit.name}' only mends what an image does"
        if isinstance(gate, CalibratedGate):
            text, image = fact["text_score"], fact.get("image_score")
            if fact.get("own_refusal", -1.0) > 0:
                return "asked without an image, the language model would itself refuse"
            if text > gate.text_threshold:
                return f"the text scores {text:+.2f}, above {gate.text_threshold:+.2f}"
            if image is not None and image > gate.image_threshold:
                return f"with its image it scores {image:+.2f}, above {gate.image_threshold:+.2f}"
            return f"the text scores {text:+.2f}, not above {gate.text_threshold:+.2f}"
        if gate.name == "open":
            return "the gate is always open"
        return f"the paper's gate is open in {layers} of {len(self._guard.layers)} layers"


def _with_states(output: Any, states: torch.Tensor) -> Any:
    return (states, *output[1:]) if isinstance(output, tuple) else states
