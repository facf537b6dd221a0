"""What texts begin with, a system prompt say, read once and kept for the texts to come."""

from __future__ import annotations

from vlm_safeguard.model.backbone import Backbone
from vlm_safeguard.model.text_pass import TextPass

_TOKENS = 1024  # of all that are kept; the latest one may be longer
_Start = tuple[int, ...]


class TextStarts:
    """Passes of one model, which has to be the same as long as they are kept."""

    def __init__(self) -> None:
        """Nothing is read yet."""
        self._kept: dict[_Start, TextPass] = {}  # the latest last

    def of(self, backbone: Backbone, start: _Start, longest: int) -> TextPass | None:
        """The pass over a start; it is made where it is not kept.

        Whether it was kept changes no number: texts go on from a pass over their start alone.

        Args:
            start: what texts begin with, one token at least.
            longest: tokens of the longest text.

        Returns:
            None where such texts cannot go on from it.
        """
        if backbone.bidirectional:  # what comes later changes what a token is
            return None
        read = self._kept.pop(start, None) or backbone.read_texts([start])
        self._kept[start] = read
        while len(self._kept) > 1 and sum(map(len, self._kept)) > _TOKENS:
            del self._kept[next(iter(self._kept))]
        return read if read.reaches(longest + 1) else None  # one more, or a window drops a token

    def clear(self) -> None:
        """Forget all of them."""
        self._kept.clear()
