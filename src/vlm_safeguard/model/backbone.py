"""The backbone: a VLM's own language model, found by structure.

What has to be known about a model type is data (`families`). Everything else is read from the
model itself: `get_decoder()`, the text config's layer count and hidden size, the config's image
tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from vlm_safeguard.errors import SafeguardError
from vlm_safeguard.model.conversation import Chat, chat_of, encode_chats
from vlm_safeguard.model.families import FAMILIES, REFUSED
from vlm_safeguard.model.text_pass import TextPass, padding_first, plain_cache

if TYPE_CHECKING:
    from PIL.Image import Image
    from transformers import BatchFeature, PreTrainedModel, ProcessorMixin


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
        logit_scale: what the model multiplies its output layer's logits by.
    """

    model: PreTrainedModel
    decoder: torch.nn.Module
    decoder_path: str
    layers: tuple[torch.nn.Module, ...]
    hidden_size: int
    placeholder_ids: frozenset[int]
    streams_at: int | None = None
    bidirectional: bool = False
    logit_scale: float = 1.0

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
        candidates = [
            (module, child)
            for module in given.modules()
            for child in module.children()
            if isinstance(child, torch.nn.ModuleList) and len(child) == wanted
        ]
        decoder, layers = candidates[0] if candidates else (given, ())
        paths = [name for name, module in model.named_modules() if module is decoder]
        embeddings = model.get_input_embeddings()
        inside = any(module is embeddings for module in decoder.modules())
        if decoder is model or not paths or len(candidates) != 1 or not inside:
            raise SafeguardError(
                f"Could not find the language model's {wanted} decoder layers in "
                f"{type(model).__name__}: get_decoder() gives a {type(given).__name__} with "
                f"{len(candidates)} such lists of layers."
            )
        skipped = set(getattr(text_config, family.skipped, ()) or ()) if family.skipped else set()
        streams = getattr(text_config, family.streams) if family.streams else 1
        multiplier = getattr(text_config, family.multiplier) if family.multiplier else None
        divisor = getattr(text_config, family.divisor) if family.divisor else None
        return cls(
            model=model,
            decoder=decoder,
            decoder_path=paths[0],
            layers=tuple(layer for i, layer in enumerate(layers) if i not in skipped),
            hidden_size=int(text_config.hidden_size) * streams,
            placeholder_ids=placeholder_ids,
            streams_at=family.streams_at,
            bidirectional=family.bidirectional,
            logit_scale=(multiplier or 1.0) / (divisor or 1.0),
        )

    @property
    def text_token(self) -> int:
        """A token id that stands for text, whatever it says."""
        known = self.placeholder_ids
        return next(i for i in range(3, 4 + len(known)) if i not in known)

    @property
    def device(self) -> torch.device:
        """Where token ids have to be for this model."""
        return input_device(self.model)

    def run_text(
        self,
        rows: Sequence[Sequence[int]],
        answer: Sequence[int] = (),
        start: TextPass | None = None,
    ) -> torch.Tensor:
        """One pass of token `rows` through the decoder alone, left-padded.

        The last position of every row is its last token, for hooks on the layers, too.

        Args:
            rows: prompts.
            answer: what is said to each.
            start: a pass of the one text that all begin with, which is not read again.

        Returns:
            (rows, 1 + tokens of the answer, hidden) final states of the prompts' last tokens and
            of the answer's, from which the next ones are predicted.
        """
        output, _ = self._run([[*row, *answer] for row in rows], list(map(len, rows)), start)
        states: torch.Tensor = output.last_hidden_state
        return states[:, -1 - len(answer) :]

    def read_texts(
        self, texts: Sequence[tuple[int, ...]], start: TextPass | None = None
    ) -> TextPass:
        """The same as `run_text`, with what is needed to go on from it."""
        output, mask = self._run(texts, list(map(len, texts)), start, use_cache=True)
        cache = plain_cache(output.past_key_values)
        if start is not None and len(texts) > 1:
            cache, mask = padding_first(cache, mask)
        return TextPass(
            rows={text: row for row, text in enumerate(texts)},
            final=output.last_hidden_state[:, -1],
            mask=mask,
            cache=cache,
            head=self.next_token_logits,
        )

    def go_on(
        self, read: TextPass | None, texts: Sequence[tuple[int, ...]], answer: Sequence[int]
    ) -> torch.Tensor:
        """One pass of an answer behind texts.

        Args:
            read: a pass that it goes on from, if that holds them; else they are read again.

        Returns:
            (texts, tokens of the answer, hidden) final states of the answer's tokens.
        """
        if read is None or not read.holds(texts):
            return self.run_text(texts, answer)[:, 1:]
        output, _ = self._behind(read, texts, [answer] * len(texts))
        states: torch.Tensor = output.last_hidden_state
        return states

    def answer_log_probs(
        self, prompts: Sequence[Sequence[int]], answers: Sequence[Sequence[int]]
    ) -> list[torch.Tensor]:
        """Log-probability of each token of `answers` behind its prompt, text only, in one pass.

        Args:
            prompts: token ids without images; none is empty.
            answers: one for each prompt; an empty one gives an empty tensor.

        Returns:
            (tokens,) float32 each, in nats.
        """
        rows = [[*prompt, *answer] for prompt, answer in zip(prompts, answers, strict=True)]
        output, _ = self._run(rows, [len(prompt) for prompt in prompts])
        states: torch.Tensor = output.last_hidden_state
        log_probs_of = []
        for row, answer in enumerate(answers):
            # the state before a token predicts it; rows end at the right
            before = states[row, states.shape[1] - len(answer) - 1 : -1]
            log_probs = self.next_token_logits(before).log_softmax(-1)
            tokens = torch.tensor(list(answer), dtype=torch.long, device=log_probs.device)
            log_probs_of.append(log_probs.gather(-1, tokens[:, None])[:, 0])
        return log_probs_of

    def _run(
        self,
        rows: Sequence[Sequence[int]],
        prompts: Sequence[int],
        start: TextPass | None = None,
        *,
        use_cache: bool = False,
    ) -> tuple[Any, torch.Tensor]:
        """The decoder's output of left-padded `rows`, behind a start or whole, and their mask.

        Args:
            prompts: tokens at the start of each row that are its prompt; what follows is answer.
        """
        if start is not None:
            (begun,) = start.rows
            return self._behind(start, [begun] * len(rows), [row[len(begun) :] for row in rows])
        ids, mask, positions = _left_padded(rows, self.device)
        seen = _both_ways(self.model, ids, mask, positions, prompts) if self.bidirectional else mask
        output = self.decoder(
            input_ids=ids, attention_mask=seen, position_ids=positions, use_cache=use_cache
        )
        return output, mask

    def _behind(
        self, read: TextPass, texts: Sequence[tuple[int, ...]], rest: Sequence[Sequence[int]]
    ) -> tuple[Any, torch.Tensor]:
        """The decoder's output of each text's `rest`, left-padded behind it, and the whole mask."""
        ids, rest_mask, positions = _left_padded(rest, self.device)
        before = read.mask[read.places(texts)]
        mask = torch.cat([before, rest_mask], dim=1)
        output = self.decoder(
            input_ids=ids,
            attention_mask=mask,
            position_ids=before.sum(1, keepdim=True) + positions,
            past_key_values=read.cache_of(texts),
            use_cache=True,
        )
        return output, mask

    def next_token_logits(self, states: torch.Tensor) -> torch.Tensor:
        """(rows, vocabulary) float32 logits after final states of (rows, hidden)."""
        head = self.model.get_output_embeddings()
        weight = head.weight  # quantized, it is stored as bytes, or is no tensor
        plain = isinstance(weight, torch.Tensor) and weight.is_floating_point()
        dtype = weight.dtype if plain else self.model.dtype
        logits: torch.Tensor = head(states.to(_device_of(head), dtype)).float()
        logits = logits * self.logit_scale
        cap = getattr(self.model.config.get_text_config(), "final_logit_softcapping", None)
        return cap * torch.tanh(logits / cap) if cap else logits


