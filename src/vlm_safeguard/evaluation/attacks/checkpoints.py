"""What attacks have made so far: on the disk before it is used, so that a run goes on with it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from pydantic import BaseModel

from vlm_safeguard.evaluation.answers.journal import Journal
from vlm_safeguard.evaluation.results.images import save_image

if TYPE_CHECKING:
    from PIL.Image import Image

Result = TypeVar("Result", bound=BaseModel)


class Checkpoints:
    """Of one evaluation: `attempts.jsonl` and the images in its folder."""

    def __init__(
        self,
        folder: Path,
        of: Sequence[Any],
        report: Callable[[str, int, int], None] = lambda what, done, total: None,
    ) -> None:
        """What is there already is taken.

        Args:
            folder: of the evaluation.
            of: what all results depend on, such as the model, as JSON holds it.
            report: called with (what is being made, steps done, steps in all).
        """
        self.folder = folder
        self.report = report
        self._of = list(of)
        self._journal = Journal(folder / "attempts.jsonl")

    def kept(self, key: Sequence[Any], kind: type[Result], make: Callable[[], Result]) -> Result:
        """The result kept under a key, or one that is made now and kept."""
        return self._journal.kept([*self._of, *key], kind, make)

    def save(self, image: Image) -> str:
        """Write an image, and say where, relative to the folder."""
        return save_image(image, self.folder)
