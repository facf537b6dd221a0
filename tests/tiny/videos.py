"""What stands where a processor asks for a video processor."""

from __future__ import annotations

from typing import Any

from transformers import ProcessorMixin
from transformers.video_processing_utils import VideoProcessorMixin


class NoVideos(VideoProcessorMixin):
    """Stands where a processor asks for a video processor: the real ones need torchvision."""

    slice_mode, downsample_mode, merge_size = True, "16x", 2


def without_videos(processor_class: type[ProcessorMixin]) -> Any:
    """The class, taking `NoVideos` or none; its own check of types needs torchvision, too."""

    def check(self: ProcessorMixin, name: str, argument: Any) -> Any:
        if name == "video_processor":
            return NoVideos
        return processor_class.check_argument_for_proper_class(self, name, argument)

    changed = {"check_argument_for_proper_class": check}
    return type(processor_class.__name__, (processor_class,), changed)
