"""What is given by name becomes what runs: models, guards and images; light to import."""

from vlm_safeguard.loading.devices import find_device
from vlm_safeguard.loading.guards import kept_guard, load_guard, read_guard
from vlm_safeguard.loading.images import load_image
from vlm_safeguard.loading.models import load_language_model, load_model, quantized_by, sees
from vlm_safeguard.loading.options import Loading

__all__ = [
    "Loading",
    "find_device",
    "kept_guard",
    "load_guard",
    "load_image",
    "load_language_model",
    "load_model",
    "quantized_by",
    "read_guard",
    "sees",
]
