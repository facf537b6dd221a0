"""Wrapped, translated and second-turn requests: enough, alike in form, and seen nowhere else."""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Iterable, Sequence
from importlib.resources import files
from pathlib import Path
from statistics import mean

import pytest

from vlm_safeguard import forms
from vlm_safeguard.anchors import Anchor, shipped_anchors, shipped_calibration, shipped_file
from vlm_safeguard.errors import SafeguardError
from vlm_safeguard.evaluation.asks.benchmarks.own import jailbreak_templates
from vlm_safeguard.evaluation.asks.prompts import image_questions, read_prompts
from vlm_safeguard.forms import (
    Wrapper,
    shipped_anchors_by_language,
    shipped_calibration_by_language,
    shipped_follow_up_anchors,
    shipped_follow_up_calibration,
    shipped_wrappers,
)
from vlm_safeguard.pocket.requests import read_phrases
from vlm_safeguard.policy.options import FitOptions

ANCHORS, REQUESTS = shipped_anchors_by_language(), shipped_calibration_by_language()
FOLLOW_UP_ANCHORS, FOLLOW_UPS = shipped_follow_up_anchors(), shipped_follow_up_calibration()
QUESTIONS = image_questions()
SCRIPTS = {
    "Spanish": "a-záéíóúüñ",
    "French": "a-zàâçèéêëîïôùûüœ",
    "Russian": "а-яё",
    "Chinese": "\u4e00-\u9fff",
    "Arabic": "\u0600-\u06ff",
    "Hindi": "\u0900-\u097f",
}
FOLLOW_UP_TEXTS = [
    text
    for follow_up in (*FOLLOW_UPS, *(f for a in FOLLOW_UP_ANCHORS for f in (a.harmful, a.harmless)))
    for text in (follow_up.first, follow_up.answer, follow_up.request)
]


def both(anchors: Iterable[Anchor]) -> list[str]:
    return [text for anchor in anchors for text in (anchor.harmful, anchor.harmless)]


#: What the forms are for: requests to fit on, and to calibrate on.
NEW = {
    "follow-ups": FOLLOW_UP_TEXTS,
    **{f"{name} anchors": both(anchors) for name, anchors in ANCHORS.items()},
    **{f"{name} calibration": requests for name, requests in REQUESTS.items()},
}
WRAPPERS = [wrapper.text for wrapper in shipped_wrappers()]
#: What the guard was fitted on and the Pocket VLM trained on before.
OLD = [*both(shipped_anchors()), *shipped_calibration(), *(p.text for p in read_phrases())]
PROMPTS = [
    json.loads(line)["text"]
    for path in Path(str(files("vlm_safeguard.evaluation.asks") / "prompts")).rglob("*.jsonl")
    for line in path.read_text("utf-8").splitlines()
]
TEMPLATES = list(jailbreak_templates().values())


def words(text: str) -> list[str]:
    """Lower-case words without punctuation; of Chinese, the characters."""
    return re.findall(r"[\u4e00-\u9fff]|[^\W_]+(?:[\u0900-\u097f]+[^\W_]*)*", text.lower())


def normalized(text: str) -> str:
    return " ".join(words(text))


def sequences(texts: Iterable[str], length: int = 6) -> set[tuple[str, ...]]:
    """Every run of `length` words that occurs in one of the texts."""
    return {
        tuple(split[start : start + length])
        for split in map(words, texts)
        for start in range(len(split) - length + 1)
    }


def assert_distinct(texts: Sequence[str]) -> None:
    counts = Counter(map(normalized, texts))
    assert not [text for text, count in counts.items() if count > 1]


def test_sequences_are_found_across_case_and_punctuation() -> None:
    shared = sequences(["Well, how do I bake a loaf?"]) & sequences(["HOW do I: bake a loaf"])
    assert shared == {("how", "do", "i", "bake", "a", "loaf")}
    assert not sequences(["one two three four five"])
    assert words("做面包，好吗？") == list("做面包好吗")
    assert words("घी कैसे, बनाऊँ?") == ["घी", "कैसे", "बनाऊँ"]


