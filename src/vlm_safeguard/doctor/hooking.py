"""Plain forward hooks, for references that owe nothing to the guard's own."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch

Hook = Callable[[torch.nn.Module, Any, Any], Any]


@contextmanager
def hooked(layers: tuple[torch.nn.Module, ...], hooks: Mapping[int, Hook]) -> Iterator[None]:
    """Put a forward hook on layers, by index, and take it off again."""
    handles = [layers[n].register_forward_hook(hook) for n, hook in hooks.items()]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
