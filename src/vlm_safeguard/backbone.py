"""The backbone: a VLM's own language model, found by structure, and its text-only view.

What has to be known about a model type is data (`families`). Everything else is read from the
model itself (`get_decoder()`, the text config's layer count and hidden size, the config's image
tokens) and from its processor (what a picture becomes in a prompt).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import TYPE_CHECKING, Any

import torch
from jinja2 import TemplateError
from transformers import BatchFeature

from vlm_safeguard.errors import SafeguardError
from vlm_safeguard.families import FAMILIES, REFUSED, SELF_PROMPTING
from vlm_safeguard.images import noise_image

if TYPE_CHECKING:
    from PIL.Image import Image
    from transformers import (
        PreTrainedModel,
        PreTrainedTokenizerBase,
        ProcessorMixin,
    )


_PROBES = ("What is shown here?", "Describe it in one word.")
#: Pictures to show: how many, and their width and height; large ones may be cut into tiles.
_PICTURES = ((1, (64, 64)), (1, (300, 100)), (1, (500, 700)), (2, (64, 64)), (3, (64, 64)))


@dataclass(frozen=True)
class Backbone:
    """The decoder inside a VLM. Build it with `Backbone.of(model)`.

    Attributes:
        layers: those decoder layers that a text token passes, in order; a layer's index is its
            place here. (Cross-attention layers, which text without images skips, are not among
            them.)
        hidden_size: of a layer's output, all its residual streams together.
        streams_at: the dimension of a layer's output that counts its streams, if there is one.
        bidirectional: whether all of a prompt's tokens attend to each other.
    """

    model: PreTrainedModel
    decoder: torch.nn.Module
    decoder_path: str
    layers: tuple[torch.nn.Module, ...]
    hidden_size: int
    placeholder_ids: frozenset[int]
    streams_at: int | None = None
    bidirectional: bool = False

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
        family = FAMILIES.get(model_type)
        if family is None and model_type in REFUSED:
            raise SafeguardError(
                f"Models of type '{model_type}' are refused: {REFUSED[model_type]}."
            )
        if family is None and getattr(config, "vision_config", None) is None:
            raise SafeguardError(
                f"{type(model).__name__} ({model_type}) is not a vision-language model: its "
                "config has no vision part, so there is nothing to guard against."
            )
        if family is None:
            raise SafeguardError(
                f"Model type '{model_type}' is not verified, so it is not guarded. "
                "`vlm-safeguard families` lists those that are; "
                "`vlm-safeguard doctor` checks yours."
            )
        placeholder_ids = frozenset(
            int(token)
            for name in family.placeholders
            if (token := getattr(config, name, None)) is not None
        )
        if not placeholder_ids:
            raise SafeguardError(f"The config of this {model_type} model names no image token.")

        text_config = config.get_text_config()
        wanted = text_config.num_hidden_layers
        given = model.get_decoder()
        found = [
            (module, child)
            for module in given.modules()
            for child in module.children()
            if isinstance(child, torch.nn.ModuleList) and len(child) == wanted
        ]
        decoder, layers = found[0] if found else (given, ())
        paths = [name for name, module in model.named_modules() if module is decoder]
        embeddings = model.get_input_embeddings()
        inside = any(module is embeddings for module in decoder.modules())
        if decoder is model or not paths or len(found) != 1 or not inside:
            raise SafeguardError(
                f"Could not find the language model's {wanted} decoder layers in "
                f"{type(model).__name__}: get_decoder() gives a {type(given).__name__} with "
                f"{len(found)} such lists of layers."
            )
        skipped = set(getattr(text_config, family.skipped, ()) or ()) if family.skipped else set()
        streams = getattr(text_config, family.streams) if family.streams else 1
        return cls(
            model=model,
            decoder=decoder,
            decoder_path=paths[0],
            layers=tuple(layer for i, layer in enumerate(layers) if i not in skipped),
            hidden_size=int(text_config.hidden_size) * streams,
            placeholder_ids=placeholder_ids,
            streams_at=family.streams_at,
            bidirectional=family.bidirectional,
        )

    def in_place(self) -> bool:
        """Whether the model still runs this decoder and these layers."""
        decoder = self.model.get_submodule(self.decoder_path)
        held = {layer for stack in decoder.children() if isinstance(stack, torch.nn.ModuleList)
                for layer in stack}  # fmt: skip
        return decoder is self.decoder and held.issuperset(self.layers)

    @property
    def device(self) -> torch.device:
        """Where token ids have to be for this model."""
        return _device_of(self.model.get_input_embeddings())

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
        ids, mask, positions = (x.to(self.device) for x in (ids, mask, positions))
        output = self.decoder(
            input_ids=ids,
            attention_mask=self._both_ways(ids, mask, positions) if self.bidirectional else mask,
            position_ids=positions,
            use_cache=False,
        )
        final: torch.Tensor = output.last_hidden_state[:, -1]
        return final

    def _both_ways(self, ids: torch.Tensor, mask: torch.Tensor, positions: torch.Tensor) -> Any:
        """The mask that the model itself gives its decoder for a prompt, here without an image."""
        return self.model.create_masks_for_generate(
            config=self.model.config,
            inputs_embeds=self.model.get_input_embeddings()(ids),
            attention_mask=mask,
            past_key_values=None,
            position_ids=positions,
            token_type_ids=torch.zeros_like(ids),  # all of it prompt
        )

    def next_token_logits(self, states: torch.Tensor) -> torch.Tensor:
        """(rows, vocabulary) float32 logits after final states of (rows, hidden)."""
        head = self.model.get_output_embeddings()
        packed = not head.weight.is_floating_point()  # quantized weights are stored as bytes
        dtype = self.model.dtype if packed else head.weight.dtype
        logits: torch.Tensor = head(states.to(_device_of(head), dtype)).float()
        config = self.model.config.get_text_config()
        cap = getattr(config, "final_logit_softcapping", None)  # Gemma
        if cap:
            logits = cap * torch.tanh(logits / cap)
        scale = getattr(config, "logit_scale", None)  # Cohere
        divisor = getattr(config, "logits_scaling", None)  # Granite
        return logits * (scale or 1.0) / (divisor or 1.0)


def _device_of(module: torch.nn.Module) -> torch.device:
    """Where a module computes, which is not where its weights lie if accelerate offloads them."""
    hook = getattr(module, "_hf_hook", None)
    for each in getattr(hook, "hooks", (hook,)):
        if (device := getattr(each, "execution_device", None)) is not None:
            return torch.device(device)
    weight: torch.Tensor = next(module.parameters())
    return weight.device


@dataclass(frozen=True)
class TextView:
    """How to turn a request with images into the same request without them.

    Attributes:
        placeholder_ids: tokens that stand for an image's patches.
        frame_ids: special tokens that the processor writes between and around patches (row
            breaks, tiles, start and end of an image). A run of these and placeholders is one
            image, if it holds a placeholder.
        glue_ids: ordinary tokens (a line break, a tile's number) that it writes inside an image.
        glue_length: the longest run of them inside an image.
        before: ordinary tokens the chat template puts right before an image, dropped with it.
        number_ids: tokens made of digits, if `before` numbers the image: any number stands there.
        after: tokens it puts right after one, dropped with it.
        instead: tokens that stand there without an image (a line break that the tokenizer fuses
            with those around the image).
        exact: whether the view equals the template's own rendering without the image, token for
            token. False for tokenizers that fuse the image's neighbours with the text.
    """

    placeholder_ids: frozenset[int]
    frame_ids: frozenset[int] = frozenset()
    glue_ids: frozenset[int] = frozenset()
    glue_length: int = 0
    before: tuple[int, ...] = ()
    number_ids: frozenset[int] = frozenset()
    after: tuple[int, ...] = ()
    instead: tuple[int, ...] = ()
    exact: bool = True

    @classmethod
    def learn(cls, processor: ProcessorMixin, placeholder_ids: frozenset[int]) -> TextView:
        """Read off what an image becomes in a prompt, by asking questions with and without one.

        Raises:
            SafeguardError: the template puts no image token into a conversation with an image.
        """
        shown = [
            (count, encode_chat(processor, question),
             encode_chat(processor, question, images=count, size=size))
            for question in _PROBES
            for count, size in _PICTURES
        ]  # fmt: skip
        if not all(placeholder_ids & set(ids) for _, _, ids in shown):
            raise SafeguardError(
                "The processor's chat template puts no image token into a conversation that "
                f"has an image (looked for ids {sorted(placeholder_ids)}): processor and "
                "model do not belong together."
            )
        special = _special_ids(processor).difference(*(plain for _, plain, _ in shown))
        chunks = []
        for count, plain, ids in shown:
            prefix = _common(plain, ids, limit=len(plain))
            suffix = _common(plain[::-1], ids[::-1], limit=len(plain) - prefix)
            chunks.append((count, ids[prefix : len(ids) - suffix]))
        frame = special.intersection(token for _, chunk in chunks for token in chunk)
        view = cls(placeholder_ids, frame - placeholder_ids)
        # what stands inside one image; if that does not explain several (numbered ones), in all
        for most in (1, max(count for count, _ in chunks)):
            gaps = [
                chunk[stop:start]
                for count, chunk in chunks
                if count <= most
                for (_, stop), (start, _) in pairwise(view._marks(chunk))
            ]
            view = replace(
                view,
                glue_ids=frozenset(token for gap in gaps for token in gap),
                glue_length=max(map(len, gaps), default=0),
            )
            singles = [(plain, ids) for count, plain, ids in shown if count == 1]
            view = view._with_wrapper([singles[0], singles[-1]])
            numbers = _number_ids(processor)
            view = replace(view, number_ids=numbers if numbers & set(view.before) else frozenset())
            view = replace(view, exact=all(view(ids) == plain for _, plain, ids in shown))
            if view.exact:
                break
        return view

    def _with_wrapper(self, shown: Sequence[tuple[list[int], list[int]]]) -> TextView:
        """This view, with the ordinary tokens around one image as two different questions show it.

        Where the tokenizer fuses text with its neighbours, the wrapper is what both share.
        """
        befores, afters, insteads = [], [], []
        for plain, ids in shown:
            images = list(self._images(ids))
            start, stop = images[0][0], images[-1][1]
            prefix = _common(ids, plain, limit=min(start, len(plain)))
            room = min(len(ids) - stop, len(plain) - prefix)
            suffix = _common(ids[::-1], plain[::-1], limit=room)
            befores.append(ids[prefix:start])
            afters.append(ids[stop : len(ids) - suffix])
            insteads.append(plain[prefix : len(plain) - suffix])
        before = _common(befores[0][::-1], befores[1][::-1], limit=min(map(len, befores)))
        after = _common(*afters, limit=min(map(len, afters)))
        return replace(
            self,
            before=tuple(befores[0][len(befores[0]) - before :]),
            after=tuple(afters[0][:after]),
            instead=tuple(insteads[0]) if insteads[0] == insteads[1] else (),
        )

    def __call__(self, row: Sequence[int]) -> list[int]:
        """`row` (unpadded token ids) without its images and what wraps them."""
        kept: list[int] = []
        position = 0
        for start, stop in self._images(row):
            kept += row[position:start]
            del kept[self._wrapper_start(kept) :]
            kept += self.instead
            position = stop
            if self.after and tuple(row[stop : stop + len(self.after)]) == self.after:
                position += len(self.after)
        kept += row[position:]
        return kept

    def _wrapper_start(self, kept: Sequence[int]) -> int:
        """Where `before` starts at the end of `kept`, whatever number it has; else its end."""
        start = len(kept)
        for token in reversed(self.before):
            wanted = self.number_ids if token in self.number_ids else {token}
            if not start or kept[start - 1] not in wanted:
                return len(kept)
            start -= 1
            while token in self.number_ids and start and kept[start - 1] in self.number_ids:
                start -= 1
        return start

    def count(self, row: Sequence[int]) -> tuple[int, int]:
        """(images, placeholder tokens) in `row`."""
        spans = list(self._images(row))
        tokens = sum(token in self.placeholder_ids for token in row)
        return len(spans), tokens

    def _marks(self, row: Sequence[int]) -> Iterator[tuple[int, int]]:
        """(start, stop) of every maximal run of placeholders and frame tokens."""
        return _runs(row, self.placeholder_ids | self.frame_ids)

    def _images(self, row: Sequence[int]) -> Iterator[tuple[int, int]]:
        """(start, stop) of every image: marks with nothing but glue between them."""
        current: tuple[int, int] | None = None
        for start, stop in self._marks(row):
            if current is not None:
                gap = row[current[1] : start]
                if len(gap) <= self.glue_length and set(gap) <= self.glue_ids:
                    current = (current[0], stop)
                    continue
                if self.placeholder_ids & set(row[current[0] : current[1]]):
                    yield current
            current = (start, stop)
        if current is not None and self.placeholder_ids & set(row[current[0] : current[1]]):
            yield current


def encode_chat(
    processor: ProcessorMixin, text: str, *, images: int = 0, size: tuple[int, int] = (64, 64)
) -> list[int]:
    """Token ids of one user turn in the chat template, ready for the answer.

    Args:
        images: pictures of noise that come before the text, as the processor expands them.
        size: of the pictures, width and height in pixels.

    Raises:
        SafeguardError: the processor has no chat template.
    """
    pictures = [noise_image(number).resize(size) for number in range(images)]
    return encode_messages(processor, [user_turn(text, images=images)], pictures)


def encode_messages(
    processor: ProcessorMixin, messages: list[dict[str, Any]], pictures: Sequence[Image] = ()
) -> list[int]:
    """Token ids of a conversation in the chat template, its images expanded by the processor.

    Raises:
        SafeguardError: the processor cannot read it.
    """
    rendered = render_messages(processor, messages)
    try:
        batch = _encode(processor, [rendered], [pictures])
    except (ValueError, TypeError) as error:
        raise SafeguardError(
            f"The processor cannot read a conversation with {len(pictures)} pictures, so its "
            f"text-only view cannot be learnt: {str(error).splitlines()[0]}"
        ) from error
    row: list[int] = batch["input_ids"][0].tolist()
    return row


def encode_batch(
    processor: ProcessorMixin, questions: Sequence[str], images: Sequence[Sequence[Image]]
) -> BatchFeature:
    """Questions of one turn each, behind their images, as a left-padded batch for `generate`."""
    rendered = [
        render_chat(processor, question, images=len(shown))
        for question, shown in zip(questions, images, strict=True)
    ]
    return _encode(processor, rendered, images, padding=True, padding_side="left")


def model_inputs(
    model: PreTrainedModel,
    processor: ProcessorMixin,
    requests: Sequence[str],
    images: Sequence[Image | None],
) -> BatchFeature:
    """A left-padded batch with one image a request or none, where the model wants it."""
    shown = [[image] if image is not None else [] for image in images]
    device = _device_of(model.get_input_embeddings())
    return encode_batch(processor, requests, shown).to(device, model.dtype)


def _encode(
    processor: ProcessorMixin,
    rendered: list[str],
    images: Sequence[Sequence[Image]],
    **options: Any,
) -> BatchFeature:
    """Rendered conversations as the processor encodes them; none gets a second bos token."""
    if _self_prompting(processor) and not all(images):
        if any(images):
            raise SafeguardError("The processor takes images for all of a batch or for none.")
        return _encode_unseen(processor, rendered, **options)
    bos = getattr(tokenizer_of(processor), "bos_token", None)
    batch: BatchFeature = processor(
        text=rendered,
        images=[list(shown) for shown in images] if any(images) else None,
        return_tensors="pt",
        add_special_tokens=not (bos and rendered[0].startswith(bos)),
        **options,
    )
    batch.pop("labels", None)  # PaliGemma's writes empty ones, for training
    return batch


def _encode_unseen(processor: Any, rendered: list[str], **options: Any) -> BatchFeature:
    """Texts as a processor that demands a picture writes them behind one, which is cut off."""
    marked = [processor.image_token + text for text in rendered]
    batch = _encode(processor, marked, [[noise_image(0)]] * len(marked), **options)
    kept = batch["input_ids"] != processor.image_token_id
    return BatchFeature(
        {
            name: values[kept].view(len(rendered), -1)
            for name, values in batch.items()
            if values.shape == kept.shape
        }
    )


def render_chat(processor: ProcessorMixin, text: str, *, images: int = 0) -> str:
    """One user turn as the chat template writes it, images first, ready for the answer."""
    return render_messages(processor, [user_turn(text, images=images)])


def render_messages(processor: ProcessorMixin, messages: list[dict[str, Any]]) -> str:
    """A conversation as the chat template writes it, ready for the answer.

    Raises:
        SafeguardError: the processor cannot render it.
    """
    if _self_prompting(processor) and not processor.chat_template:
        return _one_turn(processor, messages)
    try:
        rendered: str = processor.apply_chat_template(
            messages, add_generation_prompt=True, tokenize=False
        )
    except (ValueError, AttributeError, TemplateError) as error:
        raise SafeguardError(f"The processor cannot render a conversation: {error}") from error
    return rendered


def _one_turn(processor: Any, messages: list[dict[str, Any]]) -> str:
    """The text of a conversation's only turn behind its image tokens, for its own processor."""
    if [turn["role"] for turn in messages] != ["user"]:
        raise SafeguardError("The processor has no chat template: it reads one user turn only.")
    content = messages[0]["content"]
    images: list[str] = [processor.image_token for item in content if item["type"] == "image"]
    words: list[str] = [item["text"] for item in content if item["type"] == "text"]
    return "".join(images + words)


def _self_prompting(processor: ProcessorMixin) -> bool:
    return any(kind.__name__ in SELF_PROMPTING for kind in type(processor).__mro__)


def user_turn(text: str, *, images: int = 0) -> dict[str, Any]:
    """A message of the user: images, then text."""
    content = [{"type": "image"}] * images + [{"type": "text", "text": text}]
    return {"role": "user", "content": content}


def tokenizer_of(processor: ProcessorMixin) -> PreTrainedTokenizerBase:
    """The processor's tokenizer, which is the processor itself where it has no other part."""
    tokenizer: PreTrainedTokenizerBase = getattr(processor, "tokenizer", processor)
    return tokenizer


def _special_ids(processor: ProcessorMixin) -> frozenset[int]:
    """Tokens that stand for more than their text: special and added ones."""
    tokenizer = tokenizer_of(processor)
    return frozenset(tokenizer.all_special_ids) | frozenset(tokenizer.added_tokens_decoder)


def _number_ids(processor: ProcessorMixin) -> frozenset[int]:
    """Tokens that write digits and nothing else."""
    vocabulary = tokenizer_of(processor).get_vocab()
    return frozenset(
        index for token, index in vocabulary.items() if token.strip("\u0120\u2581 ").isdigit()
    )


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
