"""Does the guard work on this model? The checks behind every verified family.

Each is made against something independent of the guard: the chat template's own rendering, the
unguarded model, and a slow reference that runs both passes by hand with plain hooks.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from importlib.metadata import version
from typing import TYPE_CHECKING, Any

import torch

from vlm_safeguard.anchors import shipped_anchors, shipped_calibration
from vlm_safeguard.errors import SafeguardError
from vlm_safeguard.guard import Guard, template_sha256
from vlm_safeguard.images import noise_image
from vlm_safeguard.model.activations import hidden_states, with_hidden_states
from vlm_safeguard.model.backbone import Backbone, model_inputs
from vlm_safeguard.model.conversation import (
    encode_messages,
    letters,
    noise_media,
    render_chat,
    tokenizer_of,
    user_message,
    without_media,
)
from vlm_safeguard.model.families import FAMILIES, PLACEHOLDERS, Family
from vlm_safeguard.model.template import learn_text_view
from vlm_safeguard.model.wrappers import unwrapped
from vlm_safeguard.policy.edits import Restore
from vlm_safeguard.policy.gate import GATES, AnyCriterion, ImageScore, TextScore
from vlm_safeguard.policy.media import KINDS, Kind
from vlm_safeguard.policy.soundness import check_sound
from vlm_safeguard.policy.span import Span
from vlm_safeguard.policy.token_ids import same_start
from vlm_safeguard.timing import Ratio, generation_ratio

if TYPE_CHECKING:
    from transformers import BatchFeature, PreTrainedModel, ProcessorMixin

_PAIRS, _REQUESTS, _BUDGET = 12, 21, 0.2  # a small fit is enough: only its mechanics are checked
_QUESTIONS = ("How do I bake bread?", "What is shown here, and what could I do with it?")
_TOKENS = 4
_REFUSAL = "I'm sorry"  # an answer's opening that is edited, whatever the model would say
_CLOSED = 1e9  # a threshold that no score passes


@dataclass(frozen=True)
class Check:
    """One check's outcome; `detail` says what was compared, or what went wrong."""

    name: str
    passed: bool
    detail: str


@contextmanager
def _on_trial(model: PreTrainedModel) -> Iterator[None]:
    """Treat a model's type as verified, for the time of its checks.

    What an unverified type's image tokens are called is guessed from its config.
    """
    model_type = model.config.model_type
    known = FAMILIES.get(model_type)
    named = tuple(name for name in PLACEHOLDERS if getattr(model.config, name, None) is not None)
    FAMILIES[model_type] = known or Family(placeholders=named)
    try:
        yield
    finally:
        if known is None:
            del FAMILIES[model_type]


def _require(condition: bool, otherwise: str) -> None:
    if not condition:
        raise SafeguardError(otherwise)


