"""What vLLM's scheduler gives to a worker, as the guard reads it."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Self

from vlm_safeguard.engines.vllm.marks import Mark
from vlm_safeguard.errors import SafeguardError


@dataclass(frozen=True)
class Admitted:
    """A request that a worker is given.

    Attributes:
        request: its id in the worker.
        mark: that it bears.
        prompt: tokens of its prompt.
    """

    request: str
    mark: Mark
    prompt: int

    @classmethod
    def of(
        cls, policy: str, request: str, arguments: Mapping[str, Any] | None, prompt: int
    ) -> Self:
        """Read a request's `extra_args`.

        Raises:
            SafeguardError: it is not marked, or not of this policy. That ends the engine: it did
                not come through the guarded client.
        """
        mark = Mark.of(arguments)
        if mark.policy != policy:
            raise SafeguardError(
                f"A request of policy {mark.policy[:12]} came to workers of {policy[:12]}, so it "
                "is not answered."
            )
        return cls(request, mark, prompt)


@dataclass(frozen=True)
class Scheduled:
    """One request's part of a pass.

    Attributes:
        request: its id in the worker.
        start: position of its first token in the pass.
        count: tokens of it in the pass.
        tokens: ids of the request's tokens, at least up to there.
    """

    request: str
    start: int
    count: int
    tokens: Sequence[int]


def placed(batch: Iterable[Scheduled]) -> Iterator[tuple[int, Scheduled]]:
    """Each part with the flattened row of its first token.

    A request's tokens in a pass stand one behind the other, and request after request.
    """
    row = 0
    for part in batch:
        yield row, part
        row += part.count
