"""Every verified family passes every check of the doctor, on a small model of it."""

from __future__ import annotations

import pytest

from tiny import load_makers
from vlm_safeguard.doctor import examine

MAKERS = load_makers()


@pytest.mark.parametrize("model_type", MAKERS)
def test_a_small_model_passes_every_check(model_type: str) -> None:
    model, processor = MAKERS[model_type]()
    assert model.config.model_type == model_type
    checks = examine(model.double(), processor)
    assert all(check.passed for check in checks), "\n".join(map(str, checks))