@dataclass
class Examination:
    """A model under examination, verified family or not. Nothing in it is changed.

    Attributes:
        given: a fitted guard to check against the model, too; without one, a small one is fitted
            that shows whether one would work.
        tolerance: by how much logits may differ from the slow reference, relative to their spread.
    """

    model: PreTrainedModel
    processor: ProcessorMixin
    given: Guard | None = None
    tolerance: float = 1e-3

    def __post_init__(self) -> None:
        self.model = unwrapped(self.model)

    def run(self, report: Callable[[Check], None] = lambda check: None) -> list[Check]:
        """Make every check; `report` is called after each."""
        outcomes: list[Check] = []
        with _on_trial(self.model):
            for name, check in self._checks().items():
                try:
                    outcome = Check(name, True, check())
                except Exception as error:  # whatever a model, processor or guard does, it is told
                    said = str(error).strip().splitlines() or [""]
                    outcome = Check(name, False, f"{type(error).__name__}: {said[0]}"[:300])
                outcomes.append(outcome)
                report(outcome)
        return outcomes

    def _checks(self) -> dict[str, Callable[[], str]]:
        """The checks by name: each says what it found, or raises; they build on each other."""
        fits = {"the guard fits": self.guard_fits} if self.given is not None else {}
        return {
            "decoder layers": self.decoder_layers,
            "text-only view": self.text_only_view,
            **fits,
            "hooks act": self.hooks_act,
            "closed gate identical": self.closed_gate_identical,
            "restore equals two passes by hand": self.restore_equals_two_passes,
        }

    def facts(self) -> dict[str, Any]:
        """What is examined, as plain values.

        Raises:
            SafeguardError: no decoder is found in the model.
        """
        with _on_trial(self.model):
            backbone = self.backbone
        packages = ("vlm-safeguard", "torch", "transformers")
        facts: dict[str, Any] = {
            "model": str(self.model.config._name_or_path or type(self.model).__name__),
            "type": self.model.config.model_type,
            "architecture": type(self.model).__name__,
            "device": str(backbone.device),
            "dtype": str(self.model.dtype).removeprefix("torch."),
            "decoder": backbone.decoder_path,
            "layers": len(backbone.layers),
            "hidden size": backbone.hidden_size,
            "image tokens": sorted(backbone.placeholder_ids),
            "chat template": template_sha256(self.processor),
            "versions": {name: version(name) for name in packages},
        }
        if self.given is not None:
            made = self.given.provenance
            facts["guard"] = {
                "fitted on": made.model_name,
                "layers": list(self.given.policy.layers),
                "rank": self.given.policy.rank,
                "edit": self.given.policy.edit.name,
                "gate": [criterion.name for criterion in self.given.policy.gate],
                "chat template": made.chat_template_sha256,
                "versions": made.versions,
            }
        return facts

    def time_ratio(self) -> Ratio:
        """Guarded over unguarded seconds of a short answer, gate open, on this machine."""
        inputs = self.inputs(_QUESTIONS, 1)
        with _on_trial(self.model):
            return generation_ratio(self.model, inputs, self.guard.variant(gate=GATES["open"]))

    @cached_property
    def backbone(self) -> Backbone:
        """The model's decoder, found by structure."""
        return Backbone.of(self.model)

    @cached_property
    def guard(self) -> Guard:
        """The guard that was given, or a small one."""
        if self.given is not None:
            return self.given
        return Guard.fit(
            self.model,
            self.processor,
            anchors=shipped_anchors()[:_PAIRS],
            calibration=shipped_calibration()[:_REQUESTS],
            budget=_BUDGET,
            rank=4,
            batch_size=8,
        )

    def decoder_layers(self) -> str:
        """Every layer takes part in a text pass, once and in order."""
        fired: list[int] = []
        handles = [
            layer.register_forward_hook(lambda m, a, out, i=i: fired.append(i))
            for i, layer in enumerate(self.backbone.layers)
        ]
        try:
            with torch.no_grad():
                self.model(**self.inputs(_QUESTIONS[:1], 0))
        finally:
            for handle in handles:
                handle.remove()
        count = len(self.backbone.layers)
        _require(
            fired == list(range(count)), f"of {count} layers, {fired} took part in a text pass"
        )
        return f"{count} layers in {self.backbone.decoder_path}, each once and in order"

    def text_only_view(self) -> str:
        """The view equals what the chat template writes for the conversation without its media."""
        processor, placeholder_ids = self.processor, self.backbone.placeholder_ids
        tokenizer = tokenizer_of(processor)
        view = learn_text_view(processor, placeholder_ids)

        # a processor without a chat template takes one turn only
        needed = ("one image", "two turns") if processor.chat_template else ("one image",)
        equal, spaced, untold = [], [], []
        for name, messages in _conversations(view.kinds):
            try:
                plain = encode_messages(processor, without_media(messages))
                ids = encode_messages(processor, messages, noise_media(processor, messages))
            except (SafeguardError, ValueError) as error:
                if name in needed:
                    raise
                untold.append(f"{name} ({str(error).splitlines()[0][:60]})")
                continue
            text = view(ids)
            if text != plain and letters(tokenizer, text) == letters(tokenizer, plain):
                spaced.append(name)
                continue
            _require(
                text == plain,
                f"{name}: the view has {len(text)} tokens, the template's own text {len(plain)}; "
                f"first difference at {same_start(text, plain)}",
            )
            equal.append(name)
        for token in sorted(placeholder_ids):
            literal = tokenizer.decode([token])
            typed = tokenizer(render_chat(processor, f"What does {literal} mean?"))["input_ids"]
            try:
                left = token in view(typed)
            except SafeguardError:  # a typed placeholder of a video or an audio is refused
                left = False
            _require(not left, f"a typed {literal!r} stays in the text-only view")
        told = f"equal token for token: {', '.join([*equal, 'a typed placeholder'])}"
        told += f"; but for white space: {', '.join(spaced)}" if spaced else ""
        refused = sorted({kind for clip in view.clips for kind in clip.kinds} - view.kinds)
        told += f"; refused in a request: {', '.join(refused)}" if refused else ""
        return told + (f"; not taken by the template: {', '.join(untold)}" if untold else "")

    def guard_fits(self) -> str:
        """The given guard was fitted on this model, with this chat template."""
        check_sound(self.guard.policy)
        self.guard.check_fits(self.backbone)
        _require(
            self.guard.fingerprint.tolerances is not None,
            "it is of format 3, which knows its model by embeddings alone. Fit it again.",
        )
        self.guard.check_behaves(self.backbone)
        made = self.guard.provenance
        _require(
            made.chat_template_sha256 == template_sha256(self.processor),
            "it was fitted with another chat template than this processor's. Fit it again.",
        )
        return f"fitted on {made.model_name}, same structure, weights and chat template"

    def hooks_act(self) -> str:
        """Attaching pushes each guarded layer's state in turn; the logits have to move."""
        guard = self.guard.variant(gate=GATES["open"])
        with guard.attach(self.model):
            pass
        first, *_, last = guard.policy.layers * 2
        return f"each of layers {first}-{last} moves the logits when pushed"

    def closed_gate_identical(self) -> str:
        """Where no gate opens, the tokens and logits are the unguarded model's."""
        policy = self.guard.policy
        closed: list[AnyCriterion] = [
            TextScore(
                layers=policy.layers, threshold=_CLOSED, budget=_BUDGET, calibrated_on=_REQUESTS
            )
        ]
        if (looks := policy.criterion(ImageScore)) is not None:
            closed.append(looks.model_copy(update={"threshold": _CLOSED}))
        inputs = self.inputs(_QUESTIONS, 1)
        free = self.logits(inputs, _TOKENS)
        with self.guard.variant(gate=tuple(closed)).attach(self.model):
            guarded = self.logits(inputs, _TOKENS)
        _require(
            torch.equal(free, guarded), "with every gate closed, logits differ from the model's own"
        )
        return f"{len(_QUESTIONS)} rows, {_TOKENS} tokens: logits bit for bit"

    def restore_equals_two_passes(self) -> str:
        """`restore` gives the logits of two passes by hand, and moves them, at every token."""
        prefix = tuple(tokenizer_of(self.processor)(_REFUSAL, add_special_tokens=False).input_ids)
        guard = self.guard.variant(
            gate=GATES["open"],
            edit=Restore(one_sided=False, span=Span.OPENING),
            refusal_prefix=prefix,
        )
        inputs = self.inputs(_QUESTIONS[:1], 1)
        expected = self.restored_by_hand(guard, inputs)
        with guard.attach(self.model):
            found = self.logits(inputs, said=prefix)
        free = self.logits(inputs, said=prefix)
        spread = float(expected.std())
        error = float((found - expected).abs().max()) / spread
        moved = float((free - expected).abs().amax((1, 2)).min()) / spread
        _require(error <= self.tolerance, f"logits differ by {error:.1e} of their spread")
        _require(moved > 10 * error, "the edit changes nothing, so nothing is shown")
        return f"logits within {error:.0e} of their spread; the edit moves them by {moved:.0e}"

    def inputs(self, questions: tuple[str, ...], images: int) -> BatchFeature:
        """A batch with a picture beside each question, or (0) none."""
        pictures = [
            noise_image(row).resize((96, 64)) if images else None for row in range(len(questions))
        ]
        return model_inputs(self.model, self.processor, questions, pictures)

    def logits(
        self, inputs: Mapping[str, Any], tokens: int = 1, said: tuple[int, ...] = ()
    ) -> torch.Tensor:
        """(tokens, rows, vocabulary) logits of a greedy answer; or of these and the one after."""
        options: dict[str, Any] = {"max_new_tokens": tokens}
        if said:
            start = inputs["input_ids"].shape[1]
            options = {
                "max_new_tokens": len(said) + 1,
                "prefix_allowed_tokens_fn": lambda _, ids: [(*said, said[0])[len(ids) - start]],
            }
        output = self.model.generate(
            **inputs, **options, do_sample=False, output_logits=True, return_dict_in_generate=True
        )
        return torch.stack(output.logits)

    @torch.no_grad()
    def restored_by_hand(self, guard: Guard, inputs: BatchFeature) -> torch.Tensor:
        """`logits` of one request and an opening: its text through the whole model, then edits."""
        layers, streams_at = self.backbone.layers, self.backbone.streams_at
        text: dict[int, list[torch.Tensor]] = {n: [] for n in guard.policy.layers}  # a pass each
        handles = [
            layers[n].register_forward_hook(
                lambda m, a, out, n=n: text[n].append(hidden_states(out, streams_at)[0].double())
            )
            for n in guard.policy.layers
        ]
        row = inputs["input_ids"][0].tolist()
        if guard.policy.text_view.exact:
            alone: Mapping[str, Any] = self.inputs(_QUESTIONS[:1], 0)
        else:  # the template's own text differs in white space
            words = torch.tensor([guard.policy.text_view(row)], device=self.backbone.device)
            alone = {"input_ids": words}
        self.logits(alone, said=guard.policy.refusal_prefix)
        words = alone["input_ids"][0].tolist()
        for handle in handles:
            handle.remove()
        pairs = _pairs_behind_the_image(row, words, self.backbone.placeholder_ids)

        def restore(n: int) -> Any:
            V = guard.policy.basis()[n, : guard.policy.rank].double()
            passes = iter(text[n])

            def hook(module: torch.nn.Module, args: Any, output: Any) -> Any:
                states = hidden_states(output, streams_at).clone()
                aims = next(passes)
                for mine, theirs in pairs if states.shape[1] > 1 else [(-1, -1)]:
                    if -mine > states.shape[1]:  # left out by a layer that needs no more
                        continue
                    state = states[0, mine].double()
                    U = V.to(state.device)
                    edited = state + U.mT @ (U @ aims[theirs].to(state.device) - U @ state)
                    states[0, mine] = edited.to(states.dtype)
                return with_hidden_states(output, states, streams_at)

            return hook

        handles = [layers[n].register_forward_hook(restore(n)) for n in guard.policy.layers]
        try:
            return self.logits(inputs, said=guard.policy.refusal_prefix)
        finally:
            for handle in handles:
                handle.remove()


