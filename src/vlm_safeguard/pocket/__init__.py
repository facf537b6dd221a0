"""The reference VLMs: small, real LLaVAs to see the guard at work on, with no model hub.

>>> model, processor = pocket.load()  # the Pocket VLM
>>> model, processor = pocket.load(name="coder")
"""

from vlm_safeguard.pocket.family import FAMILY
from vlm_safeguard.pocket.model import export, load

__all__ = ["FAMILY", "export", "load"]
