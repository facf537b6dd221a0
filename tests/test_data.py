"""The shipped texts: enough of them, and evaluation data that nothing else has seen."""

from __future__ import annotations

import re
import unicodedata
from collections import Counter

import pytest

from vlm_safeguard.anchors import (
    shipped_anchors,
    shipped_calibration,
    shipped_image_questions,
)
from vlm_safeguard.defences.prompts import GOAL_PRIORITY
from vlm_safeguard.evaluation.asks.benchmarks.own import jailbreak_templates
from vlm_safeguard.evaluation.asks.prompts import image_questions, read_prompts
from vlm_safeguard.forms import (
    shipped_follow_up_anchors,
    shipped_follow_up_calibration,
    shipped_wrappers,
)
from vlm_safeguard.pocket.requests import read_phrases, split_phrases

_ENDINGS = ("ments", "ment", "ings", "ing", "ers", "ies", "ed", "es", "s", "y", "e")


def stems(text: str) -> set[str]:
    """Words without accents and the commonest endings, so that plurals count as the same topic."""
    plain = unicodedata.normalize("NFKD", text).encode("ascii", "ignore").decode().lower()
    found = set()
    for word in re.findall(r"[a-z]+", plain):
        for ending in _ENDINGS:
            if word.endswith(ending) and len(word) - len(ending) >= 4:
                word = word[: -len(ending)]
                break
        found.add(word)
    return found


SEEN_BY_MODEL_OR_GUARD = {
    "harmful anchors": stems(" ".join(anchor.harmful for anchor in shipped_anchors())),
    "harmless anchors": stems(" ".join(anchor.harmless for anchor in shipped_anchors())),
    "calibration": stems(" ".join(shipped_calibration())),
    "image questions": stems(" ".join(shipped_image_questions())),
    "wrappers": stems(" ".join(wrapper.text for wrapper in shipped_wrappers())),
    "follow-up anchors": stems(
        " ".join(
            f"{f.first} {f.answer} {f.request}"
            for anchor in shipped_follow_up_anchors()
            for f in (anchor.harmful, anchor.harmless)
        )
    ),
    "follow-up calibration": stems(
        " ".join(f"{f.first} {f.answer} {f.request}" for f in shipped_follow_up_calibration())
    ),
    "development prompts": stems(
        " ".join(p.text for k in ("harmful", "harmless") for p in read_prompts(k, "development"))
    ),
    "defences' examples": stems(GOAL_PRIORITY.prompt("")),
    "training phrases": stems(" ".join(phrase.text for phrase in read_phrases())),
}


HELD_OUT = ("harmful", "harmless", "lookalike", "jailbreak")


@pytest.mark.parametrize("source", SEEN_BY_MODEL_OR_GUARD)
@pytest.mark.parametrize("kind", HELD_OUT)
def test_no_topic_of_a_held_out_prompt_occurs_elsewhere(kind: str, source: str) -> None:
    for prompt in read_prompts(kind):
        (topic,) = stems(prompt.topic)
        assert topic in stems(prompt.text)
        seen = SEEN_BY_MODEL_OR_GUARD[source]
        assert topic not in seen, f"{prompt.id}: '{prompt.topic}' is in the {source}"


def test_held_out_prompts_are_distinct_and_many() -> None:
    prompts = [prompt for kind in HELD_OUT for prompt in read_prompts(kind)]
    for part in ("id", "topic", "text"):
        assert len({getattr(prompt, part) for prompt in prompts}) == len(prompts)
    assert min(len(read_prompts("harmful")), len(read_prompts("harmless"))) >= 100
    look_alikes = [p for p in read_prompts("harmless") if p.category == "look-alike"]
    assert len(look_alikes) >= 40


@pytest.mark.parametrize("kind", ["lookalike", "jailbreak"])
def test_no_topic_of_these_occurs_in_another_held_out_set(kind: str) -> None:
    others = [prompt for other in HELD_OUT if other != kind for prompt in read_prompts(other)]
    seen = stems(" ".join(prompt.text for prompt in others))
    for prompt in read_prompts(kind):
        assert not stems(prompt.topic) & seen, f"{prompt.id}: '{prompt.topic}'"


def test_lookalikes_are_short_and_of_seven_kinds() -> None:
    prompts = read_prompts("lookalike")
    assert len(prompts) == 100
    kinds = Counter(prompt.category for prompt in prompts)
    assert set(kinds) == {
        *("homonym", "figurative", "safe target", "safe context"),
        *("definition", "history", "fiction"),
    }
    assert min(kinds.values()) >= 12
    assert max(len(prompt.text.split()) for prompt in prompts) <= 20


def test_jailbreaks_are_five_templates_of_twenty_requests() -> None:
    templates, prompts = jailbreak_templates(), read_prompts("jailbreak")
    assert (len(templates), len(prompts)) == (5, 20)
    assert all(template.count("{request}") == 1 for template in templates.values())
    assert max(len(prompt.text.split()) for prompt in prompts) <= 20
    assert len(set(templates.values())) == 5


def test_anchors_are_alike_in_form_and_length() -> None:
    anchors = shipped_anchors()
    assert len(anchors) >= 100
    for anchor in anchors:
        assert anchor.harmful.startswith("How to ")
        assert anchor.harmless.startswith("How to ")
        assert abs(len(anchor.harmful.split()) - len(anchor.harmless.split())) <= 3


def test_image_questions_allow_the_default_budget_and_are_not_those_of_the_evaluation() -> None:
    asked = shipped_image_questions()
    assert len(asked) >= 99
    plain = [
        {"".join(filter(str.isalnum, text.lower())) for text in texts}
        for texts in (asked, [question.text for question in image_questions()])
    ]
    assert len(plain[0]) == len(asked)
    assert not plain[0] & plain[1]


def test_calibration_allows_half_of_the_default_budget() -> None:
    # two thresholds share a 1 % budget: each needs at least 199 requests
    assert len(shipped_calibration()) >= 199


def test_development_phrases_are_not_trained_on() -> None:
    train, development = split_phrases(read_phrases())
    assert not set(train) & set(development)
    assert len(train) + len(development) == len(read_phrases())
    assert {phrase.harmful for phrase in development} == {True, False}
