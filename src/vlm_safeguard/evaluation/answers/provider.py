"""inspect-ai's way to our models: `vlm-safeguard/<model>`, with images and a defence.

`inspect eval … --model vlm-safeguard/pocket -M defence=default`, where the model is `pocket`, a
Hugging Face Hub id or a folder. A language model without a vision tower is taken, too, undefended:
judges are such models.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from concurrent.futures import Future
from dataclasses import fields
from functools import cache, cached_property, partial
from pathlib import Path
from typing import Any

import anyio
import torch
from inspect_ai.model import (
    ChatCompletionChoice,
    ChatMessage,
    ChatMessageAssistant,
    GenerateConfig,
    ModelAPI,
    ModelOutput,
    ModelUsage,
    modelapi,
)
from inspect_ai.tool import ToolChoice, ToolInfo

from vlm_safeguard.defences.table import NAMES
from vlm_safeguard.errors import SafeguardError
from vlm_safeguard.evaluation.answers.batches import Request, submit
from vlm_safeguard.evaluation.answers.journal import Journal
from vlm_safeguard.evaluation.answers.messages import chat_of_messages, position_of
from vlm_safeguard.evaluation.answers.models import DefenceName, ModelName, answering, loaded
from vlm_safeguard.evaluation.answers.reply import Reply, timed_replies
from vlm_safeguard.loading import Loading, sees
from vlm_safeguard.model.backbone import input_device
from vlm_safeguard.model.conversation import Chat, images_of

PROVIDER = "vlm-safeguard"
MAX_TOKENS = 256  # where nothing else is asked for
_POLL = 0.02  # seconds between looks at whether an answer is there

# GenerateConfig's fields: those that become options of `generate`, and those that are not about
# what is generated. Every other one is refused.
_HONOURED = {"max_tokens", "temperature", "top_p", "top_k", "seed", "stop_seqs"}
_TRANSPORT = {
    "max_retries",
    "timeout",
    "attempt_timeout",
    "stream_idle_timeout",
    "max_connections",
    "adaptive_connections",
    "system_message",
    "cache",
    "cache_prompt",
    "max_tool_output",
    "fail_on_refusal",
    "reasoning_history",
}


class SafeguardAPI(ModelAPI):
    """A model of this package's, answering in batches under a defence."""

    def __init__(
        self,
        model_name: str,
        base_url: str | None = None,
        api_key: str | None = None,
        config: GenerateConfig = GenerateConfig(),  # noqa: B008  (inspect's own signature)
        *,
        defence: str = "none",
        guard: str | None = None,
        batch_size: int = 16,
        journal: str | None = None,
        strength: float | None = None,
        threshold: float | None = None,
        **loading: Any,
    ) -> None:
        """Check the arguments; the model is loaded when it is first asked.

        Args:
            model_name: `pocket`, a Hub id, or a checkpoint folder.
            base_url: taken by no local model.
            api_key: likewise.
            config: defaults of what is generated.
            defence: a name from `defences.table`.
            guard: a guard's folder or Hub id; fitted on first use if left out.
            batch_size: requests answered at once.
            journal: file that answers are kept in, so that a crash loses none.
            strength: of `default`'s edit, where it is not to be the guard's own.
            threshold: what is added to the thresholds of `default`'s gate.
            loading: how the model is loaded, a field of `Loading` each.

        Raises:
            SafeguardError: an argument that does not exist, or cannot be.
        """
        super().__init__(model_name=model_name, base_url=base_url, api_key=api_key, config=config)
        known = [field.name for field in fields(Loading)]
        if unknown := sorted(loading.keys() - known):
            raise SafeguardError(
                f"There is no model argument {', '.join(unknown)}; there are defence, guard, "
                f"batch_size, journal, strength, threshold, {', '.join(known)}."
            )
        if base_url is not None:
            raise SafeguardError("A vlm-safeguard model runs here; it takes no base URL.")
        if defence not in NAMES:
            raise SafeguardError(f"There is no defence '{defence}'; there are {', '.join(NAMES)}.")
        if defence != "default" and (strength, threshold) != (None, None):
            raise SafeguardError(f"The defence '{defence}' has no strength or threshold to set.")
        if int(batch_size) < 1:
            raise SafeguardError(f"The batch size is {batch_size}; at least 1 is needed.")
        self.batch_size = int(batch_size)
        self._journal = None if journal is None else _journal(str(Path(journal).resolve()))
        self._model = ModelName(model_name, Loading(**loading))
        self._defence = DefenceName(defence, guard, strength, threshold)
        # inspect's cache knows a model by its name and base URL alone: without this it would serve
        # an undefended model's answer as a defended one's
        self.base_url = json.dumps([*self._model.key, *self._defence])

    async def generate(
        self,
        input: list[ChatMessage],  # noqa: A002  (inspect's own name)
        tools: list[ToolInfo],
        tool_choice: ToolChoice,
        config: GenerateConfig,
    ) -> ModelOutput:
        """One answer, made in a batch with others.

        Raises:
            SafeguardError: the request cannot be read, asks for what cannot be honoured, or the
                defence failed: then there is no answer.
        """
        if tools:
            raise SafeguardError("A vlm-safeguard model takes no tools.")
        options = generation_options(config)
        chat = chat_of_messages(input)
        request = Request(
            chat=chat,
            # processors may take images for all of a batch or for none
            group=json.dumps([*self._model.key, *self._defence, options, bool(images_of(chat))]),
            run=lambda chats: self._answer(chats, options),
            most=min(self.batch_size, config.max_connections or self.batch_size),
            position=position_of(input),
            journal=self._journal,
        )
        reply = await _finished(submit(request))
        reached = reply.tokens >= options["max_new_tokens"]
        return ModelOutput(
            model=self.model_name,
            choices=[
                ChatCompletionChoice(
                    message=ChatMessageAssistant(
                        content=reply.text, model=self.model_name, source="generate"
                    ),
                    stop_reason="max_tokens" if reached else "stop",
                )
            ],
            usage=ModelUsage(output_tokens=reply.tokens, total_tokens=reply.tokens),
            metadata=reply.model_dump(mode="json", exclude={"text"}),
        )

    @cached_property
    def sees(self) -> bool:
        """Whether the model takes images."""
        return sees(*self._model)

    def max_tokens(self) -> int | None:
        """Tokens of an answer where the task does not say."""
        return MAX_TOKENS

    def max_connections(self) -> int:
        """Requests in flight: one batch that is answered, one that gathers."""
        return 2 * self.batch_size

    def _answer(self, chats: list[Chat], options: dict[str, Any]) -> list[Reply]:
        """Answer one batch; runs in the thread of `batches` only."""
        answerer = loaded(self._model)
        options = dict(options)
        seed = options.pop("seed", None)
        if "stop_strings" in options:
            options["tokenizer"] = answerer.tokenizer
        device = input_device(answerer.model)
        devices = [device] if device.type == "cuda" else []
        generate = partial(answering(self._model, self._defence), **options)
        with torch.random.fork_rng(devices=devices, enabled=seed is not None):
            if seed is not None:
                torch.manual_seed(seed)
            replies = timed_replies(generate, chats)
        stops = options.get("stop_strings", ())
        return [reply.model_copy(update={"text": _cut(reply.text, stops)}) for reply in replies]


