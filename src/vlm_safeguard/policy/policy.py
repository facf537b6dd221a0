"""The policy: all that decides and acts, as frozen data that any engine can run."""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict, dataclass, replace
from typing import TypeVar

import torch

from vlm_safeguard.policy.criterion import Criterion
from vlm_safeguard.policy.directions import Directions, random_basis
from vlm_safeguard.policy.discriminant import Discriminant
from vlm_safeguard.policy.edits import Edit
from vlm_safeguard.policy.gate import AnyCriterion, TextDiscriminant, TextScore
from vlm_safeguard.policy.generation_prompt import GenerationPrompt
from vlm_safeguard.policy.own_refusal import RefusalWords, ScoredRefusal
from vlm_safeguard.policy.response import Response
from vlm_safeguard.policy.sentences import Sentences
from vlm_safeguard.policy.span import Span
from vlm_safeguard.policy.subspace import Subspace
from vlm_safeguard.policy.text_view import TextView

C = TypeVar("C", bound=Criterion)


@dataclass(frozen=True, eq=False)
class Policy:
    """Which requests open the gate, and how these are answered.

    Attributes:
        directions: of every layer, at least `rank` of them.
        drift: (layers, hidden) mean shift of the last token's state by a blank image.
        layers: indices of the layers that are edited, 0 being the first decoder layer.
        rank: directions of each layer that are used, m.
        edit: what is done to the states of a request whose gate is open, if `response` is that.
        gate: criteria, any of which opens it.
        text_view: how a request loses its images.
        response: how a request whose gate is open is answered.
        generation_prompt: where it ends and the answer begins; None where that is not known (guards
            of format 3), and every request ends with its prompt.
        refusal_prefix: token ids that most of the model's own refusals start with. By them a
            refusal is told from "I can't see an image"; and behind an open gate an answer that
            starts so is edited there as well (`Span.OPENING`), or it turns to the image in its
            middle ("I'm … looking at").
        other_prefixes: likewise of its refusals in other languages, no two with the same first
            token; by that it is known which one a text's refusal is compared with.
        sentences: how a request is parted into sentences, each of which is judged, too; None where
            it is judged whole alone.
        random_seed: where set, a random subspace takes the directions' place in the edit (a
            control); the gate keeps the true ones.
        discriminant: of every layer, for criteria that ask for it; None where none does.
    """

    directions: Directions
    drift: torch.Tensor
    layers: tuple[int, ...]
    rank: int
    edit: Edit
    gate: tuple[AnyCriterion, ...]
    text_view: TextView
    response: Response
    generation_prompt: GenerationPrompt | None = None
    refusal_prefix: tuple[int, ...] = ()
    other_prefixes: tuple[tuple[int, ...], ...] = ()
    sentences: Sentences | None = None
    random_seed: int | None = None
    discriminant: Discriminant | None = None

    @property
    def watched(self) -> tuple[int, ...]:
        """The layers whose states are read or edited, in order."""
        return tuple(sorted({*self.layers, *(n for c in self.gate for n in c.watched)}))

    @property
    def image_layers(self) -> tuple[int, ...]:
        """The layers of the multimodal pass that criteria read."""
        return tuple(sorted({n for c in self.gate if c.reads == "image" for n in c.watched}))

    @property
    def edits(self) -> bool:
        """Whether an open request is answered beside its image, by edited states."""
        return self.response is Response.EDIT

    @property
    def guards_text(self) -> bool:
        """Whether requests without an image are decided on, too."""
        return self.edits and self.edit.edits_text

    @property
    def needs_text(self) -> bool:
        """Whether the text-only pass is needed, to decide or to edit."""
        return (self.edits and self.edit.needs_text) or any(c.reads == "text" for c in self.gate)

    @property
    def text_suffices(self) -> bool:
        """Whether texts alone decide, and answer where the gate is open: no image moves either."""
        return not self.edits and all(criterion.reads != "image" for criterion in self.gate)

    def criterion(self, kind: type[C]) -> C | None:
        """The gate's criterion of this class, if it has one."""
        return next((c for c in self.gate if isinstance(c, kind)), None)

    def with_criterion(self, criterion: AnyCriterion) -> Policy:
        """The same with this one in the place of the gate's criterion of its class."""
        kept = [criterion if type(c) is type(criterion) else c for c in self.gate]
        return replace(self, gate=tuple(kept))

    @property
    def own_refusal(self) -> ScoredRefusal | RefusalWords | None:
        """The gate's criterion of the model's own refusal, if it has one."""
        return next((c for c in self.gate if isinstance(c, ScoredRefusal | RefusalWords)), None)

    @property
    def text_criterion(self) -> TextScore | TextDiscriminant | None:
        """The gate's criterion that scores texts, if it has one."""
        return next((c for c in self.gate if isinstance(c, TextScore | TextDiscriminant)), None)

    @property
    def refusal_tokens(self) -> tuple[int, ...]:
        """Tokens that open the model's refusals; none where its own decision is not asked for."""
        return () if self.own_refusal is None else self.own_refusal.tokens

    @property
    def asks_for_harm(self) -> bool:
        """Whether a criterion asks how harmful a text is, as the paper's does not."""
        return self.own_refusal is not None or self.text_criterion is not None

    def judged(self, text: tuple[int, ...]) -> list[tuple[int, ...]]:
        """What is judged of a request's text: it, then each of its sentences alone.

        Any of them opens the gate. The paper's gate reads the text whole alone.
        """
        parts, prompt = self.sentences, self.generation_prompt
        if parts is None or prompt is None or not self.asks_for_harm:
            return [text]
        return [text, *parts.alone(text, prompt)]

    def start(self, text: tuple[int, ...]) -> tuple[int, ...]:
        """What stands before a text's first request, a system prompt say, as in many other texts.

        Nothing where it is not known where requests stand.
        """
        parts, prompt = self.sentences, self.generation_prompt
        return () if parts is None or prompt is None else parts.start(text, prompt)

    @property
    def prefixes(self) -> tuple[tuple[int, ...], ...]:
        """What refusals are compared with: the refusal prefix, then the other languages' ones."""
        return (self.refusal_prefix, *self.other_prefixes)

    @property
    def followed(self) -> tuple[int, ...]:
        """The refusal prefix, where answers are edited while they follow it; or nothing."""
        return self.refusal_prefix if self.edits and self.edit.span is Span.OPENING else ()

    def spoken(self, prefill: tuple[int, ...]) -> int:
        """How many tokens of `followed` a begun answer holds; all where it says something else."""
        follows = prefill == self.followed[: len(prefill)]
        return len(prefill) if follows else len(self.followed)

    @property
    def beginnings(self) -> tuple[tuple[int, ...], ...]:
        """What an open request's answer from its text begins with: the model's own refusal.

        That is the one of these whose first token is likeliest, which is in the language that the
        model would answer in. None where the answer is left to the model.
        """
        if self.response is not Response.REFUSAL:
            return ()
        heard = self.prefixes if self.own_refusal is not None else (self.refusal_prefix,)
        return tuple(filter(None, heard))

    def basis(self) -> torch.Tensor:
        """(layers, stored rank, hidden) orthonormal rows that the edit works in."""
        if self.random_seed is None:
            return self.directions.vectors
        return random_basis(self.directions, self.random_seed)

    def sha256(self) -> str:
        """Of every number that decides, in hex: the same for the same decisions and edits."""
        numbers = {
            "layers": self.layers,
            "rank": self.rank,
            "edit": self.edit.to_config(),
            "gate": [c.model_dump(mode="json", exclude_none=True) for c in self.gate],
            "text_view": asdict(self.text_view),
            "generation_prompt": self.generation_prompt and asdict(self.generation_prompt),
            "refusal_prefix": self.refusal_prefix,
            "response": self.response,
            "random_seed": self.random_seed,
        }
        if self.other_prefixes:  # which earlier guards lack, whose sha256 stays
            numbers["other_prefixes"] = self.other_prefixes
        if self.sentences is not None:  # likewise
            numbers["sentences"] = asdict(self.sentences)
        digest = hashlib.sha256(json.dumps(numbers, sort_keys=True, default=sorted).encode())
        for tensor in self.tensors().values():
            digest.update(repr(tuple(tensor.shape)).encode())
            digest.update(tensor.detach().cpu().contiguous().numpy().tobytes())
        return digest.hexdigest()

    def tensors(self) -> dict[str, torch.Tensor]:
        """The tensors that decide, by name."""
        made, told = self.directions, self.discriminant
        discriminant = (
            {}
            if told is None
            else {"discriminant_weights": told.weights, "discriminant_offset": told.offset}
        )
        return {
            "vectors": made.vectors,
            "harmful_mean": made.harmful_mean,
            "harmless_mean": made.harmless_mean,
            "drift": self.drift,
            **discriminant,
        }

    def subspaces(self, device: torch.device, dtype: torch.dtype) -> dict[int, Subspace]:
        """Edited layer → what its edit works with, in float32, or float64 where the model is."""
        if not self.edits:
            return {}
        wide = torch.float64 if dtype == torch.float64 else torch.float32
        basis = self.basis().to(device, wide)
        harmful, drift = (x.to(device, wide) for x in (self.directions.harmful_mean, self.drift))
        return {
            n: Subspace(V, V @ harmful[n], V @ drift[n])
            for n in self.layers
            for V in [basis[n, : self.rank]]
        }
