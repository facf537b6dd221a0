"""Further forms of a request: in a jailbreak's wrapper, in other languages, as a second turn.

All are shipped texts, written for the package and disjoint from those it is evaluated on.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass

from vlm_safeguard.anchors import Anchor, records, shipped_file, text_field
from vlm_safeguard.errors import SafeguardError

_SLOT = "{request}"


@dataclass(frozen=True)
class Wrapper:
    """Words that jailbreaks put around a request; around a harmless one they do no harm."""

    id: str
    kind: str
    text: str

    def around(self, request: str) -> str:
        """The request in this wrapper."""
        return self.text.replace(_SLOT, request)


@dataclass(frozen=True)
class FollowUp:
    """A request as a user's second turn; `first` and `answer`, the turns before, are harmless."""

    first: str
    answer: str
    request: str


@dataclass(frozen=True)
class Pair:
    """A harmful request and a harmless one in one form; pairs of one topic share its number."""

    harmful: str | FollowUp
    harmless: str | FollowUp
    topic: int
    language: str = "English"


@dataclass(frozen=True)
class Ordinary:
    """A harmless request in one form; those of one topic share its number."""

    request: str | FollowUp
    topic: int


@dataclass(frozen=True)
class FollowUpAnchor:
    """Two follow-ups of one first turn, alike in form and length."""

    harmful: FollowUp
    harmless: FollowUp


def further_pairs(
    anchors: Sequence[Anchor], wrappers: Sequence[Wrapper], wrappings: int, folds: int
) -> list[Pair]:
    """The anchors in jailbreaks' wrappers, then anchors in other languages and as second turns.

    Args:
        wrappers: a fold's topics are put in wrappers that no other fold has, so that who leaves a
            fold out has seen neither.
        wrappings: how many of them each anchor is put in; both of its requests in the same ones,
            so that a wrapper is no evidence of harm.
        folds: topics are in the fold of their number, modulo this.
    """
    pairs = []
    for topic, anchor in enumerate(anchors):
        for k in range(wrappings):
            number = wrappings * (topic // folds) + k
            around = _of_fold(wrappers, topic % folds, folds, number).around
            pairs.append(Pair(around(anchor.harmful), around(anchor.harmless), topic))
    for language, several in shipped_anchors_by_language().items():
        pairs += [  # all languages may have the same topics, so that they share numbers
            Pair(anchor.harmful, anchor.harmless, len(anchors) + number, language)
            for number, anchor in enumerate(several)
        ]
    first = 1 + max((pair.topic for pair in pairs), default=0)
    for number, turn in enumerate(shipped_follow_up_anchors()):
        pairs.append(Pair(turn.harmful, turn.harmless, first + number))
    return pairs


def further_calibration(
    calibration: Sequence[str], wrappers: Sequence[Wrapper], folds: int
) -> list[Ordinary]:
    """The harmless requests in wrappers, then those of other languages and second turns.

    Args:
        wrappers: those of `further_pairs`, by the same folds; none where no pair is in one, as
            a wrapper around harmless requests alone would be evidence of harmlessness.
    """
    requests = []
    for topic, text in enumerate(calibration if wrappers else ()):
        wrapper = _of_fold(wrappers, topic % folds, folds, topic // folds)
        requests.append(Ordinary(wrapper.around(text), topic))
    for texts in shipped_calibration_by_language().values():
        requests += [Ordinary(text, len(calibration) + number) for number, text in enumerate(texts)]
    first = 1 + max((each.topic for each in requests), default=0)
    return requests + [
        Ordinary(turn, first + number)
        for number, turn in enumerate(shipped_follow_up_calibration())
    ]


def _of_fold(wrappers: Sequence[Wrapper], fold: int, folds: int, number: int) -> Wrapper:
    """One of a fold's own wrappers; its kinds are as many as can be, as files sort by kind."""
    own = wrappers[fold::folds]
    return own[number % len(own)]


def shipped_wrappers() -> list[Wrapper]:
    """The wrappers, kind by kind."""
    path = shipped_file("wrappers.jsonl")
    return [
        Wrapper(*(text_field(path, line, fields, name) for name in ("id", "kind", "text")))
        for line, fields in records(path)
    ]


def shipped_anchors_by_language() -> dict[str, list[Anchor]]:
    """Anchor pairs of many forms in each language but English, by its English name."""
    path = shipped_file("anchors-languages.csv")
    anchors: dict[str, list[Anchor]] = defaultdict(list)
    for line, fields in records(path):
        pair = Anchor(*(text_field(path, line, fields, name) for name in ("harmful", "harmless")))
        anchors[text_field(path, line, fields, "language")].append(pair)
    return dict(anchors)


def shipped_calibration_by_language() -> dict[str, list[str]]:
    """Harmless requests of all forms in the same languages, a third of them look-alikes."""
    path = shipped_file("calibration-languages.jsonl")
    requests: dict[str, list[str]] = defaultdict(list)
    for line, fields in records(path):
        text = text_field(path, line, fields, "text")
        requests[text_field(path, line, fields, "language")].append(text)
    return dict(requests)


def shipped_follow_up_anchors() -> list[FollowUpAnchor]:
    """Anchor pairs in which the second turn alone tells harm."""
    path = shipped_file("anchors-turns.csv")
    anchors = []
    for line, fields in records(path):
        first, answer, harmful, harmless = (
            text_field(path, line, fields, name)
            for name in ("first", "answer", "harmful", "harmless")
        )
        anchors.append(
            FollowUpAnchor(FollowUp(first, answer, harmful), FollowUp(first, answer, harmless))
        )
    return anchors


def shipped_follow_up_calibration() -> list[FollowUp]:
    """Harmless follow-ups of all forms, a third of them look-alikes of harmful ones."""
    path = shipped_file("calibration-turns.jsonl")
    requests = []
    for line, fields in records(path):
        match fields.get("turns"):
            case [str(first), str(answer), str(request)]:
                requests.append(FollowUp(first, answer, request))
            case _:
                raise SafeguardError(f"{path}, line {line}: 'turns' is not a list of three texts.")
    return requests
