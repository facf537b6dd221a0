"""The backbone: a VLM's own language model, found by structure, and its text-only view.

The families known to work are data (`FAMILIES`). Everything else is read from the model itself:
`get_decoder()`, the text config's layer count and hidden size, the config's image token.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from vlm_safeguard.errors import SafeguardError

if TYPE_CHECKING:
    from transformers import PreTrainedModel, ProcessorMixin


_PROBES = ("What is shown here?", "Describe it in one word.")


@dataclass(frozen=True)
class Family:
    """What has to be known about a model type beyond its structure."""

    placeholders: tuple[str, ...]  # config attributes that hold the ids standing for an image


#: Verified model types. A type that is not listed is refused.
FAMILIES: dict[str, Family] = {
    "llava": Family(placeholders=("image_token_id",)),
}


@dataclass(frozen=True)
class Backbone:
    """The decoder inside a VLM. Build it with `Backbone.of(model)`."""

    model: PreTrainedModel
    decoder: torch.nn.Module
    decoder_path: str
    layers: torch.nn.ModuleList
    hidden_size: int
    placeholder_ids: frozenset[int]

    @classmethod
    def of(cls, model: PreTrainedModel) -> Backbone:
        """Find the decoder layers of `model`.

        Raises:
            SafeguardError: not a verified family, or its structure is not what its config says.
        """
        config = getattr(model, "config", None)
        model_type = getattr(config, "model_type", None)
        if config is None or model_type is None:
            raise SafeguardError(
                f"{type(model).__name__} is not a transformers model: it has no config. "
                "Load it with AutoModelForImageTextToText.from_pretrained."
            )
        if getattr(config, "vision_config", None) is None:
            raise SafeguardError(
                f"{type(model).__name__} ({model_type}) is not a vision-language model: its "
                "config has no vision part, so there is nothing to guard against."
            )
        if model_type not in FAMILIES:
            raise SafeguardError(
                f"Model type '{model_type}' is not verified yet, so it is not guarded. "
                f"Verified: {', '.join(sorted(FAMILIES))}."
            )
        placeholder_ids = frozenset(
            int(token)
            for name in FAMILIES[model_type].placeholders
            if (token := getattr(config, name, None)) is not None
        )
        if not placeholder_ids:
            raise SafeguardError(f"The config of this {model_type} model names no image token.")

        text_config = config.get_text_config()
        decoder = model.get_decoder()
        paths = [name for name, module in model.named_modules() if module is decoder]
        found = [
            module
            for module in decoder.children()
            if isinstance(module, torch.nn.ModuleList)
            and len(module) == text_config.num_hidden_layers
        ]
        embeddings = model.get_input_embeddings()
        inside = any(module is embeddings for module in decoder.modules())
        if decoder is model or not paths or len(found) != 1 or not inside:
            raise SafeguardError(
                f"Could not find the language model's {text_config.num_hidden_layers} decoder "
                f"layers in {type(model).__name__}: get_decoder() gives a "
                f"{type(decoder).__name__} with {len(found)} such lists of layers."
            )
        return cls(
            model=model,
            decoder=decoder,
            decoder_path=paths[0],
            layers=found[0],
            hidden_size=int(text_config.hidden_size),
            placeholder_ids=placeholder_ids,
        )

    @property
    def device(self) -> torch.device:
        """Where token ids have to be for this model."""
        device: torch.device = self.model.get_input_embeddings().weight.device
        return device

    def run_text(self, rows: Sequence[Sequence[int]]) -> torch.Tensor:
        """One pass of token `rows` through the decoder alone, left-padded, without a cache.

        The last position of every row is its last token, for hooks on the layers, too.

        Returns:
            (rows, hidden) final states of the last tokens, from which the next one is predicted.
        """
        width = max(len(row) for row in rows)
        ids = torch.tensor([[0] * (width - len(row)) + list(row) for row in rows])
        mask = torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in rows])
        positions = (mask.cumsum(-1) - 1).clamp(min=0)
        output = self.decoder(
            input_ids=ids.to(self.device),
            attention_mask=mask.to(self.device),
            position_ids=positions.to(self.device),
            use_cache=False,
        )
        final: torch.Tensor = output.last_hidden_state[:, -1]
        return final

    def next_token_logits(self, states: torch.Tensor) -> torch.Tensor:
        """(rows, vocabulary) float32 logits after final states of (rows, hidden)."""
        head = self.model.get_output_embeddings()
        logits: torch.Tensor = head(states.to(head.weight.device, head.weight.dtype))
        return logits.float()


@dataclass(frozen=True)
class TextView:
    """How to turn a request with images into the same request without them.

    Attributes:
        placeholder_ids: tokens that stand for an image; a run of them is one image.
        before: tokens the chat template puts right before an image, dropped with it.
        after: tokens it puts right after one, dropped with it.
        exact: whether the view equals the template's own rendering without the image, token for
            token. False for tokenizers that fuse the image's neighbours with the text.
    """

    placeholder_ids: frozenset[int]
    before: tuple[int, ...] = ()
    after: tuple[int, ...] = ()
    exact: bool = True

    @classmethod
    def learn(cls, processor: ProcessorMixin, placeholder_ids: frozenset[int]) -> TextView:
        """Read off what the chat template adds for an image, by rendering two questions twice.

        Raises:
            SafeguardError: the template puts no image token into a conversation with an image.
        """
        befores, afters, exact = [], [], True
        for question in _PROBES:
            with_image = encode_chat(processor, question, images=1)
            without = encode_chat(processor, question)
            runs = list(_runs(with_image, placeholder_ids))
            if not runs:
                raise SafeguardError(
                    "The processor's chat template puts no image token into a conversation that "
                    f"has an image (looked for ids {sorted(placeholder_ids)}): processor and "
                    "model do not belong together."
                )
            start, stop = runs[0][0], runs[-1][1]
            prefix = _common(with_image, without, limit=min(start, len(without)))
            room = min(len(with_image) - stop, len(without) - prefix)
            suffix = _common(with_image[::-1], without[::-1], limit=room)
            befores.append(with_image[prefix:start])
            afters.append(with_image[stop : len(with_image) - suffix])
            exact = exact and prefix + suffix == len(without)
        # where the tokenizer fuses text with its neighbours, the wrapper is what both share
        before = _common(befores[0][::-1], befores[1][::-1], limit=min(map(len, befores)))
        after = _common(*afters, limit=min(map(len, afters)))
        return cls(
            placeholder_ids=placeholder_ids,
            before=tuple(befores[0][len(befores[0]) - before :]),
            after=tuple(afters[0][:after]),
            exact=exact,
        )

    def __call__(self, row: Sequence[int]) -> list[int]:
        """`row` (unpadded token ids) without its images and what wraps them."""
        kept: list[int] = []
        position = 0
        for start, stop in _runs(row, self.placeholder_ids):
            kept += row[position:start]
            if self.before and tuple(kept[-len(self.before) :]) == self.before:
                del kept[-len(self.before) :]
            position = stop
            if self.after and tuple(row[stop : stop + len(self.after)]) == self.after:
                position += len(self.after)
        kept += row[position:]
        return kept

    def count(self, row: Sequence[int]) -> tuple[int, int]:
        """(images, placeholder tokens) in `row`."""
        runs = list(_runs(row, self.placeholder_ids))
        return len(runs), sum(stop - start for start, stop in runs)


def encode_chat(processor: ProcessorMixin, text: str, *, images: int = 0) -> list[int]:
    """Token ids of one user turn in the chat template, ready for the answer.

    Images come before the text and stand for themselves: one placeholder token each where the
    processor has not expanded them.

    Raises:
        SafeguardError: the processor has no chat template.
    """
    rendered = render_chat(processor, text, images=images)
    tokenizer: Any = getattr(processor, "tokenizer", processor)
    ids: list[int] = tokenizer(rendered, add_special_tokens=_adds_bos(tokenizer, rendered))[
        "input_ids"
    ]
    return ids


def render_chat(processor: ProcessorMixin, text: str, *, images: int = 0) -> str:
    """One user turn as the chat template writes it, images first, ready for the answer."""
    content: list[dict[str, str]] = [{"type": "image"}] * images + [{"type": "text", "text": text}]
    try:
        rendered: str = processor.apply_chat_template(
            [{"role": "user", "content": content}], add_generation_prompt=True, tokenize=False
        )
    except (ValueError, AttributeError) as error:
        raise SafeguardError(f"The processor cannot render a conversation: {error}") from error
    return rendered


def _adds_bos(tokenizer: Any, rendered: str) -> bool:
    """Whether the tokenizer should add its own special tokens to a rendered conversation."""
    bos = getattr(tokenizer, "bos_token", None)
    return not (bos and rendered.startswith(bos))


def _runs(row: Sequence[int], ids: frozenset[int]) -> Iterator[tuple[int, int]]:
    """(start, stop) of every maximal run of tokens that are in `ids`."""
    start = None
    for position, token in enumerate(row):
        if token in ids:
            start = position if start is None else start
        elif start is not None:
            yield start, position
            start = None
    if start is not None:
        yield start, len(row)


def _common(left: Sequence[int], right: Sequence[int], *, limit: int) -> int:
    """Length of the common start of two sequences, at most `limit`."""
    length = 0
    while length < limit and left[length] == right[length]:
        length += 1
    return length
