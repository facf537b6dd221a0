"""How large a guarded vLLM has to be: from what was measured, and assumptions that it states.

A request is taken to cost as much as the tokens that are read and written for it. What the guard
adds is counted so, set beside what it was measured to add, and carried over to large models by the
worst ratio of the two.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from grid import head

_EDITS = "a guard that edits"
#: How replicas are guarded, as `benchmarks/vllm_cost.py` names it, and here.
_SETTINGS = {"together": "`together`", "first": "`first`", _EDITS: "edits"}
_MEASURED = {"pocket": "Pocket VLM", "large": "stand-in"}
_REPLICAS = (8, 64, 512)
_HOURS = 730  # of a month
_TEXT, _OPEN = 0.2, 0.2  # of requests: without an image, and with one and an open gate
_IN_FLIGHT = 256  # requests of one replica
_PASS = 8192  # tokens that one pass may hold
_BYTES = 4  # of a logit and of a coordinate, float32
_EDITED = 0.5  # of the layers, where states are edited
_RANK = 64  # directions of an edited layer, as `fit` has them


@dataclass(frozen=True)
class Tokens:
    """Of one request, on average.

    Attributes:
        text: of its prompt, less the image.
        refusal: its words, which may be read behind the text.
    """

    image: float
    text: float
    answer: float
    refusal: float

    @property
    def unguarded(self) -> float:
        """That are read and written for it."""
        return (1 - _TEXT) * self.image + self.text + self.answer

    def asked(self, setting: str) -> float:
        """That the guard reads besides: questions, and prompts of open requests' answers.

        The words of a refusal are asked for, too, where states are edited along them. Else they are
        for few requests, which are not counted.
        """
        if setting == _EDITS:
            return (1 - _TEXT) * (self.text + self.refusal)
        return (1 - _TEXT + _OPEN) * self.text

    def saved(self, setting: str) -> float:
        """That need not be read: what open requests show, where they are asked first, unedited."""
        return _OPEN * (self.image + self.text) if setting == "first" else 0.0


@dataclass(frozen=True)
class Model:
    """One to size for; its numbers are of its published configuration, or assumed.

    Attributes:
        hidden: width of a state.
        gpus: of one replica.
    """

    name: str
    tokens: Tokens
    vocabulary: int
    layers: int
    hidden: int
    gpus: int


_MODELS = (
    Model("7B", Tokens(576, 60, 150, 12), 32_064, 32, 4096, 1),  # LLaVA-1.5's shape
    Model(
        "72B", Tokens(1296, 60, 150, 12), 152_064, 80, 8192, 4
    ),  # Qwen2.5-VL's, 1008 × 1008 pixels
)


def sizing(folder: Path) -> Iterator[str]:
    """What tokens predict beside what was measured, and what follows for large models."""
    dear = 0.0
    yield from head("measured on", "guarded", "tokens asked", "tokens saved", "time added")
    for name, tokens, setting, time in _costs(folder):
        asked, saved = _shares(tokens, setting)
        dear = max(dear, (time + saved) / asked)
        yield (
            f"| {name} | {_SETTINGS[setting]} | {_percent(asked)} | {_percent(saved)} | "
            f"{_percent(time)} |"
        )
    yield (
        f"\nSo a token that the guard asks about is taken to cost {dear:.2f} times another, which "
        "is the worst of these.\n"
    )
    yield from head(
        *("model", "guarded", "tokens asked", "tokens saved", "throughput"),
        *(f"GPUs for the traffic of {count} replicas" for count in _REPLICAS),
        "GPU hours a month, at the last",
    )
    for model in _MODELS:
        for setting, title in _SETTINGS.items():
            asked, saved = _shares(model.tokens, setting)
            takes = 1 + dear * asked - saved
            more = [max(0, math.ceil(count * takes) - count) * model.gpus for count in _REPLICAS]
            gpus = [f"{model.gpus * n} + {m}" for n, m in zip(_REPLICAS, more, strict=True)]
            yield (
                f"| {model.name} | {title} | {_percent(asked)} | {_percent(saved)} | "
                f"{1 / takes:.2f} | {' | '.join(gpus)} | + {more[-1] * _HOURS:,} |"
            )
    yield ""
    yield from head("memory", *(model.name for model in _MODELS))
    for title, size in {
        "logits of a refusal's words": _logits,
        "where states are edited: buffers of the layers": _buffers,
        f"… coordinates that travel with {_IN_FLIGHT * _OPEN:.0f} open requests": _references,
    }.items():
        yield f"| {title} | {' | '.join(f'{size(m) / 1e6:.0f} MB' for m in _MODELS)} |"
    yield (
        f"| … work of the edits, of all that a token takes | "
        f"{' | '.join(f'{100 * _work(m):.1f} %' for m in _MODELS)} |"
    )


def assumptions() -> Iterator[str]:
    """What the sizes rest on."""
    yield (
        f"- Traffic: {100 * (1 - _TEXT - _OPEN):.0f} % benign requests with an image, "
        f"{100 * _TEXT:.0f} % without one, {100 * _OPEN:.0f} % with an image and an open gate."
    )
    for model in _MODELS:
        n = model.tokens
        yield (
            f"- {model.name}: an image of {n.image:.0f} tokens, a text of {n.text:.0f}, an answer "
            f"of {n.answer:.0f}, a refusal's words of {n.refusal:.0f}; {model.layers} layers of "
            f"width {model.hidden}, a vocabulary of {model.vocabulary:,}; "
            f"{model.gpus} GPU{'s' * (model.gpus > 1)} a replica."
        )
    yield (
        f"- A month has {_HOURS} hours; a replica has {_IN_FLIGHT} requests in flight, and passes "
        f"of {_PASS:,} tokens at most. Where states are edited, that is in "
        f"{100 * _EDITED:.0f} % of the layers and {_RANK} directions of each."
    )


def _costs(folder: Path) -> Iterator[tuple[str, Tokens, str, float]]:
    """(model, tokens of a request, setting, share of time added) of what was measured."""
    for size, name in _MEASURED.items():
        result: dict[str, Any] = json.loads((folder / f"vllm-cost-{size}.json").read_text("utf-8"))
        n = result["tokens"]
        tokens = Tokens(n["image"], n["prompt"] - n["image"], n["answer"], n["refusal"])
        for cost in result["costs"]:
            if cost["setting"] in _SETTINGS:
                yield name, tokens, cost["setting"], 1 / cost["throughput"]["median"] - 1


def _shares(tokens: Tokens, setting: str) -> tuple[float, float]:
    """Tokens asked and saved, of all that a request takes unguarded."""
    return tokens.asked(setting) / tokens.unguarded, tokens.saved(setting) / tokens.unguarded


def _logits(model: Model) -> float:
    return (model.tokens.text + model.tokens.refusal) * model.vocabulary * _BYTES


def _buffers(model: Model) -> float:
    """Of each edited layer: the coordinates of a pass, and those that they are edited towards."""
    return _EDITED * model.layers * 2 * _PASS * _RANK * _BYTES


def _references(model: Model) -> float:
    tokens = model.tokens.text + model.tokens.refusal
    return _IN_FLIGHT * _OPEN * tokens * _EDITED * model.layers * _RANK * _BYTES


def _work(model: Model) -> float:
    """Two products with an edited layer's directions, over some 12 d² weights of every layer."""
    return _EDITED * 2 * _RANK / (12 * model.hidden)


def _percent(share: float) -> str:
    return f"{100 * share:.0f} %"
