"""What a guarded `generate` answers: beside images, from texts alone, or some so and some so."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from vlm_safeguard.engines.hooks.model import ModelHooks
from vlm_safeguard.engines.hooks.options import setting
from vlm_safeguard.engines.hooks.own_functions import HeldStreamer, beside_images
from vlm_safeguard.engines.hooks.passes import Prompt
from vlm_safeguard.engines.hooks.text_answers import Answers, Dice, Left, TextAnswers
from vlm_safeguard.errors import SafeguardError
from vlm_safeguard.model.cache import cache_in
from vlm_safeguard.policy.policy import Policy

if TYPE_CHECKING:
    from transformers import PreTrainedModel


@dataclass(frozen=True, eq=False)
class Responder:
    """Gives what a policy's response is to a batch.

    Attributes:
        generate: the model's own `generate`, whose passes the hooks guard.
    """

    policy: Policy
    model: PreTrainedModel
    hooks: ModelHooks
    generate: Callable[..., Any]

    def respond(self, prompt: Prompt, options: dict[str, Any]) -> Any:
        """The output of `generate` with these options, which hold the prompt.

        Raises:
            SafeguardError: it cannot be judged, or its answers cannot be put together.
        """
        if self.policy.edits:
            return self.generate(**options)
        dice = Dice(prompt.ids.device)
        prompt.batch = self.hooks.decide(prompt)
        count, runs = len(prompt.ids), []
        decision = prompt.batch.decision
        if decision.may_open and count > 1 and options.get("streamer") is not None:
            raise SafeguardError(
                "A streamer cannot follow several requests where one may be answered from its text "
                "alone, in a run of its own. Give generate one request at a time, or no streamer; "
                "nothing was generated."
            )
        if decision.awaits_image or not decision.is_open.any(1).all():
            beside = self._beside_images(prompt, options)
            if not prompt.batch.decision.is_open.any():
                return beside
            if beside is not None:
                runs = [Answers(tuple(range(count)), beside, prompt.ids.shape[1])]
        batch, copies = prompt.batch, len(prompt.batch) // count
        self.hooks.note(batch)
        opened = batch.decision.is_open.any(1)[::copies].nonzero()[:, 0].tolist()
        answers = TextAnswers(self.hooks.backbone, self._on_texts, prompt.ids, options)
        with dice.thrown_again() if runs else nullcontext():
            for begun in dict.fromkeys(batch.beginning(n * copies) for n in opened):
                mine = [n for n in opened if batch.beginning(n * copies) == begun]
                texts = [batch.texts[n * copies] for n in mine]
                runs.append(answers(texts, mine, begun, batch.read_texts))
        batch.finished = True
        return answers.merged(runs)

    def _beside_images(self, prompt: Prompt, options: dict[str, Any]) -> Any:
        """The model's own `generate`, which answers closed requests; None where none is."""
        assert prompt.batch is not None
        count = len(prompt.ids)
        if prompt.batch.decision.may_open:
            if cache_in(options) is not None and count > 1:
                raise SafeguardError(
                    "A cache for several requests cannot be gone on with where some are answered "
                    "from their texts alone. Give generate one request at a time, or no cache."
                )
            own = options.get("stopping_criteria") or []
            criteria = beside_images(own, lambda: _open_prompts(prompt))
            options = {**options, "stopping_criteria": criteria}
            if (streamer := options.get("streamer")) is not None:
                options["streamer"] = HeldStreamer(streamer)
        copies = [setting(self.model, options, n) for n in ("num_beams", "num_return_sequences")]
        if max(each or 1 for each in copies) > 1:
            prompt.batch = None  # it is read again, with a row for each
        try:
            return self.generate(**options)
        except Left:
            return None

    def _on_texts(self, **options: Any) -> Any:
        """The model's own `generate` on texts, which the guard lets through."""
        hooks = self.hooks
        ids, mask = options["input_ids"], options["attention_mask"]
        whole, hooks.prompt = hooks.prompt, Prompt(ids, mask, noted=False)
        try:
            return self.generate(**options)
        finally:
            hooks.prompt = whole


def _open_prompts(prompt: Prompt) -> torch.Tensor:
    """(prompts,) bool: whose gate is open."""
    batch = prompt.batch
    assert batch is not None
    return batch.decision.is_open.any(1)[:: len(batch) // len(prompt.ids)]
