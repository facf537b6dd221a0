"""The model that most tests run on, its guard, and the command line."""

from __future__ import annotations

from functools import partial

import pytest
from transformers import LlavaForConditionalGeneration, LlavaProcessor

from support.command import Run, run_command
from support.reference import make_exact, with_thresholds
from tiny.pocket import make_model, make_processor
from vlm_safeguard.anchors import shipped_calibration
from vlm_safeguard.guard import Guard
from vlm_safeguard.model.vlm import VLM
from vlm_safeguard.pocket import load
from vlm_safeguard.policy.gate import GATES, TextScore
from vlm_safeguard.policy.response import Response


@pytest.fixture(scope="session")
def processor() -> LlavaProcessor:
    return make_processor()


@pytest.fixture(scope="session")
def model(processor: LlavaProcessor) -> LlavaForConditionalGeneration:
    return make_model(processor)


@pytest.fixture(scope="session")
def guard(model: LlavaForConditionalGeneration, processor: LlavaProcessor) -> Guard:
    """Fitted with the shipped anchors, on fewer of the calibration requests, for speed.

    It edits open requests, as most tests are of that. Its gate scores texts by their harm, from a
    third of the texts that a discriminant takes, and looks at the multimodal pass, too, whether or
    not harm is legible there.
    """
    fitted = Guard.fit(
        model,
        processor,
        calibration=shipped_calibration()[:220],
        response=Response.EDIT,
        layers=(2, 3),
        rank=5,
        gate="calibrated",
    )
    (text,) = (each for each in fitted.policy.gate if isinstance(each, TextScore))
    return with_thresholds(fitted, text.threshold, image=100.0)


@pytest.fixture(scope="session")
def open_guard(guard: Guard) -> Guard:
    """Edits four of the six layers, always."""
    return guard.variant(layers=(1, 2, 3, 4), gate=GATES["open"])


@pytest.fixture(scope="session")
def exact_model(processor: LlavaProcessor) -> LlavaForConditionalGeneration:
    """The same weights as `model`, in float64 throughout."""
    return make_exact(make_model(processor))


@pytest.fixture(scope="session")
def pocket() -> VLM:
    return VLM(*load())


@pytest.fixture(scope="session")
def pocket_guard(pocket: VLM) -> Guard:
    """Fitted anew in every session, whatever the cache holds."""
    return Guard.fit(pocket.model, pocket.processor)


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> Run:
    """`run("fit", …)` → exit code, standard output and standard error."""
    return partial(run_command, monkeypatch, capfd)
