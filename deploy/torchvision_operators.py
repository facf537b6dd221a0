"""Put behind torchvision/extension.py where its library cannot be loaded (no CUDA).

The package's own modules describe these two operators, which nobody calls here.
"""

for _name in () if _has_ops() else ("nms", "qnms"):  # noqa: F821
    torch.library.define(  # noqa: F821
        f"torchvision::{_name}", "(Tensor dets, Tensor scores, float iou_threshold) -> Tensor"
    )
