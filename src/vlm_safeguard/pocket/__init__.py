"""The Pocket VLM: a small, real LLaVA to see the guard at work on, with no model hub.

>>> model, processor = pocket.load()
"""

from vlm_safeguard.pocket.model import export, load

__all__ = ["export", "load"]