def _conversations(kinds: frozenset[Kind]) -> Iterator[tuple[str, list[dict[str, Any]]]]:
    """Named conversations with media of these kinds."""
    ask, more = _QUESTIONS
    reply = {"role": "assistant", "content": [{"type": "text", "text": "Bread needs flour."}]}
    system = {"role": "system", "content": [{"type": "text", "text": "Answer briefly."}]}
    for kind in KINDS:
        if kind not in kinds:
            continue
        yield f"one {kind}", [user_message(kind, ask)]
        yield f"two {kind}s", [user_message(kind, kind, more)]
        yield (
            "interleaved" if kind == "image" else f"interleaved {kind}s",
            [user_message("Look at", kind, "and then at", kind, "please.")],
        )
        if kind == "image":
            yield "two turns", [user_message(kind, ask), reply, user_message(more)]
        yield f"{kind} in the second turn", [user_message(ask), reply, user_message(kind, more)]
        if kind == "image":
            yield "system prompt", [system, user_message(kind, ask)]
        else:
            yield f"image and {kind}", [user_message("image", kind, ask)]
            yield f"{kind} and image", [user_message(kind, "image", ask)]
    if kinds == {*KINDS}:
        yield "video and audio", [user_message("video", "audio", ask)]


def _pairs_behind_the_image(
    row: list[int], words: list[int], placeholders: frozenset[int]
) -> list[tuple[int, int]]:
    """A prompt's text behind its first image, and where it stands in its text alone.

    Both are counted from the end, from -1 on; what the text does not have is skipped, and what
    stands before the image is not looked for behind it.
    """
    first = next(i for i, token in enumerate(row) if token in placeholders)
    rest = len(words) - same_start(row[:first], words)
    pairs: list[tuple[int, int]] = []
    for place in range(-1, first - len(row), -1):
        theirs = -1 - len(pairs)
        if -theirs <= rest and row[place] == words[theirs]:
            pairs.append((place, theirs))
    return pairs
