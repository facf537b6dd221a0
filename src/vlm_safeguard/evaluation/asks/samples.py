"""What is asked of a model, and where it comes from: samples and the benchmarks they belong to."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from vlm_safeguard.errors import SafeguardError
from vlm_safeguard.evaluation.asks.obtain import NotInFolderError, obtain

if TYPE_CHECKING:
    from PIL.Image import Image

Kind = Literal["harmful", "harmless", "utility"]


@dataclass(frozen=True)
class Sample:
    """One request of a benchmark.

    Attributes:
        id: unique within its benchmark, and stable.
        text: the request itself: what is asked, judged, and refused or not.
        image: the benchmark's own image.
        answer: for utility, the right answer, one of `choices`.
        choices: for utility, all answers; right is who names `answer` and no other.
        beside: what is written beside `image` where the image carries the request, so that
            `text` would be said twice; None where `text` stands beside it.
    """

    id: str
    kind: Kind
    text: str
    category: str = ""
    image: Image | Path | None = None
    answer: str | None = None
    choices: tuple[str, ...] = ()
    beside: str | None = None


@dataclass(frozen=True)
class Benchmark:
    """A set of samples and how it is obtained.

    Attributes:
        licence: of the data.
        source: where it is published, in which layout, and what `load` takes.
        count: of samples; another number is an error.
        own_images: whether samples carry images (the condition "own").
        read: the samples of a file or folder in the original layout; of None, if it is shipped.
        hub: the data set on the Hub that holds this layout, if there is one.
        files: patterns of the files fetched from there; none for what is shipped.
    """

    name: str
    title: str
    kinds: frozenset[Kind]
    licence: str
    source: str
    count: int
    own_images: bool
    read: Callable[[Path], list[Sample]]
    hub: str | None = None
    files: tuple[str, ...] = ()

    @property
    def usual_condition(self) -> str:
        """The image condition it is meant for: its own images where it has some."""
        return "own" if self.own_images else "text"

    @property
    def shipped(self) -> bool:
        """Whether it comes with the package."""
        return not self.files

    def load(self, path: str | Path | None = None) -> list[Sample]:
        """All samples, in the original's order.

        Args:
            path: a local file or folder in the original layout, or a data set on the Hub
                ("owner/name", "owner/name@revision"); `hub` by default.

        Raises:
            SafeguardError: it is not there, not complete, or not in its layout; the message says
                which line is wrong, or how to get the data.
        """
        if self.shipped:
            if path is not None:
                raise SafeguardError(f"'{self.name}' comes with the package; it takes no path.")
            return self._whole(self.read(Path()), "the package")
        root = obtain(path or self.hub, self.files, f"{self.title}: {self.source}")
        try:
            samples = self.read(root)
        except NotInFolderError as error:
            raise SafeguardError(f"{error} {self.title}: {self.source}") from error
        return self._whole(samples, str(root))

    def _whole(self, samples: list[Sample], where: str) -> list[Sample]:
        if len(samples) != self.count:
            raise SafeguardError(
                f"{where} holds {len(samples)} samples of {self.title}; the original has "
                f"{self.count}. Get it again: {self.source}"
            )
        seen: set[str] = set()
        for sample in samples:
            if sample.id in seen:
                raise SafeguardError(f"{where} holds the sample '{sample.id}' twice.")
            seen.add(sample.id)
        return samples
