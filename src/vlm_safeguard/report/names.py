"""What the report calls things: conditions, measures and defences, in words."""

from __future__ import annotations

from vlm_safeguard.evaluation.asks.attempt import UNBOUNDED
from vlm_safeguard.evaluation.results.attacks import AttackRow
from vlm_safeguard.evaluation.results.rows import TEXT

_CONDITIONS = {
    "text": "text only",
    "blank": "+ blank image",
    "noise": "+ noise image",
    "image": "+ rendered image",
    "rendered": "+ rendered image",
    "own": "+ its own image",
    "typographic": "request in the image",
}
_DEFENCES = {
    "none": "the model as it is",
    "self-reminder": "the prompt reminds the model to be responsible (Xie et al. 2023)",
    "goal-priority": "the prompt puts safety before helpfulness (Zhang et al. 2023)",
    "adashield-s": "a fixed prompt that asks to look at image and text first (AdaShield-S)",
    "ecso": "the model judges its own answer and, if unsafe, answers the image's caption (ECSO)",
    "inferaligner": "adds the mean difference where a linear gate sees harm (InferAligner)",
    "cmrm": "takes away the mean shift that an image causes (CMRM)",
    "shiftdc": "puts the text-only component along one direction back (ShiftDC)",
    "default": "this guard as it is fitted",
    "vlm-guard-project": "the paper's projection, taken literally, with its gate; a control",
    "vlm-guard-add": "the paper's alignment equation, taken literally, with its gate; a control",
    "project": "the literal projection on every request; a control",
    "restore": "the guard's gate; an edit that puts the text-only coordinates back",
    "refuse": "the guard's gate; restore, and on to the harmful anchors' mean at least",
    "rank-1": "the guard's gate and edit, in one direction a layer",
    "rank-8": "the guard's gate and edit, in eight directions a layer",
    "rank-full": "the guard's gate and edit, in all dimensions of a state",
    "random": "the guard's gate and edit, in a random subspace of the same rank; a control",
    "flipped": "the guard's gate and edit, pushing the other way; a control",
    "text": "the guard's gate; an open request is answered from its text alone",
    "refusal": "as text; the answer begins with the model's own words of refusal",
    "canned": "the guard's gate; an open request gets one fixed refusal; a control",
    "text-always": "every request is answered from its text alone; a control",
}
_JUDGES = {"refusal": "refusal phrases"}  # else it reads like the measure
#: What judges agree on, by the question of `Agreement`.
QUESTIONS = {"succeeded": "which attacks succeeded", "refused": "what was refused"}
MEASURES = {
    "attack_success": "attack success",
    "refusal": "refused",
    "accuracy": "answered right",
    "unreadable": "verdicts that could not be read",
    "perplexity": "perplexity of the answers",
    "kl": "KL divergence from the unguarded model",
    "tokens": "tokens an answer",
    "seconds": "seconds an answer",
}


def condition_name(condition: str) -> str:
    """An image condition in words."""
    if condition.startswith("folder:"):
        return f"+ images of {condition.removeprefix('folder:')}"
    return _CONDITIONS.get(condition, condition)


def with_image(condition: str) -> str:
    """An image condition as the end of a sentence."""
    if condition == TEXT:
        return "as text alone"
    name = condition_name(condition)
    if name.startswith("+ images of"):
        return f"with {name.removeprefix('+ ')}"
    if name.startswith("+ its"):
        return "with their own images"
    if name.startswith("+ "):
        return f"with a {name.removeprefix('+ ')}"
    return f"with the {name}" if name != condition else f"with image condition '{name}'"


def attack_name(row: AttackRow) -> str:
    """An attack in words."""
    names = {
        "none": "as it is",
        "pgd": "PGD",
        "universal": "one image for all",
        "prefill": "answer begun",
        "suffix": "suffix found",
    }
    if row.epsilon is None:
        return names[row.attack]
    return f"{names[row.attack]}, {epsilon_name(row.epsilon)}"


def epsilon_name(epsilon: int | None) -> str:
    """By how much a pixel may differ."""
    return "unbounded" if epsilon == UNBOUNDED else f"ε = {epsilon}/255"


def defence_words(defence: str) -> str:
    """One line on a defence; empty where it is not one of ours."""
    return _DEFENCES.get(defence, "")


def judge_name(judge: str) -> str:
    """A judge in words."""
    return _JUDGES.get(judge, judge)


def judged_by(judge: str | None) -> str:
    """Who judged, as the end of a title; empty where nobody had to."""
    return f", judged by {judge_name(judge)}" if judge else ""


def all_cells(count: int) -> str:
    """How many cells were looked at, as the end of a sentence."""
    return "the only cell" if count == 1 else f"all {count} cells"


def percent(value: float) -> str:
    """A share as a number of per cent: at most one decimal."""
    return f"{100 * value:.1f}".removesuffix(".0")


def number(value: float) -> str:
    """A number to three digits that count."""
    return f"{value:.3g}" if abs(value) < 1000 else f"{value:.0f}"


def times(value: float) -> str:
    """A ratio."""
    return f"{value:.2f}×" if value < 10 else f"{value:.3g}×"


def quoted(name: str) -> str:
    """A benchmark's name in a sentence."""
    return f"“{name}”"


def points(difference: float) -> str:
    """A difference of two shares, in points, with its sign."""
    if abs(difference) < 5e-4:
        return "±0 points"
    shown = f"{100 * difference:+.1f}".removesuffix(".0").replace("-", "−")
    return f"{shown} point{'' if shown in ('+1', '−1') else 's'}"
