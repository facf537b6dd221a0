"""Inside vLLM's workers: which states are edited and towards what, in whatever parts they come."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass

import pytest
import torch

from support.vllm import Layer
from vlm_safeguard.engines.vllm.edit_passes import EditPasses
from vlm_safeguard.engines.vllm.edit_plan import EditPlan
from vlm_safeguard.engines.vllm.edited_layers import EditedLayers
from vlm_safeguard.engines.vllm.marks import EditSettings, Mark
from vlm_safeguard.engines.vllm.scheduled import Admitted, Scheduled
from vlm_safeguard.engines.vllm.states import check_edited, coordinates_of
from vlm_safeguard.errors import SafeguardError
from vlm_safeguard.policy.edits import Drift, Edit, Refuse, Restore
from vlm_safeguard.policy.subspace import Subspace

POLICY, WIDTH, RANK, EDITED = "a" * 64, 6, 2, (1, 2)
PREFIX = (7, 8, 9)


@dataclass
class Asked:
    """A request whose tokens, its answer's too, are embedded already."""

    ids: list[int]
    embedded: torch.Tensor
    prompt: int
    mark: Mark

    @classmethod
    def drawn(cls, dice: random.Random, *, whole_answer: bool) -> Asked:
        """A prompt of which some tokens are edited, and an answer that may follow `PREFIX`."""
        prompt, rows = dice.randint(2, 9), dice.randint(1, 4) + len(PREFIX)
        positions = sorted(dice.sample(range(prompt - 1), dice.randint(0, prompt - 1)))
        last = rows - len(PREFIX) - 1
        spoken = dice.randint(0, len(PREFIX))
        follows = PREFIX[spoken:]
        answer = [*follows[: dice.randint(0, len(follows))], *[1] * dice.randint(0, 3)]
        layers = dice.choice([EDITED, EDITED[:1], EDITED[1:]])  # as gates of single layers open
        plan = EditPlan(
            layers=layers,
            positions=(*positions, prompt - 1),
            counterparts=(*(dice.randrange(last + 1) for _ in positions), last),
            last=last,
            follows=follows,
            first=last + 1 + spoken,
            whole_answer=whole_answer,
            coordinates=tuple(torch.randn(rows, RANK).numpy().tobytes() for _ in layers),
        )
        ids = [0] * prompt + answer
        mark = Mark(policy=POLICY, name=f"r{dice.random()}", edit=plan)
        return cls(ids, torch.randn(len(ids), WIDTH), prompt, mark)

    def edited(self) -> list[tuple[int, int]]:
        """Slowly: each edited token's position, and its counterpart."""
        plan = self.mark.edit
        assert plan is not None
        pairs = list(zip(plan.positions, plan.counterparts, strict=True))
        for number, token in enumerate(self.ids[self.prompt :]):
            if plan.whole_answer:
                pairs.append((self.prompt + number, plan.last))
            elif number < len(plan.follows) and token == plan.follows[number]:
                pairs.append((self.prompt + number, plan.first + number))
            else:
                break
        return pairs


class Worker:
    """Three layers, of which two are edited, and the passes over them."""

    def __init__(self, edit: Edit, capacity: int = 64) -> None:
        self.layers: list[torch.nn.Module] = [Layer(WIDTH) for _ in range(3)]
        settings = EditSettings(edit=edit.to_config(), layers=EDITED, rank=RANK)
        self.edited = EditedLayers(
            self.layers,
            settings,
            hidden_size=WIDTH,
            capacity=capacity,
            device=torch.device("cpu"),
        )
        self.edit, self.passes = edit, EditPasses(self.edited)
        self.subspaces = {
            n: Subspace(
                torch.linalg.qr(torch.randn(WIDTH, RANK)).Q.mT.contiguous(),
                torch.randn(RANK),
                torch.randn(RANK),
            )
            for n in EDITED
        }
        self.edited.fill(self.subspaces)

    @torch.no_grad()
    def run(self, batch: Sequence[tuple[Asked, int, int]]) -> list[torch.Tensor]:
        """States of parts of requests: (request, first token, count)."""
        parts = [Scheduled(x.mark.name or "", start, n, x.ids) for x, start, n in batch]
        self.passes.begin(parts)
        hidden = torch.cat([x.embedded[start : start + n] for x, start, n in batch])
        residual = None
        for layer in self.layers:
            hidden, residual = layer(hidden, residual)
        self.passes.end()
        assert residual is not None
        return list((hidden + residual).split([n for *_, n in batch]))

    @torch.no_grad()
    def alone(self, asked: Asked) -> torch.Tensor:
        """The same of a whole request, by the edits' own formula on its edited rows."""
        state, plan = asked.embedded, asked.mark.edit
        assert plan is not None
        rows, counterparts = (list(each) for each in zip(*asked.edited(), strict=True))
        for number, layer in enumerate(self.layers):
            hidden, residual = layer.forward(state, None)  # past the hook
            state = hidden + residual
            if number in plan.layers:
                subspace = self.subspaces[number]
                text = plan.coordinates_of(number, RANK)[counterparts]
                last = torch.tensor(counterparts) == plan.last
                at = subspace.reference(text, last)
                state = state.clone()
                state[rows] = self.edit(state[rows], subspace.V, at)
        return state


