"""The benchmark programs run: every cell is written, and kept the next time. Not what they say."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch

from support.reference import ask
from vlm_safeguard.errors import SafeguardError
from vlm_safeguard.guard import Guard
from vlm_safeguard.model.activations import read_start
from vlm_safeguard.model.backbone import Backbone

PROGRAMS = Path(__file__).parents[1] / "benchmarks"


@pytest.fixture(autouse=True)
def _on_the_path(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(PROGRAMS)


def cells_of(program: Any, folder: Path) -> dict[str, dict[str, Any]]:
    """What one round on the tiny shape writes; a second run must measure nothing."""
    asked = ["tiny", "--rounds", "1", "--out", str(folder)]
    program.main(asked)
    (path,) = folder.glob("*.json")
    told = json.loads(path.read_text("utf-8"))
    assert told["machine"]["versions"]["torch"] == torch.__version__
    assert path.with_suffix(".png").stat().st_size > 1000
    for cell in told["cells"]:
        assert math.isfinite(cell["value"]), cell
        assert bool(cell["verdict"]) == (cell["target"] is not None)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(program, "in_turns", None, raising=False)
        program.main(asked)
    assert json.loads(path.read_text("utf-8")) == told
    return {cell["name"]: cell for cell in told["cells"]}


def test_speed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import speed

    monkeypatch.setattr(speed, "BATCHES", (2,))
    monkeypatch.setattr(speed, "ANSWERS", (2, 3))
    cells = cells_of(speed, tmp_path)
    assert set(cells) == {
        f"{quantity}, {gate} gate, batch 2, {guard}"
        for quantity in ("prefill", "decode step", "2 tokens", "3 tokens")
        for gate in ("open", "closed")
        for guard in ("unguarded again", "default", "edit")
    } | {
        "prefill, open gate, batch 2, unguarded without images",
        "prefill, closed gate, batch 2, unguarded without images",
        "prefill over text alone, open gate, batch 2, default",
        "2 tokens over text alone, open gate, batch 2, default",
        "prefill of two sentences, closed gate, batch 2, default",
        "prefill of two sentences, closed gate, batch 2, texts whole",
        "prefill under a system prompt, closed gate, batch 2, default",
    }
    assert cells["decode step, open gate, batch 2, default"]["target"] == 1.02
    assert cells["decode step, closed gate, batch 2, edit"]["target"] == 1.0
    assert 1.03 < cells["prefill, closed gate, batch 2, default"]["target"] < 2.03
    assert all(cell["value"] > 0 for cell in cells.values())


def test_a_pass_is_replayed_as_it_was_made(model: Any) -> None:
    """One that goes on from a cache, too: it is not longer the second time."""
    import cost

    backbone, rows = Backbone.of(model), [[5, 6, 7, 8, 9], [5, 6, 7, 4]]
    start = read_start(backbone, rows)
    with cost.recorded(backbone) as passes:
        wanted = backbone.run_text(rows, start=start)[:, 0]
    assert [made.inputs["past_key_values"].get_seq_length() for made in passes] == [3]
    seen: list[torch.Tensor] = []
    handle = backbone.decoder.register_forward_hook(
        lambda module, args, output: seen.append(output.last_hidden_state[:, -1])
    )
    for _ in range(2):
        cost.replay(backbone, passes)
    handle.remove()
    for states in seen:
        assert torch.equal(states, wanted)
    assert len(seen) == 2


@pytest.mark.thorough
def test_cost(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One of the two peaks is taken here: that a process of its own can do it, the other shows."""
    import cost

    apart = {"fit": cost._in_a_process, "run": cost.peaks}
    monkeypatch.setattr(
        cost, "_in_a_process", lambda name, what, folder: apart[what](name, what, folder)
    )
    cells = cells_of(cost, tmp_path)
    assert cells["fit over its forward passes"]["target"] == 1.1
    assert 0 < cells["artifact"]["value"] < 1
    states = (2 * 40 + 220) * 6 * 32 * 4 / 1e6
    assert cells["fit, its states"]["value"] == pytest.approx(states)
    assert cells["attach"]["value"] > 0
    assert cells["fit, peak extra memory"]["value"] > 0
    assert "guarded run, peak extra memory" in cells


