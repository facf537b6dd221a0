"""Last-token hidden states after every decoder layer, streamed by hooks.

Only one row of each layer's output is ever kept, so memory does not depend on sequence length.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from typing import TYPE_CHECKING, Any

import torch

from vlm_safeguard.model.backbone import Backbone, model_inputs
from vlm_safeguard.model.text_pass import TextPass
from vlm_safeguard.policy.token_ids import shared_start
from vlm_safeguard.progress import bar

if TYPE_CHECKING:
    from PIL.Image import Image
    from transformers import ProcessorMixin


def hidden_states(output: Any, streams_at: int | None = None) -> torch.Tensor:
    """The residual stream in a decoder layer's output, (batch, tokens, hidden).

    Args:
        streams_at: the dimension that counts several streams, which are put side by side.
    """
    state: torch.Tensor = output[0] if isinstance(output, tuple) else output
    return state if streams_at is None else state.movedim(streams_at, -2).flatten(-2)


def with_hidden_states(output: Any, states: torch.Tensor, streams_at: int | None = None) -> Any:
    """A decoder layer's output with another residual stream in it, as `hidden_states` gives it."""
    if streams_at is not None:
        given = output[0] if isinstance(output, tuple) else output
        apart = states.reshape(*states.shape[:-1], given.shape[streams_at], -1)
        states = apart.movedim(-2, streams_at)
    return (states, *output[1:]) if isinstance(output, tuple) else states


class _Enough(Exception):  # noqa: N818 - not an error
    """Raised by a hook to leave a pass whose later layers nobody asked for."""


@contextmanager
def capture_last_token(
    backbone: Backbone, *, upto: int | None = None
) -> Iterator[dict[int, torch.Tensor]]:
    """While open, layer index → (batch, hidden) states of the last position, of the last pass.

    They have gradients where the pass has.

    Args:
        upto: the last layer that is needed, from where a pass is left by an `_Enough`.
    """
    states: dict[int, torch.Tensor] = {}

    def keep(layer: int) -> Any:
        def hook(module: torch.nn.Module, args: Any, output: Any) -> None:
            states[layer] = hidden_states(output, backbone.streams_at)[:, -1].clone()
            if layer == upto:
                raise _Enough

        return hook

    handles = [
        module.register_forward_hook(keep(index)) for index, module in enumerate(backbone.layers)
    ]
    try:
        yield states
    finally:
        for handle in handles:
            handle.remove()


@torch.inference_mode()
def text_states(
    backbone: Backbone,
    rows: Sequence[Sequence[int]],
    *,
    batch_size: int = 32,
    label: str = "text",
) -> tuple[torch.Tensor, torch.Tensor]:
    """Hidden states h_l(q) of requests without images, as token ids in the chat template.

    Returns:
        (requests, layers, hidden) states after each layer, and (requests, hidden) final ones,
        which predict the next token; float32, on the CPU.
    """
    order = sorted(range(len(rows)), key=lambda index: len(rows[index]))
    start = read_start(backbone, rows)
    result = torch.empty(len(rows), len(backbone.layers), backbone.hidden_size)
    final = torch.empty(len(rows), backbone.model.config.get_text_config().hidden_size)
    with capture_last_token(backbone) as states, _progress(len(rows), label) as shown:
        for first in range(0, len(order), batch_size):
            batch = order[first : first + batch_size]
            texts = [rows[index] for index in batch]
            final[batch] = backbone.run_text(texts, start=start)[:, 0].float().cpu()
            result[batch] = _stack(states)
            shown.update(len(batch))
    return result, final


@torch.inference_mode()
def image_states(
    backbone: Backbone,
    processor: ProcessorMixin,
    requests: Sequence[str],
    images: Sequence[Image],
    *,
    upto: int | None = None,
    batch_size: int = 32,
    label: str = "with image",
) -> torch.Tensor:
    """Hidden states h_l(Q) of requests with one image each, through the model.

    Args:
        upto: the last layer that is needed; all by default.

    Returns:
        (requests, layers, hidden), float32, on the CPU; layers up to `upto`.
    """
    order = sorted(range(len(requests)), key=lambda index: len(requests[index]))
    count = len(backbone.layers) if upto is None else upto + 1
    result = torch.empty(len(requests), count, backbone.hidden_size)
    with (
        capture_last_token(backbone, upto=upto) as states,
        _progress(len(requests), label) as shown,
    ):
        for start in range(0, len(order), batch_size):
            batch = order[start : start + batch_size]
            inputs = model_inputs(
                backbone.model,
                processor,
                [requests[index] for index in batch],
                [images[index] for index in batch],
            )
            with suppress(_Enough):
                backbone.model(**inputs, use_cache=False, logits_to_keep=1)
            result[batch] = _stack(states)
            shown.update(len(batch))
    return result


def read_start(
    backbone: Backbone, rows: Sequence[Sequence[int]], answer: int = 0
) -> TextPass | None:
    """A pass of what all rows begin with, such as a system prompt, so that it is read once.

    Each row's last token is left to be read. None where it cannot be gone on from.

    Args:
        answer: tokens that follow each row.
    """
    if len(rows) < 2 or backbone.bidirectional:
        return None
    start = tuple(shared_start([row[:-1] for row in rows]))
    if not start:
        return None
    read = backbone.read_texts([start])
    return read if read.reaches(max(map(len, rows)) + answer) else None


def _stack(states: dict[int, torch.Tensor]) -> torch.Tensor:
    return torch.stack([states[layer].float().cpu() for layer in sorted(states)], dim=1)


def _progress(total: int, label: str) -> Any:
    return bar(total, f"hidden states, {label}", "request")