def admitted(asked: Asked) -> Admitted:
    return Admitted(asked.mark.name or "", asked.mark, asked.prompt)


@pytest.mark.parametrize("edit", [Refuse(strength=1.5), Restore(), Drift()], ids=lambda e: e.name)
@pytest.mark.parametrize("seed", range(12))
def test_any_parts_in_any_order_are_edited_as_the_whole(edit: Edit, seed: int) -> None:
    dice, worker = random.Random(seed), Worker(edit)
    torch.manual_seed(seed)
    requests = [Asked.drawn(dice, whole_answer=seed % 3 == 0) for _ in range(3)]
    worker.passes.admit(map(admitted, requests), [])
    done = [0] * len(requests)
    parts: list[list[torch.Tensor]] = [[] for _ in requests]
    while left := [n for n, x in enumerate(requests) if done[n] < len(x.ids)]:
        batch = []
        for n in dice.sample(left, dice.randint(1, len(left))):
            batch.append((n, done[n], dice.randint(1, len(requests[n].ids) - done[n])))
        made = worker.run([(requests[n], start, count) for n, start, count in batch])
        for (n, _, count), states in zip(batch, made, strict=True):
            parts[n].append(states)
            done[n] += count
        if dice.random() < 0.2:  # preempted: it is computed again
            again = dice.randrange(len(requests))
            done[again] = 0
            parts[again].clear()
    for asked, states_of_it in zip(requests, parts, strict=True):
        torch.testing.assert_close(torch.cat(states_of_it), worker.alone(asked))
        check_edited(asked.mark, worker.passes.take_edited([asked.mark.name or ""]))


def test_coordinates_are_read_part_by_part() -> None:
    worker, tokens = Worker(Restore()), (1, 2, 5)
    mark = Mark(policy=POLICY, name="q", position=2, tokens=tokens)
    asked = Asked([0] * 6, torch.randn(6, WIDTH), 6, mark)
    worker.passes.admit([Admitted("q", mark, 6)], [])
    whole = torch.cat([worker.run([(asked, start, 2)])[0] for start in (0, 2, 4)])
    shown = {"coordinates": worker.passes.take_seen("q")}
    seen = coordinates_of(mark, EDITED, [shown])
    expected = whole[list(tokens)] @ worker.subspaces[2].V.mT
    torch.testing.assert_close(seen[2], expected)
    assert worker.passes.take_seen("q") == {}


def test_coordinates_that_were_not_all_read_are_none() -> None:
    worker = Worker(Restore())
    mark = Mark(policy=POLICY, name="q", position=2, tokens=(1, 5))
    asked = Asked([0] * 6, torch.randn(6, WIDTH), 6, mark)
    worker.passes.admit([Admitted("q", mark, 6)], [])
    worker.run([(asked, 0, 4)])
    with pytest.raises(ValueError, match="not all tokens' coordinates were read"):
        coordinates_of(mark, EDITED, [{"coordinates": worker.passes.take_seen("q")}])
    with pytest.raises(ValueError, match=r"of the edited layers \[1, 2\], \[\] were read"):
        coordinates_of(mark, EDITED, [{"coordinates": worker.passes.take_seen("q")}])


def test_a_pass_whose_hook_is_gone_is_refused() -> None:
    dice, worker = random.Random(1), Worker(Refuse())
    asked = Asked.drawn(dice, whole_answer=False)
    worker.passes.admit([admitted(asked)], [])
    worker.layers[2]._forward_hooks.clear()
    with pytest.raises(SafeguardError, match=r"In layers \[2\]"):
        worker.run([(asked, 0, len(asked.ids))])


def test_an_edit_that_is_not_finite_is_refused() -> None:
    dice, worker = random.Random(1), Worker(Refuse())
    asked = Asked.drawn(dice, whole_answer=False)
    asked.embedded[:] = torch.inf
    worker.passes.admit([admitted(asked)], [])
    with pytest.raises(SafeguardError, match="not to what is finite"):
        worker.run([(asked, 0, len(asked.ids))])


def test_nothing_is_edited_without_subspaces() -> None:
    dice, worker = random.Random(1), Worker(Refuse())
    worker.edited._filled.clear()
    asked = Asked.drawn(dice, whole_answer=False)
    worker.passes.admit([admitted(asked)], [])
    with pytest.raises(SafeguardError, match="no subspace"):
        worker.run([(asked, 0, len(asked.ids))])


@pytest.mark.parametrize(
    ("shown", "words"),
    [
        ([None], "worker 0 edited nothing"),
        ([{"positions": [], "layers": [1, 2]}], "worker 0 edited tokens"),
        ([{"positions": None, "layers": []}], "of layers"),
    ],
)
def test_what_was_not_edited_as_planned_is_told(shown: list[dict[str, object]], words: str) -> None:
    mark = Asked.drawn(random.Random(3), whole_answer=False).mark
    assert mark.edit is not None
    for each in filter(None, shown):
        if each["positions"] is None:
            each["positions"] = list(mark.edit.positions)
    with pytest.raises(ValueError, match=words):
        check_edited(mark, shown)
