"""The receipt: what the guard did to one request, and why."""

from __future__ import annotations

from typing import Self

from pydantic import BaseModel, ConfigDict

from vlm_safeguard.policy.decision import Finding
from vlm_safeguard.policy.request import Request


class Receipt(BaseModel):
    """One row of a batch. Scores are centred: +1 is the harmful anchors' mean, −1 the harmless.

    Attributes:
        guarded: whether the row was edited.
        reason: one sentence that says why, or why not.
        images: images in the request.
        videos: videos in it.
        audios: audios in it; a video that was read with its sound counts as both.
        media_tokens: tokens that stood for all of these.
        text_tokens: tokens of the text-only view.
        generation_prompt: the form of the chat template's beginning of the answer; None where that
            is not known. Texts are judged behind the one that the model answers at once.
        prefill_tokens: tokens of the answer that the prompt already held.
        edit: name of the edit that was applied; None where the gate was closed.
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

    @classmethod
    def of(
        cls,
        request: Request,
        findings: tuple[Finding, ...],
        *,
        layers: tuple[int, ...],
        edit: str,
        harm: tuple[float, float] | None,
        policy: str,
    ) -> Self:
        """Written down from what was decided and done; nothing is decided here.

        Args:
            layers: that were edited.
            edit: the name of the policy's edit.
            harm: scores before and after it; None where the row was not edited.
        """
        guarded = bool(layers)
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
            edit=edit if guarded else None,
            layers=layers,
            findings=findings,
            harm_before=harm[0] if harm else None,
            harm_after=harm[1] if harm else None,
            policy=policy,
        )
