"""Keep open vision-language models as safe with an image as they are without one.

>>> guard = Guard.fit(model, processor)
>>> with guard.attach(model):
...     output = model.generate(**inputs)
>>> guard.receipts
"""

from __future__ import annotations

from importlib import import_module
from importlib.metadata import version
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from vlm_safeguard.anchors import Anchor, read_anchors
    from vlm_safeguard.errors import SafeguardError
    from vlm_safeguard.guard import Guard
    from vlm_safeguard.policy.receipt import Receipt
    from vlm_safeguard.policy.response import Response

__version__ = version("vlm-safeguard")
__all__ = ["Anchor", "Guard", "Receipt", "Response", "SafeguardError", "read_anchors"]

_HOME = {
    "Anchor": "anchors",
    "Guard": "guard",
    "Receipt": "policy.receipt",
    "Response": "policy.response",
    "SafeguardError": "errors",
    "read_anchors": "anchors",
}


def __getattr__(name: str) -> Any:
    """Import on first use: `--help` must not wait for torch."""
    if name in _HOME:
        return getattr(import_module(f"vlm_safeguard.{_HOME[name]}"), name)
    raise AttributeError(f"module 'vlm_safeguard' has no attribute '{name}'")
