"""Answers of open requests from their texts alone, put together with those of the closed ones."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from transformers import Cache, LogitsProcessorList, StoppingCriteriaList

from vlm_safeguard.engines.hooks.first_pass import FirstPass
from vlm_safeguard.engines.hooks.options import ALLOWED, setting
from vlm_safeguard.engines.hooks.own_functions import (
    ShownCriterion,
    ShownProcessor,
    ShownStreamer,
    WholePrompts,
    rows_of,
)
from vlm_safeguard.errors import SafeguardError
from vlm_safeguard.model.backbone import Backbone
from vlm_safeguard.model.run_state import shift_nothing
from vlm_safeguard.model.text_pass import TextPass, without_last
from vlm_safeguard.model.text_rows import text_rows

_DEFAULT_NEW_TOKENS = 20  # as generate has it where no length is asked for
#: What of an output has a row for each answer, or for each beam.
_OF_STEPS = ("scores", "logits")
#: Ways of generating that make their own cache, or read a prompt in their own steps.
_OWN_CACHE = (
    "cache_implementation",
    "assistant_model",
    "prompt_lookup_num_tokens",
    "prefill_chunk_size",
    "assistant_early_exit",
)
_WHOLE = ("attentions", "hidden_states")


@dataclass(frozen=True)
class Answers:
    """What one run of `generate` gave to some of a batch's requests.

    Attributes:
        requests: their numbers in the batch, in the run's order.
        output: of the run.
        width: tokens of its prompts.
        begun: tokens that were put behind each prompt for the answer to begin with.
    """

    requests: tuple[int, ...]
    output: Any
    width: int
    begun: tuple[int, ...] = ()

    @property
    def sequences(self) -> torch.Tensor:
        """(answers, tokens) what was answered, from its first token on."""
        ids: torch.Tensor = getattr(self.output, "sequences", self.output)
        begun = ids.new_tensor(self.begun).expand(len(ids), -1)
        return torch.cat([begun, ids[:, self.width :]], dim=1)


class TextAnswers:
    """Runs `generate` on texts with the options that it was called with.

    Raises:
        SafeguardError: an option whose result cannot be put together from two runs.
    """

    def __init__(
        self,
        backbone: Backbone,
        generate: Callable[..., Any],
        ids: torch.Tensor,
        options: dict[str, Any],
    ) -> None:
        """For a call of `generate` with these (rows, tokens) prompts."""
        self._backbone = backbone
        self._model = backbone.model
        self._generate = generate
        self._ids = ids
        self._options = {
            name: x for name, x in options.items() if name in ALLOWED - {"inputs", "input_ids"}
        }
        self._given = options
        for name in ("output_attentions", "output_hidden_states"):
            if self._setting(name) and self._setting("return_dict_in_generate"):
                raise SafeguardError(
                    f"generate({name}=True) shows passes over the image, and a request of this "
                    "batch is answered from its text alone. Leave it out; nothing was generated."
                )

    def __call__(
        self,
        texts: Sequence[tuple[int, ...]],
        requests: Sequence[int],
        begun: tuple[int, ...],
        read: TextPass | None = None,
    ) -> Answers:
        """Answers to texts, left-padded.

        Args:
            texts: token ids of requests without their media, ready for the answer.
            requests: the numbers of their prompts.
            begun: what each answer begins with.
            read: the pass that read the texts, which is gone on from where the options allow it.
        """
        lengths = self._lengths()
        begun = begun[: max(lengths["max_new_tokens"] - 1, 0)]
        for name in ("max_new_tokens", "min_new_tokens"):
            if name in lengths:
                lengths[name] = max(lengths[name] - len(begun), 0)
        cache, first = self._read_before(texts, begun, read)
        held = None if cache is None else cache.get_seq_length() + max(len(begun), 1)
        inputs = text_rows(self._backbone, texts, [begun] * len(texts), pad=self._pad(), width=held)
        width = inputs["input_ids"].shape[1]
        prompts = self._ids[list(requests)]
        seeing = self._seeing(prompts, requests, width, begun)
        if (streamer := self._options.get("streamer")) is not None:
            seeing["streamer"] = ShownStreamer(streamer, prompts, begun)
        with nullcontext() if first is None else first.known_to(self._model):
            output = self._generate(
                **{
                    **inputs,
                    **self._options,
                    **lengths,
                    **({} if cache is None else {"past_key_values": cache}),
                    **seeing,
                },
            )
        return Answers(tuple(requests), output, width, begun)

    def merged(self, answers: Sequence[Answers]) -> Any:
        """One output for the whole batch, its rows in the order of the prompts."""
        copies = len(answers[0].sequences) // len(answers[0].requests)
        count, pad = len(self._ids), self._pad()
        longest = max(run.sequences.shape[1] for run in answers)
        prompts = self._ids.repeat_interleave(copies, dim=0)
        behind = answers[0].sequences.new_full((count * copies, longest), pad)
        for run in answers:  # a later one's in the place of an earlier one's
            rows = rows_of(run.requests, copies)
            behind[rows] = pad
            behind[rows, : run.sequences.shape[1]] = run.sequences
        sequences = torch.cat([prompts, behind], dim=1)
        if not hasattr(answers[0].output, "sequences"):
            return sequences
        first = answers[0].output
        fields: dict[str, Any] = {"sequences": sequences}
        for name in _OF_STEPS:
            if getattr(first, name, None) is not None:
                fields[name] = self._steps(answers, name, longest)
        beams = self._setting("num_beams") or 1
        if getattr(first, "sequences_scores", None) is not None:
            scores = first.sequences_scores.new_zeros(count * copies)
            for run in answers:
                scores[rows_of(run.requests, copies)] = run.output.sequences_scores
            fields["sequences_scores"] = scores
        if getattr(first, "beam_indices", None) is not None:
            indices = prompts.new_full((count * copies, longest), -1)
            for run in answers:
                own = run.output.beam_indices[:, : longest - len(run.begun)]
                moved = torch.tensor(run.requests, device=own.device)[own.clamp(min=0) // beams]
                moved = torch.where(own < 0, own, moved * beams + own % beams)
                start = len(run.begun)
                rows = rows_of(run.requests, copies)
                indices[rows, start : start + own.shape[1]] = moved
            fields["beam_indices"] = indices
        return type(first)(**fields)

    def _steps(
        self, answers: Sequence[Answers], name: str, longest: int
    ) -> tuple[torch.Tensor, ...]:
        """Scores of each step; one token has all where an answer is begun, and where it is over."""
        runs = [(run, getattr(run.output, name)) for run in answers]
        made = next(steps for _, steps in runs if steps)[0]
        copies = next(len(s[0]) // len(run.requests) for run, s in runs if s)
        merged = []
        for step in range(longest):
            scores = made.new_empty((len(self._ids) * copies, made.shape[1]))
            for run, steps in runs:
                rows, at = rows_of(run.requests, copies), step - len(run.begun)
                scores[rows] = -torch.inf
                if at < 0 or at >= len(steps):
                    scores[rows, run.begun[step] if at < 0 else self._pad()] = 0.0
                else:
                    scores[rows] = steps[at]
            merged.append(scores)
        return tuple(merged)

    def _read_before(
        self, texts: Sequence[tuple[int, ...]], begun: tuple[int, ...], read: TextPass | None
    ) -> tuple[Cache | None, FirstPass | None]:
        """The cache that the answers go on in, and their first pass where they begin with nothing.

        None where they are to read the texts anew.
        """
        # PaliGemma's generate counts positions from 1, its decoder from 0
        fresh = [self._backbone.bidirectional, *(self._setting(name) for name in _OWN_CACHE)]
        copies = [self._setting(name) or 1 for name in ("num_beams", "num_return_sequences")]
        if read is None or any(fresh) or max(copies) > 1 or self._setting("use_cache") is False:
            return None, None
        whole = read.cache_of(texts)
        cache = whole if begun or whole is None else without_last(whole)
        if cache is None:
            return None, None
        shift_nothing(self._model, self._ids.device)
        if begun:
            return cache, None
        return cache, FirstPass(whole, read.logits[read.places(texts)])

    # --- options ---

    def _setting(self, name: str) -> Any:
        return setting(self._model, self._given, name)

    def _pad(self) -> int:
        """The token that stands where an answer is over."""
        for name in ("pad_token_id", "eos_token_id"):
            if (token := self._setting(name)) is not None:
                return int(token[0] if isinstance(token, list) else token)
        return 0

    def _lengths(self) -> dict[str, Any]:
        """The same numbers of new tokens as behind the whole prompt."""
        prompt = self._ids.shape[1]
        new, total = self._setting("max_new_tokens"), self._setting("max_length")
        if new is None:
            new = _DEFAULT_NEW_TOKENS if total is None else max(total - prompt, 1)
        least, at_least = self._setting("min_new_tokens"), self._setting("min_length")
        if least is None and at_least is not None:
            least = at_least - prompt
        lengths = {"max_new_tokens": new, "max_length": None, "min_length": None}
        return lengths | ({} if least is None else {"min_new_tokens": max(least, 0)})

    def _seeing(
        self,
        prompts: torch.Tensor,
        requests: Sequence[int],
        width: int,
        begun: tuple[int, ...],
    ) -> dict[str, Any]:
        """The caller's own functions, which are shown the prompts that it gave."""
        whole = WholePrompts(prompts, tuple(requests), width - len(begun))
        seeing: dict[str, Any] = {}
        if (processors := self._options.get("logits_processor")) is not None:
            seeing["logits_processor"] = LogitsProcessorList(
                [ShownProcessor(each, whole) for each in processors]
            )
        if (criteria := self._options.get("stopping_criteria")) is not None:
            each = criteria if isinstance(criteria, list) else [criteria]
            seeing["stopping_criteria"] = StoppingCriteriaList(
                [ShownCriterion(one, whole) for one in each]
            )
        if (allowed := self._options.get("prefix_allowed_tokens_fn")) is not None:
            seeing["prefix_allowed_tokens_fn"] = lambda row, ids: allowed(
                requests[row], torch.cat([prompts[row], ids[width - len(begun) :]])
            )
        return seeing


class Left(Exception):  # noqa: N818 - not an error
    """Raised by a pass over images after which no request is to be answered beside them."""


class Dice:
    """Where the random generators stand, so that two runs draw the same numbers."""

    def __init__(self, device: torch.device) -> None:
        """Of the CPU, and of the device that models run on."""
        self._cuda = {device: torch.cuda.get_rng_state(device)} if device.type == "cuda" else {}
        self._cpu = torch.get_rng_state()

    @contextmanager
    def thrown_again(self) -> Iterator[None]:
        """Draw once more from here; afterwards they stand where they stood."""
        with torch.random.fork_rng(list(self._cuda)):
            torch.set_rng_state(self._cpu)
            for device, state in self._cuda.items():
                torch.cuda.set_rng_state(state, device)
            yield
