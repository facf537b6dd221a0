"""The model that most tests run on, its guard, and the command line.

Fixtures import what they make: the process that shares tests out to others reads this file, too.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import cache, partial
from importlib.metadata import packages_distributions
from typing import TYPE_CHECKING

import pytest

from support.command import Run, run_command

if TYPE_CHECKING:
    from transformers import LlavaForConditionalGeneration, LlavaProcessor

    from vlm_safeguard.guard import Guard
    from vlm_safeguard.model.vlm import VLM


@pytest.fixture(scope="session")
def processor() -> LlavaProcessor:
    from tiny.pocket import make_processor

    return make_processor()


@pytest.fixture(scope="session")
def model(processor: LlavaProcessor) -> LlavaForConditionalGeneration:
    from tiny.pocket import make_model

    return make_model(processor)


@pytest.fixture(scope="session")
def guard(model: LlavaForConditionalGeneration, processor: LlavaProcessor) -> Guard:
    """Fitted with the shipped anchors, on fewer of the calibration requests, for speed.

    It edits open requests, as most tests are of that. Its gate scores texts by their harm, from a
    third of the texts that a discriminant takes, and looks at the multimodal pass, too, whether or
    not harm is legible there.
    """
    from support.reference import with_thresholds
    from vlm_safeguard.anchors import shipped_calibration
    from vlm_safeguard.guard import Guard
    from vlm_safeguard.policy.gate import TextScore
    from vlm_safeguard.policy.response import Response

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
    from vlm_safeguard.policy.gate import GATES

    return guard.variant(layers=(1, 2, 3, 4), gate=GATES["open"])


@pytest.fixture(scope="session")
def exact_model(processor: LlavaProcessor) -> LlavaForConditionalGeneration:
    """The same weights as `model`, in float64 throughout."""
    from support.reference import make_exact
    from tiny.pocket import make_model

    return make_exact(make_model(processor))


@pytest.fixture(scope="session")
def pocket() -> VLM:
    from vlm_safeguard.model.vlm import VLM
    from vlm_safeguard.pocket import load

    return VLM(*load())


@pytest.fixture(scope="session")
def pocket_guard(pocket: VLM) -> Guard:
    """Fitted anew in every session, whatever the cache holds."""
    from vlm_safeguard.guard import Guard

    return Guard.fit(pocket.model, pocket.processor)


@pytest.fixture(scope="module")
def small_probes() -> Iterator[None]:
    """An evaluation measures beside its answers as it does, on a few prompts and tokens."""
    from inspect_ai._util import package  # the core is tested without it, too

    from vlm_safeguard import timing
    from vlm_safeguard.evaluation.probes import gap

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(gap, "_GAP", 4)
        patch.setattr(gap, "_AUROC", 4)
        patch.setattr(timing, "TIMED_TOKENS", 2)
        # inspect looks through all that is installed for every task
        patch.setattr(package, "packages_distributions", cache(packages_distributions))
        yield


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> Run:
    """`run("fit", …)` → exit code, standard output and standard error."""
    return partial(run_command, monkeypatch, capfd)