def _left_padded(
    rows: Sequence[Sequence[int]], device: torch.device
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """(rows, width) ids, mask and positions."""
    width = max(map(len, rows))
    ids = torch.tensor([[0] * (width - len(row)) + list(row) for row in rows])
    left = torch.tensor([width - len(row) for row in rows])
    mask = (torch.arange(width) >= left[:, None]).long()
    positions = (mask.cumsum(-1) - 1).clamp(min=0)
    return ids.to(device), mask.to(device), positions.to(device)


def _both_ways(
    model: PreTrainedModel,
    ids: torch.Tensor,
    mask: torch.Tensor,
    positions: torch.Tensor,
    prompts: Sequence[int],
) -> Any:
    """The mask that the model itself gives its decoder for a prompt, here without an image.

    A token of the answer attends to earlier ones only.
    """
    counts = torch.tensor(list(prompts), device=mask.device)[:, None]
    answer = (mask * (positions >= counts)).long()
    make_masks: Any = model.create_masks_for_generate  # such families' own
    return make_masks(
        config=model.config,
        inputs_embeds=model.get_input_embeddings()(ids),
        attention_mask=mask,
        past_key_values=None,
        position_ids=positions,
        token_type_ids=answer,
    )


def model_inputs(
    model: PreTrainedModel,
    processor: ProcessorMixin,
    requests: Sequence[str],
    images: Sequence[Image | None],
) -> BatchFeature:
    """A left-padded batch with one image a request or none, where the model wants it."""
    shown = [[image] if image is not None else [] for image in images]
    chats = [chat_of(text, *images) for text, images in zip(requests, shown, strict=True)]
    return chat_inputs(model, processor, chats)


def chat_inputs(
    model: PreTrainedModel, processor: ProcessorMixin, chats: Sequence[Chat]
) -> BatchFeature:
    """A left-padded batch of conversations, where the model wants it."""
    device = input_device(model)
    return encode_chats(processor, chats).to(device, model.dtype)


def input_device(model: PreTrainedModel) -> torch.device:
    """Where token ids have to be for a model, which may be spread over several devices."""
    return _device_of(model.get_input_embeddings())


def _device_of(module: torch.nn.Module) -> torch.device:
    """Where a module computes, which is not where its weights lie if accelerate offloads them."""
    hook = getattr(module, "_hf_hook", None)
    for each in getattr(hook, "hooks", (hook,)):
        if (device := getattr(each, "execution_device", None)) is not None:
            return torch.device(device)
    weight: torch.Tensor = next(module.parameters())
    return weight.device
