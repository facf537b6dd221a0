"""Stand-ins for video processors, whose own need torchvision: the same outputs, by plain cutting.

Frames are neither sampled nor scaled, so a video's sides are multiples of a merged patch. What the
families' processors write for a video, they write themselves.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from transformers import BatchFeature, ProcessorMixin
from transformers.video_processing_utils import VideoProcessorMixin
from transformers.video_utils import make_batched_metadata, make_batched_videos

Frames = np.ndarray  #: (frames, height, width, 3) uint8


class Videos(VideoProcessorMixin):
    """A grid of patches, groups of frames x rows x columns, as Qwen's and most others."""

    patch_size, merge_size, temporal_patch_size = 4, 2, 2

    def __init__(self, **attributes: Any) -> None:
        super().__init__()
        for name, value in attributes.items():
            setattr(self, name, value)

    def __call__(self, videos: Any, video_metadata: Any = None, **kwargs: Any) -> BatchFeature:
        frames = [np.asarray(video) for video in make_batched_videos(videos)]
        metadata = make_batched_metadata(frames, video_metadata)
        outputs = {**self.outputs(frames), "video_metadata": metadata}
        return BatchFeature(outputs)

    def grid(self, video: Frames) -> tuple[int, int, int]:
        """Groups of frames, rows and columns of patches."""
        count, height, width, _ = video.shape
        groups = -(-count // self.temporal_patch_size)
        return groups, height // self.patch_size, width // self.patch_size

    def outputs(self, videos: list[Frames]) -> dict[str, Any]:
        grids = [self.grid(video) for video in videos]
        length = 3 * self.temporal_patch_size * self.patch_size**2
        return {
            "pixel_values_videos": torch.cat(
                [_noise(int(np.prod(grid)), length, seed=i) for i, grid in enumerate(grids)]
            ),
            "video_grid_thw": torch.tensor(grids),
        }


class PixelVideos(Videos):
    """Whole frames, as LLaVA's relatives take them."""

    side = 32

    def outputs(self, videos: list[Frames]) -> dict[str, Any]:
        frames = [_noise(len(video), 3, self.side, self.side, seed=0) for video in videos]
        same = len({len(video) for video in videos}) == 1
        return {"pixel_values_videos": torch.stack(frames) if same else frames}


class SmolVideos(Videos):
    """Whole frames under the name of images, as SmolVLM's."""

    num_frames, fps = 64, 1

    def outputs(self, videos: list[Frames]) -> dict[str, Any]:
        most = max(map(len, videos))
        return {"pixel_values": _noise(len(videos), most, 3, 32, 32, seed=0)}


class SoftTokenVideos(Videos):
    """As many tokens a frame as it has patches, as Gemma 4's."""

    def outputs(self, videos: list[Frames]) -> dict[str, Any]:
        grids = [self.grid(video) for video in videos]
        return {"num_soft_tokens_per_video": [rows * columns // 4 for _, rows, columns in grids]}


class ChunkedVideos(Videos):
    """A grid for every chunk of frames, as Kimi's."""

    temporal_patch_size = 4

    def outputs(self, videos: list[Frames]) -> dict[str, Any]:
        grids = [self.grid(video) for video in videos]
        return {
            "video_grid_thw": torch.tensor(
                [(1, *grid[1:]) for grid in grids for _ in range(grid[0])]
            ),
            "num_chunks_per_video": [grid[0] for grid in grids],
        }


class CompressedVideos(Videos):
    """A grid, and which of its patches are kept, as VideoLLaMA 3's: here all of them."""

    temporal_patch_size = 1

    def outputs(self, videos: list[Frames]) -> dict[str, Any]:
        outputs = super().outputs(videos)
        kept = int(outputs["video_grid_thw"].prod(-1).sum()) // self.merge_size**2
        return {
            **outputs,
            "video_merge_sizes": torch.full((len(videos),), self.merge_size),
            "video_compression_mask": torch.ones(kept, dtype=torch.bool),
        }


class SlicedVideos(Videos):
    """The size of every frame and its grid of slices, as MiniCPM's: here none is sliced."""

    slice_mode, downsample_mode = True, "16x"
    max_slice_nums = 1

    def outputs(self, videos: list[Frames]) -> dict[str, Any]:
        grids = [self.grid(video)[1:] for video in videos for _ in video]
        return {
            "target_sizes_videos": torch.tensor(grids),
            "grids_videos": torch.zeros(len(grids), 2, dtype=torch.int),
            "num_frames_per_video": [len(video) for video in videos],
        }


class PooledVideos(Videos):
    """Frames, rows and columns of a video, as Molmo 2's."""

    max_fps = 2

    def outputs(self, videos: list[Frames]) -> dict[str, Any]:
        rows = [(len(video), *self.grid(video)[1:]) for video in videos]
        return {"video_grids": torch.tensor(rows)}


def with_videos(processor_class: type[ProcessorMixin]) -> Any:
    """The class, taking a stand-in or none; its own check of types needs torchvision, too."""

    def check(self: ProcessorMixin, name: str, argument: Any) -> Any:
        if name == "video_processor":
            return Videos
        return processor_class.check_argument_for_proper_class(self, name, argument)

    changed = {"check_argument_for_proper_class": check}
    return type(processor_class.__name__, (processor_class,), changed)


def _noise(*shape: int, seed: int) -> torch.Tensor:
    return torch.rand(shape, generator=torch.Generator().manual_seed(seed))