modelapi(name=PROVIDER)(SafeguardAPI)  # not as a decorator, which would put a function in its place


def generation_options(config: GenerateConfig) -> dict[str, Any]:
    """What a config asks for, as options of `generate`; greedy unless it asks for sampling.

    Raises:
        SafeguardError: it asks for something that cannot be honoured.
    """
    wanted = config.model_dump(exclude_none=True)
    unknown = sorted(
        name for name, value in wanted.items() if name not in _HONOURED | _TRANSPORT and value
    )
    if unknown:
        raise SafeguardError(
            f"A vlm-safeguard model cannot honour {', '.join(unknown)}; it knows "
            f"{', '.join(sorted(_HONOURED))}."
        )
    options: dict[str, Any] = {"max_new_tokens": config.max_tokens or MAX_TOKENS}
    sampling = {name: wanted[name] for name in ("top_p", "top_k") if name in wanted}
    options["do_sample"] = config.temperature != 0 and bool(sampling or config.temperature)
    if options["do_sample"]:
        options |= sampling | {
            "temperature": 1.0 if config.temperature is None else config.temperature
        }
        if config.seed is not None:
            options["seed"] = config.seed
    if config.stop_seqs:
        options["stop_strings"] = config.stop_seqs
    return options


async def _finished(answer: Future[Reply]) -> Reply:
    """Wait for an answer on whatever event loop this is."""
    try:
        while not answer.done():
            await anyio.sleep(_POLL)
    finally:
        answer.cancel()  # where nobody waits any more; nothing happens to one that is there
    return answer.result()


def _cut(text: str, stops: Sequence[str]) -> str:
    """`text` up to the first of the strings that end it."""
    return text[: min((at for stop in stops if (at := text.find(stop)) >= 0), default=len(text))]


@cache
def _journal(path: str) -> Journal:
    """One journal a file, whoever writes to it."""
    return Journal(Path(path))
