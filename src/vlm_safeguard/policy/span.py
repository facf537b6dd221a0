"""Which tokens of an open request are edited."""

from __future__ import annotations

from enum import IntEnum


class Span(IntEnum):
    """Each holds the tokens of the one before; what follows attends to all of them."""

    LAST = 0  # the prompt's last token
    REQUEST = 1  # all of the prompt's text from its first image on
    OPENING = 2  # … and of the answer, for as long as it follows the model's refusal prefix
    ANSWER = 3  # … and every token of the answer, each as the prompt's last one

    def __str__(self) -> str:
        return self.name.lower()

    @classmethod
    def named(cls, name: str) -> Span:
        """The span of this name, in lower case.

        Raises:
            ValueError: there is none; the message names those that there are.
        """
        if name not in (names := [str(span) for span in cls]):
            raise ValueError(f"there is no span '{name}'; there are {', '.join(names)}")
        return cls[name.upper()]
