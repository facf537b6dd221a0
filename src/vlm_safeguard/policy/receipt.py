"""The receipt: what the guard did to one request, and why."""

from __future__ import annotations

from typing import Self

from pydantic import BaseModel, ConfigDict

from vlm_safeguard.policy.decision import Finding
from vlm_safeguard.policy.media import Media, counted
from vlm_safeguard.policy.request import Request
from vlm_safeguard.policy.response import Response


class Receipt(BaseModel):
    """One row of a batch. Scores are centred: +1 is the harmful anchors' mean, −1 the harmless.

    Attributes:
        guarded: whether the gate was open, so that the row was not answered as it came.
        reason: one sentence that says why, or why not.
        images: images in the request.
        videos: videos in it.
        audios: audios in it; a video that was read with its sound counts as both.
        media_tokens: tokens that stood for all of these.
        text_tokens: tokens of the text-only view.
        generation_prompt: the form of the chat template's beginning of the answer; None where that
            is not known. Texts are judged behind the one that the model answers at once.
        prefill_tokens: tokens of the answer that the prompt already held.
        response: how the row was answered, its gate being open; None where that was closed.
        not_used: what of the request had no part in the answer; None where all had.
        edit: name of the edit that was applied; None where none was.
        layers: the layers that were edited.
        findings: what each of the gate's criteria made of the request.
        harm_before: harm score of the last prompt token at the first edited layer, as it came.
        harm_after: the same after the edit.
        policy: sha256 of the policy that decided, in hex.
    """

    model_config = ConfigDict(frozen=True)

    guarded: bool
    reason: str
    images: int
    videos: int
    audios: int
    media_tokens: int
    text_tokens: int
    generation_prompt: str | None
    prefill_tokens: int
    response: Response | None
    not_used: str | None
    edit: str | None
    layers: tuple[int, ...]
    findings: tuple[Finding, ...]
    harm_before: float | None
    harm_after: float | None
    policy: str

    @property
    def scores(self) -> dict[str, float]:
        """All criteria's measures, by name."""
        return {name: x for finding in self.findings for name, x in finding.measures.items()}

    @property
    def media(self) -> str:
        """What the request shows, counted: "2 images, 1 audio"; empty where it shows nothing."""
        return Media(self.images, self.videos, self.audios).in_words

    @classmethod
    def of(
        cls,
        request: Request,
        findings: tuple[Finding, ...],
        *,
        response: Response | None,
        layers: tuple[int, ...],
        edit: str,
        harm: tuple[float, float] | None,
        policy: str,
    ) -> Self:
        """Written down from what was decided and done; nothing is decided here.

        Args:
            response: of an open gate; None where it is closed.
            layers: where it is open.
            edit: the name of the policy's edit.
            harm: scores before and after it; None where the row was not edited.
        """
        guarded = response is not None
        edited = response is Response.EDIT
        sentences = [f.sentence for f in findings if f.opened == guarded and f.sentence]
        unasked = f"no image, video or audio in the request, and '{edit}' only mends what these do"
        return cls(
            guarded=guarded,
            reason=sentences[0] if findings else unasked,
            images=request.media.images,
            videos=request.media.videos,
            audios=request.media.audios,
            media_tokens=request.media.tokens,
            text_tokens=len(request.text),
            generation_prompt=request.generation_prompt,
            prefill_tokens=len(request.prefill),
            response=response,
            not_used=None if edited or not guarded else _left_out(request),
            edit=edit if edited else None,
            layers=layers if edited else (),
            findings=findings,
            harm_before=harm[0] if harm else None,
            harm_after=harm[1] if harm else None,
            policy=policy,
        )


def _left_out(request: Request) -> str:
    """What an answer from the text alone does not use."""
    prefill = len(request.prefill)
    begun = f"{counted(prefill, 'token')} of a begun answer" if prefill else ""
    return ", ".join(filter(None, (request.media.in_words, begun)))