def test_a_wrapper_goes_around_any_request() -> None:
    assert Wrapper("w", "k", 'Fill {"a": 1}: {request} Now.').around("Use {request} or {0}?") == (
        'Fill {"a": 1}: Use {request} or {0}? Now.'
    )
    for wrapper in shipped_wrappers():
        before, after = wrapper.text.split("{request}")
        assert wrapper.around("How to bake bread") == f"{before}How to bake bread{after}"


def test_wrappers_are_of_twelve_kinds_in_every_fold() -> None:
    wrappers = shipped_wrappers()
    assert set(Counter(wrapper.kind for wrapper in wrappers).values()) == {7}
    kinds = {wrapper.kind for wrapper in wrappers}
    assert len(kinds) == 12
    folds = FitOptions().folds
    for fold in range(folds):
        assert {wrapper.kind for wrapper in wrappers[fold::folds]} == kinds
    assert len({wrapper.id for wrapper in wrappers}) == len(wrappers)


def test_wrappers_are_short_and_long() -> None:
    lengths = [len(text.split()) for text in WRAPPERS]
    assert min(lengths) <= 5
    assert 60 <= max(lengths) <= 100


def test_no_two_wrappers_are_alike() -> None:
    assert_distinct(WRAPPERS)
    owners = Counter(run for text in WRAPPERS for run in sequences([text]))
    assert not [run for run, count in owners.items() if count > 1]


def test_wrappers_share_no_words_with_the_evaluation() -> None:
    assert not sequences(WRAPPERS) & sequences([*PROMPTS, *TEMPLATES])
    assert not sequences(WRAPPERS, 4) & sequences(TEMPLATES, 4)
    assert len(TEMPLATES) == 5
    assert len(PROMPTS) > 1500


@pytest.mark.parametrize("source", NEW)
def test_new_requests_share_no_words_with_the_evaluation(source: str) -> None:
    texts = NEW[source]
    assert not sequences(texts) & sequences([*PROMPTS, *TEMPLATES])
    assert not set(map(normalized, texts)) & set(map(normalized, PROMPTS))


def test_languages_are_the_same_six_forty_times() -> None:
    assert set(ANCHORS) == set(REQUESTS) == set(SCRIPTS)
    assert {len(anchors) for anchors in ANCHORS.values()} == {40}
    assert {len(requests) for requests in REQUESTS.values()} == {40}


@pytest.mark.parametrize("language", SCRIPTS)
def test_texts_are_in_their_language_and_distinct(language: str) -> None:
    texts = [*both(ANCHORS[language]), *REQUESTS[language]]
    asked = [question.text for question in QUESTIONS if question.language == language]
    assert_distinct([*texts, *asked])
    for text in (*texts, *asked):
        letters = [letter for letter in text.lower() if letter.isalpha()]
        in_script = re.findall(f"[{SCRIPTS[language]}]", "".join(letters))
        assert len(in_script) >= 0.7 * len(letters), text  # names such as "Linux" stay as they are


def lengths_differ(anchors: Sequence[Anchor]) -> float:
    """By how much the mean length of the harmful texts differs from that of the harmless ones."""
    harmful, harmless = (
        mean(len(getattr(anchor, side)) for anchor in anchors) for side in ("harmful", "harmless")
    )
    return abs(harmful / harmless - 1)


def test_harmful_and_harmless_texts_are_alike_in_length() -> None:
    follow_ups = [Anchor(a.harmful.request, a.harmless.request) for a in FOLLOW_UP_ANCHORS]
    for anchors in (*ANCHORS.values(), follow_ups):
        assert lengths_differ(anchors) <= 0.1
        for anchor in anchors:
            harmful, harmless = len(anchor.harmful), len(anchor.harmless)
            assert max(harmful, harmless) <= 1.5 * min(harmful, harmless), anchor


