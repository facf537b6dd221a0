"""What happens to a request whose gate is open."""

from __future__ import annotations

from enum import StrEnum


class Response(StrEnum):
    """How it is answered.

    An answer from the text alone is a function of the text: no image moves it. The edit leaves the
    image in the answer, and an adversarial one can work against it.
    """

    EDIT = "edit"  # VLM-Guard's: its states are edited beside the image
    TEXT = "text"  # from the text alone, as the language model answers it
    REFUSAL = "refusal"  # likewise; it begins with the words that the model refuses in

    @classmethod
    def named(cls, name: str) -> Response:
        """The response of this name.

        Raises:
            ValueError: there is none; the message names those that there are.
        """
        names = [str(response) for response in cls]
        if name not in names:
            raise ValueError(f"there is no response '{name}'; there are {', '.join(names)}")
        return cls(name)


#: Of a guard that is fitted without a word about it.
DEFAULT_RESPONSE = Response.REFUSAL
