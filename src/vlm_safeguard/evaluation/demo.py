"""The demo: a guard and its controls on held-out prompts and image questions, without a plan.

It needs no inspect-ai. Samples, defences, lines and counting are the suite's.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from vlm_safeguard.defences.guarded import sharing_readings
from vlm_safeguard.defences.prompts import NONE
from vlm_safeguard.defences.variants import variants
from vlm_safeguard.evaluation.answers.direct import direct_answers
from vlm_safeguard.evaluation.asks.ask import Ask, AttackedAsk, asks_of
from vlm_safeguard.evaluation.asks.attempt import NO_ATTACK, UNBOUNDED, Attempt
from vlm_safeguard.evaluation.asks.benchmarks.own import scene_questions
from vlm_safeguard.evaluation.attack_plan import AttackPlan
from vlm_safeguard.evaluation.attacks.checkpoints import Checkpoints
from vlm_safeguard.evaluation.attacks.pgd import PGD
from vlm_safeguard.evaluation.attacks.target import Target
from vlm_safeguard.evaluation.results.attacks import attack_shares
from vlm_safeguard.evaluation.results.counting import closed_gates, refusal_judge, rows
from vlm_safeguard.evaluation.results.results import Results
from vlm_safeguard.evaluation.results.rows import BASELINE, DEFAULT

if TYPE_CHECKING:
    from vlm_safeguard.defences.defence import Defence
    from vlm_safeguard.evaluation.asks.samples import Sample
    from vlm_safeguard.evaluation.results.lines import Line
    from vlm_safeguard.guard import Guard
    from vlm_safeguard.model.vlm import VLM

CONDITIONS = ("text", "blank", "image")
REFUSAL_TOKENS = 5  # enough to read an opening such as "I'm sorry, but I can't"
ANSWER_TOKENS = 14  # enough for the longest right answer to an image question


#: Images made to undo the edit, one for each of a few requests.
ATTACK = AttackPlan.model_validate(
    {"attacks": ("pgd",), "requests": 3, "steps": 40, "restarts": 1, "confidence": 2}
)
EDIT = "refuse"


def run(
    vlm: VLM,
    guard: Guard,
    *,
    prompts: int,
    questions: int,
    batch_size: int,
    out: Path,
    report: Callable[[str, int, int], None],
) -> Results:
    """Every variant on every image condition; then image questions, and an attack.

    Args:
        out: a folder for the images of the attack.
        prompts: held-out requests of each kind.
        questions: about images.
        report: called with (what is running, answers done, answers in all).
    """
    guards = variants(guard)
    total = (1 + len(guards)) * len(CONDITIONS) * 2 * prompts + 3 * questions
    done = 0

    def answers(
        what: str, asks: Sequence[Ask], guards: Mapping[str, Guard], tokens: int
    ) -> list[Line]:
        def defences() -> dict[str, Defence]:
            return {BASELINE: NONE, **sharing_readings(guards)}

        def after_batch(defence: str, count: int) -> None:
            nonlocal done
            done += count
            report(f"{what}: {defence}", done, total)

        return direct_answers(
            vlm,
            asks,
            defences,
            max_new_tokens=tokens,
            batch_size=batch_size,
            after_batch=after_batch,
        )

    requests: list[Line] = []
    for kind in ("harmful", "harmless"):
        for conditions in (CONDITIONS[:1], CONDITIONS[1:]):  # a text-only pass serves several
            asks = [ask for each in conditions for ask in asks_of(kind, each)[:prompts]]
            requests += answers(f"{kind}, {' + '.join(conditions)}", asks, guards, REFUSAL_TOKENS)
    samples = scene_questions(questions)
    scenes: list[Line] = []
    for condition, compared in (
        ("text", {}),  # the best guess without looking
        ("own", {DEFAULT: guard}),
    ):
        asks = [Ask("scenes", condition, number, each) for number, each in enumerate(samples)]
        scenes += answers(f"image questions, {condition}", asks, compared, ANSWER_TOKENS)
    attacked = attacked_lines(vlm, guard, out, report)
    return Results(
        model=guard.provenance.model_name,
        rows=rows([*requests, *scenes]),
        time_ratio=0,
        closed_gates=closed_gates(requests),
        attacks=attack_shares(attacked),
        refusal_judge=refusal_judge(requests),
        other={
            "utility_majority_accuracy": majority_accuracy(samples),
            "max_new_tokens": REFUSAL_TOKENS,
        },
    )


def attacked_lines(
    vlm: VLM, guard: Guard, out: Path, report: Callable[[str, int, int], None]
) -> list[Line]:
    """Harmful requests beside noise, and beside images that are made to undo the edit.

    Answered without a guard, by the edit and by the guard as it is.

    Args:
        out: a folder for the images.
        report: called with (what is running, steps done, steps in all).
    """
    asks = asks_of(ATTACK.benchmark, "noise")[: ATTACK.requests]
    kept = Checkpoints(out, [guard.policy.sha256()], report)
    attack = PGD(UNBOUNDED)
    made = attack(Target.of(vlm, guard, EDIT), asks, ATTACK, kept)
    lines: list[Line] = []
    for attempts in ([Attempt(attack=NO_ATTACK)] * len(asks), made):
        pairs = zip(asks, attempts, strict=True)
        lines += direct_answers(
            vlm,
            [AttackedAsk.of(ask, attempt, out) for ask, attempt in pairs],
            lambda: {
                BASELINE: NONE,
                **sharing_readings(variants(guard, (EDIT, DEFAULT))),
            },
            max_new_tokens=REFUSAL_TOKENS,
            batch_size=len(asks),
        )
    return lines


def majority_accuracy(samples: Sequence[Sample]) -> float:
    """Accuracy of always giving each category's most frequent answer, chosen in hindsight."""
    answers: dict[str, list[str | None]] = {}
    for sample in samples:
        answers.setdefault(sample.category, []).append(sample.answer)
    best = sum(Counter(each).most_common(1)[0][1] for each in answers.values())
    return best / len(samples)
