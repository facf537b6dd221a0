"""The media of a conversation, as processors take them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from PIL.Image import Image
    from transformers import ProcessorMixin
    from transformers.video_utils import VideoMetadata

#: Videos of noise: (frames, height, width), frames a second and the first one's number. Their
#: times have one digit or several, and most numbers of frames are odd.
_VIDEOS = (
    ((1, 64, 64), 2.0, 0),
    ((2, 64, 64), 2.0, 0),
    ((3, 96, 64), 1.0, 9),
    ((5, 64, 128), 0.5, 40),
)
_SECONDS = (0.5, 1.3)


@dataclass(frozen=True)
class Video:
    """Frames as a processor takes them.

    Attributes:
        frames: (frames, height, width, 3) uint8.
        fps: frames a second.
        first: the number of the first one, from which its time follows.
    """

    frames: torch.Tensor
    fps: float = 2.0
    first: int = 0

    def metadata(self) -> VideoMetadata:
        """What a processor that samples no frames itself has to be told of them."""
        from transformers.video_utils import VideoMetadata

        count, height, width, _ = self.frames.shape
        return VideoMetadata(
            total_num_frames=self.first + count,
            fps=self.fps,
            width=width,
            height=height,
            duration=(self.first + count) / self.fps,
            frames_indices=list(range(self.first, self.first + count)),
        )


@dataclass(frozen=True)
class Shown:
    """The media of one conversation, in the order of its placeholders.

    Attributes:
        images: its images.
        videos: its videos.
        audios: (samples,) float32 waves each, at the processor's own rate.
        sound: (samples,) the sound of the only video, where the processor reads both together.
    """

    images: Sequence[Image] = ()
    videos: Sequence[Video] = ()
    audios: Sequence[torch.Tensor] = ()
    sound: torch.Tensor | None = None

    def arguments(self) -> dict[str, Any]:
        """What a processor takes besides images, for a batch of this conversation alone."""
        given: dict[str, Any] = {}
        if self.videos:
            given["videos"] = [video.frames.numpy() for video in self.videos]
            given["video_metadata"] = [video.metadata() for video in self.videos]
            given |= {"do_sample_frames": False, "return_metadata": True}
        if self.audios:
            given["audio"] = [wave.numpy() for wave in self.audios]
        if self.sound is not None:
            given["audio"] = [self.sound.numpy()]
            given |= {"load_audio_from_video": True, "audio_from_video_indices": [0]}
        return given


def noise_videos() -> list[Video]:
    """Videos of noise, of several sizes, lengths and times."""
    rng = torch.Generator().manual_seed(0)
    return [
        Video(torch.randint(256, (*size, 3), generator=rng, dtype=torch.uint8), fps, first)
        for size, fps, first in _VIDEOS
    ]


def noise_audios(processor: ProcessorMixin) -> list[torch.Tensor]:
    """(samples,) float32 waves of noise, of several lengths, at the rate the processor takes."""
    listener = getattr(processor, "audio_processor", getattr(processor, "feature_extractor", None))
    rate = getattr(listener, "sampling_rate", 16000)
    rng = torch.Generator().manual_seed(0)
    return [0.1 * torch.rand(int(length * rate), generator=rng) for length in _SECONDS]
