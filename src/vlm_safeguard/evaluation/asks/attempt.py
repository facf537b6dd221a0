"""An attempt: what an attack made of one ask, and what that took."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from pydantic import BaseModel, ConfigDict

from vlm_safeguard.evaluation.asks.images import opened
from vlm_safeguard.model.conversation import Chat, Turn, rephrased, request_text

if TYPE_CHECKING:
    from PIL.Image import Image

AttackName = Literal["none", "pgd", "universal", "prefill", "suffix"]
NO_ATTACK: AttackName = "none"
_MARKS = " .?!…"
UNBOUNDED = 255  # levels, out of as many


class Attempt(BaseModel):
    """How one request is asked under an attack.

    Attributes:
        attack: by name; `none` for the same request beside the same image as it is.
        epsilon: by how many of 255 levels a pixel may differ from the image's; None where no
            pixel is changed.
        through: the defence that it was made through, with its gradients; "none" where it is
            transferred from the undefended model; None where nothing was optimised.
        image: the image that is shown, relative to the evaluation's folder; None for text alone.
        suffix: what is written behind the request, in the place of its last mark.
        prefill: what the answer begins with.
        loss: what the attack lowered, in logits or nats: where it began, and where it ended.
        steps: gradients that were taken for it, of all restarts.
        seconds: that its batch took, shared out among its requests.
    """

    model_config = ConfigDict(frozen=True)

    attack: AttackName
    epsilon: int | None = None
    through: str | None = None
    image: str | None = None
    suffix: str = ""
    prefill: str = ""
    loss: tuple[float, float] | None = None
    steps: int = 0
    seconds: float = 0.0

    def chat(self, chat: Chat, folder: Path) -> Chat:
        """A conversation as it is asked under the attack.

        Args:
            chat: as it is asked without.
            folder: of the evaluation.

        Raises:
            SafeguardError: the image cannot be read.
        """
        if self.image is not None:
            chat = with_image(chat, opened(folder / self.image))
        if self.suffix:
            chat = behind(chat, self.suffix)
        return (*chat, Turn("assistant", (self.prefill,))) if self.prefill else chat


def behind(chat: Chat, suffix: str) -> Chat:
    """A conversation whose request goes on in a suffix, without the mark that it ended with."""
    return rephrased(chat, request_text(chat).rstrip(_MARKS) + suffix)


def with_image(chat: Chat, image: Image) -> Chat:
    """A conversation with this image in the place of its own."""
    return tuple(
        replace(
            turn, content=tuple(part if isinstance(part, str) else image for part in turn.content)
        )
        for turn in chat
    )
