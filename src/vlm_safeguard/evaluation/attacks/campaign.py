"""A plan's attacks on each of its defences: made, answered and judged."""

from __future__ import annotations

import hashlib
import random
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from vlm_safeguard.errors import SafeguardError
from vlm_safeguard.evaluation.answers.defended import answers_to
from vlm_safeguard.evaluation.answers.models import ModelName, loaded_vlm
from vlm_safeguard.evaluation.asks.ask import Ask, AttackedAsk, asks_of
from vlm_safeguard.evaluation.asks.attempt import NO_ATTACK, Attempt
from vlm_safeguard.evaluation.attacks.checkpoints import Checkpoints
from vlm_safeguard.evaluation.attacks.pgd import PGD
from vlm_safeguard.evaluation.attacks.prefill import Prefill
from vlm_safeguard.evaluation.attacks.suffix import Suffix
from vlm_safeguard.evaluation.attacks.target import Target
from vlm_safeguard.evaluation.attacks.universal import Universal
from vlm_safeguard.evaluation.results.rows import TEXT
from vlm_safeguard.evaluation.tasks import task_of
from vlm_safeguard.guard import Guard

if TYPE_CHECKING:
    from inspect_ai import Task

    from vlm_safeguard.evaluation.answers.progress import Progress, Report
    from vlm_safeguard.evaluation.attack_plan import AttackPlan
    from vlm_safeguard.evaluation.attacks.attack import Attack
    from vlm_safeguard.evaluation.plan import Plan
    from vlm_safeguard.evaluation.results.lines import Line


class Campaign:
    """All attacks of one plan."""

    def __init__(self, plan: Plan, attack: AttackPlan, out: Path, report: Report) -> None:
        """Draw what is asked; nothing is attacked yet.

        Args:
            attack: the plan's.
            out: the evaluation's folder, in which its guard is or will be.
            report: called with (what is running, parts done, parts in all).

        Raises:
            SafeguardError: the benchmark cannot be read, or holds too few requests.
        """
        self._plan, self._attack, self._out, self._report = plan, attack, out, report
        needed = attack.requests
        if "universal" in attack.attacks:
            needed += attack.universal_prompts
        whole = asks_of(attack.benchmark, TEXT)
        if len(whole) < needed:
            raise SafeguardError(
                f"The attacks need {needed} requests, and '{attack.benchmark}' holds "
                f"{len(whole)}; ask for fewer."
            )
        drawn = random.Random(attack.seed).sample(whole, needed)
        self._asks, self._others = drawn[: attack.requests], drawn[attack.requests :]

    @property
    def answers(self) -> int:
        """How many answers there will be."""
        cells = 1 + len(self._attack.conditions) * (1 + len(list(self._attacks(self._others))))
        return len(self._plan.defences) * cells * len(self._asks)

    def lines(self, progress: Progress) -> list[Line]:
        """One line an answer, attack by attack on each defence.

        Raises:
            SafeguardError: the model cannot be attacked so, or an answer could not be made.
        """
        model = ModelName(self._plan.model, self._plan.loading)
        vlm, guard = loaded_vlm(model), Guard.from_pretrained(self._out / "guard")
        checkpoints = Checkpoints(self._out, model.weights, self._report)
        lines: list[Line] = []
        for defence in self._plan.defences:
            target = Target.of(vlm, guard, defence)
            made = list(self._made(target, checkpoints))
            tasks = [self._task(asks, attempts) for asks, attempts in made]
            name = f"{defence}-attacked"
            answered = answers_to(tasks, self._plan, self._out, defence, name, progress)
            cells = [_cell(asks[0].condition, attempts[0]) for asks, attempts in made]
            place = {cell: number for number, cell in enumerate(cells)}
            lines += sorted(answered, key=lambda line: place[_cell(line.condition, line.attempt)])
        return lines

    def _attacks(self, others: Sequence[Ask]) -> Iterator[Attack]:
        for name in self._attack.attacks:
            if name == "pgd":
                yield from (PGD(epsilon) for epsilon in self._attack.epsilon)
            elif name == "universal":
                yield from (Universal(epsilon, tuple(others)) for epsilon in self._attack.epsilon)
            else:
                yield Prefill() if name == "prefill" else Suffix()

    def _made(
        self, target: Target, checkpoints: Checkpoints
    ) -> Iterator[tuple[list[Ask], list[Attempt]]]:
        """Asks under one image condition, and how each is asked: as it is, then under attacks."""
        unattacked = [Attempt(attack=NO_ATTACK)] * len(self._asks)
        yield self._asks, unattacked
        for condition in self._attack.conditions:
            asks, others = (
                [replace(ask, condition=condition) for ask in group]
                for group in (self._asks, self._others)
            )
            yield asks, unattacked
            for attack in self._attacks(others):
                yield asks, attack(target, asks, self._attack, checkpoints)

    def _task(self, asks: Sequence[Ask], attempts: Sequence[Attempt]) -> Task:
        """Its answers are kept by what was made, not by how."""
        digest = hashlib.sha256()
        attacked = []
        for ask, attempt in zip(asks, attempts, strict=True):
            digest.update(f"{ask.sample.id} {attempt.model_dump_json()}".encode())
            attacked.append(AttackedAsk.of(ask, attempt, self._out))
        first = attempts[0]
        epsilon = "" if first.epsilon is None else f"-{first.epsilon}"
        shown = asks[0].condition.partition(":")[0]
        name = f"{asks[0].benchmark}-{shown}-{first.attack}{epsilon}-{digest.hexdigest()[:12]}"
        plan = self._plan
        return task_of(name, name, attacked, plan.judge_names, plan.max_new_tokens)


def _cell(condition: str, attempt: Attempt | None) -> tuple[str, str, int | None]:
    """What a share is counted of."""
    assert attempt is not None, "every ask here is attacked"
    return condition, attempt.attack, attempt.epsilon