@pytest.mark.thorough
def test_serving(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nobody is lost but those who leave, and all are judged but by the server without a guard."""
    import serving

    few = {"REQUESTS": 16, "AT_ONCE": 4, "SHORT": 20, "LENGTHS": (1, 2, 6), "LEAVE": 0.3}
    for name, value in few.items():
        monkeypatch.setattr(serving, name, value)
    cells = cells_of(serving, tmp_path)
    for load in ("harmless", "one in ten harmful"):
        assert cells[f"time of a load, {load}"]["target"] == pytest.approx(1 / 0.85, abs=1e-4)
        for server in ("guarded", "unguarded"):
            assert cells[f"{load}, {server}: lost"]["value"] == 0
            counts = cells[f"{load}, {server}: answers a second"]["note"]
            answered, left = (int(count.split()[0]) for count in counts.split(", "))
            assert answered + left == 16
            assert left
        assert cells[f"{load}, guarded: not judged"]["value"] == 0
    assert cells["memory grown"]["note"].endswith("20 answered")


@pytest.mark.thorough
def test_baselines(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import baselines

    monkeypatch.setattr(baselines, "BATCHES", (2,))
    monkeypatch.setattr(baselines, "TOKENS", 2)
    monkeypatch.setattr(baselines, "CAPTION", 2)
    cells = cells_of(baselines, tmp_path)
    names = ("none again", "guard", "self-reminder", "guard model", "shiftdc", "ecso")
    assert set(cells) == {f"{n}, {k}, batch 2" for n in names for k in ("harmful", "harmless")}


def test_a_large_shape_is_refused_without_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    from models import load

    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(SafeguardError, match="there is none here"):
        load("llava-7b")


def test_results_of_another_machine_are_not_mixed(tmp_path: Path) -> None:
    from models import load
    from results import Cell, Sheet, parser

    model = load("tiny")[0]
    asked = parser(None, 1).parse_args(["tiny", "--out", str(tmp_path)])
    sheet = Sheet("some", asked, model)
    sheet.add(Cell("a", 1.004, "×", (0.9, 1.1), 3, 1.0))
    assert Sheet("some", asked, model).cells == sheet.cells
    with pytest.raises(SafeguardError, match="--fresh"):
        Sheet("some", asked, model.half())
    asked.fresh = True
    assert not Sheet("some", asked, model).cells


@pytest.mark.parametrize(
    ("value", "middle", "verdict"),
    [
        (1.004, (1.001, 1.004), "met"),
        (1.004, (0.99, 1.2), "met, spread across it"),
        (1.006, (1.0055, 1.2), "not met"),
        (1.006, (0.9, 1.2), "not met, spread across it"),
        (1.006, None, "not met"),
    ],
)
def test_verdicts(value: float, middle: tuple[float, float] | None, verdict: str) -> None:
    from results import Cell

    assert Cell("a", value, "×", middle, 3, target=1.0).verdict == verdict
    assert Cell("a", value, "×", middle, 3).verdict == ""


@pytest.mark.thorough
def test_criteria(tmp_path: Path) -> None:
    import criteria

    criteria.main(["tiny", "--limit", "100", "--out", str(tmp_path)])
    (path,) = tmp_path.glob("*.json")
    rows = json.loads(path.read_text("utf-8"))["rows"]
    names = {row["score"].partition(",")[0] for row in rows}
    assert names >= {"harm score (SSD)", "discriminant", "logistic probe"}
    assert {row["form"] for row in rows} == {"plain", "wrapped"}
    for row in rows:
        assert 0 <= row["auroc"] <= 1
        assert row["opened"]["n"] == row["harmless"]["n"] == 100
        assert row["opened"]["low"] <= row["opened"]["value"] <= row["opened"]["high"]
    assert path.with_suffix(".png").stat().st_size > 1000


def test_gates(tmp_path: Path, model: Any, processor: Any, guard: Guard) -> None:
    import gates

    guard.save_pretrained(tmp_path / "guard")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(gates, "load", lambda *_: (model, processor))
        given = [f"--guard={gate}={tmp_path / 'guard'}" for gate in ("calibrated", "discriminant")]
        to = ["tiny", "--out", str(tmp_path), *given]
        gates.main([*to, "--limit", "3", "--kind", "harmless"])
        gates.main([*to, "--limit", "5"])
        patch.delattr(gates, "decided")  # what is there is not measured again
        gates.main([*to, "--limit", "5"])
    rows = json.loads((tmp_path / "gates-tiny.json").read_text("utf-8"))["rows"]
    asked = gates.requests(5)
    assert len(asked["two harmless"]) == 5
    assert asked["two harmless"][0] == " ".join(asked["harmless"][:2])
    assert [row["kind"] for row in rows] == [kind for kind in asked for _ in range(3)]
    for row in rows:
        assert row["opened"]["n"] == 5
        assert row["own"] == 0  # the tiny model does not refuse
    inputs = ask(processor, asked["harmless"])
    with guard.attach(model) as attachment:
        receipts = attachment.generate(**inputs, max_new_tokens=1).receipts
    opened = sum(receipt.guarded for receipt in receipts) / 5
    assert rows[3]["opened"]["value"] == opened


def test_what_vllm_is_asked_for_its_cost() -> None:
    import vllm_cost

    asked = vllm_cost.traffic(10)
    kinds = [kind for kind, _ in asked]
    assert [kinds.count(kind) for kind in ("benign", "text", "harmful")] == [6, 2, 2]
    for kind, chat in asked:
        assert (len(chat[-1].content) == 2) == (kind != "text")
    assert len({str(chat[-1].content[-1]) for _, chat in asked}) == 10
