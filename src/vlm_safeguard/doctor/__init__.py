"""Does the guard work on this model? The checks behind every verified family.

Each is made against something independent of the guard: the chat template's own rendering, the
unguarded model, and a slow reference that runs both passes by hand with plain hooks.
"""

from vlm_safeguard.doctor.examination import Check, Examination

__all__ = ["Check", "Examination"]