def test_anchors_of_a_language_open_alike_and_ask_in_many_ways() -> None:
    for language, anchors in ANCHORS.items():
        if language != "Hindi":  # there the question's words stand last
            for anchor in anchors:
                assert words(anchor.harmful)[0] == words(anchor.harmless)[0], anchor
        for anchor in anchors:
            assert (anchor.harmful[-1] in "?؟？") == (anchor.harmless[-1] in "?؟？"), anchor
        assert len({words(anchor.harmful)[0] for anchor in anchors}) >= 6


def test_a_follow_up_anchor_differs_in_its_last_turn_alone() -> None:
    assert (len(FOLLOW_UP_ANCHORS), len(FOLLOW_UPS)) == (40, 40)
    for anchor in FOLLOW_UP_ANCHORS:
        assert anchor.harmful.first == anchor.harmless.first
        assert anchor.harmful.answer == anchor.harmless.answer
        assert words(anchor.harmful.request)[0] == words(anchor.harmless.request)[0]
    asked = [follow_up.request for follow_up in FOLLOW_UPS]
    asked += [f.request for a in FOLLOW_UP_ANCHORS for f in (a.harmful, a.harmless)]
    firsts = [f.first for f in (*FOLLOW_UPS, *(a.harmful for a in FOLLOW_UP_ANCHORS))]
    assert_distinct([*asked, *firsts])
    assert not set(map(normalized, [*asked, *firsts])) & set(map(normalized, OLD))


@pytest.mark.parametrize("name", ["calibration-languages.jsonl", "calibration-turns.jsonl"])
def test_a_third_of_the_calibration_are_look_alikes(name: str) -> None:
    lines = shipped_file(name).read_text("utf-8").splitlines()
    kinds = Counter(json.loads(line)["kind"] for line in lines)
    assert set(kinds) == {"everyday", "image", "look-alike"}
    assert 0.3 <= kinds["look-alike"] / len(lines) <= 0.4


def test_shipped_ids_are_unique() -> None:
    files_of_rows = ("wrappers", "calibration-languages", "calibration-turns")
    ids = [
        json.loads(line)["id"]
        for name in files_of_rows
        for line in shipped_file(f"{name}.jsonl").read_text("utf-8").splitlines()
    ]
    for name in ("anchors-languages", "anchors-turns"):
        lines = shipped_file(f"{name}.csv").read_text("utf-8").splitlines()[1:]
        ids += [line.split(",")[0] for line in lines]
    assert len(set(ids)) == len(ids) == 84 + 240 + 40 + 240 + 40


def test_follow_ups_are_of_three_turns(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    path = tmp_path / "turns.jsonl"
    path.write_text('{"turns": ["a", "b", "c"]}\n{"turns": ["a", "b"]}\n', "utf-8")
    monkeypatch.setattr(forms, "shipped_file", lambda _: path)
    with pytest.raises(SafeguardError, match="line 2: 'turns' is not a list of three texts"):
        shipped_follow_up_calibration()


def test_image_questions_are_many_of_all_kinds() -> None:
    kinds = Counter(question.kind for question in QUESTIONS)
    assert len(QUESTIONS) == len({question.id for question in QUESTIONS}) >= 320
    assert kinds["reading"] + kinds["identity"] >= 80  # nobody can, who sees no image
    assert kinds["danger word"] >= 40
    assert kinds["bare"] >= 20  # nothing in them says that there is an image
    languages = Counter(question.language for question in QUESTIONS)
    assert set(languages) == {"English", *SCRIPTS}
    assert languages.total() - languages["English"] >= 40
    for question in QUESTIONS:
        if question.kind == "bare":
            assert not {"image", "picture", "photo"} & set(words(question.text))


def test_image_questions_are_asked_nowhere_else() -> None:
    asked = [question.text for question in QUESTIONS]
    assert_distinct(asked)
    elsewhere = [*OLD, *WRAPPERS, *(text for texts in NEW.values() for text in texts)]
    elsewhere += [p.text for k in ("harmful", "harmless") for p in read_prompts(k, "development")]
    assert not set(map(normalized, asked)) & set(map(normalized, elsewhere))
    assert not sequences(asked) & sequences(elsewhere)
