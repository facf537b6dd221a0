"""What a guard costs besides generating: fitting, memory, the artifact, attaching."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory
from typing import Any

import torch

from models import fit, guard_for, load, requests_with, with_gate
from results import Cell, Sheet, in_turns, parser, told
from vlm_safeguard import Guard
from vlm_safeguard.anchors import shipped_calibration
from vlm_safeguard.images import blank_image
from vlm_safeguard.model.activations import image_states, text_states
from vlm_safeguard.model.backbone import Backbone, model_inputs
from vlm_safeguard.model.conversation import encode_chat
from vlm_safeguard.model.text_pass import copied
from vlm_safeguard.timing import Ratio, seconds

MB = 1e6
FIT, FORWARDS = "fit over its forward passes", "fit, its forward passes"
ATTACH, ATTACH_RATIO = "attach", "attach over one forward pass"
ARTIFACT = "artifact"
FIT_PEAK, FIT_STATES = "fit, peak extra memory", "fit, its states"
FIT_OVER = "fit, memory beyond one batch, over its states"
RUN_PEAK = "guarded run, peak extra memory"
_BATCH = 32  # requests at once while fitting, as in `Guard.fit`
_ROWS, _TOKENS = 8, 32  # of the runs whose memory is measured


def main(argv: Sequence[str] | None = None) -> None:
    """Measure every cell that is not there yet, and show all."""
    arguments = parser(__doc__, rounds=3)
    arguments.add_argument("--peak", choices=("fit", "run"), help="used by the program itself")
    arguments.add_argument("--guard", type=Path, help="likewise")
    asked = arguments.parse_args(argv)
    if asked.peak:
        print(json.dumps(peaks(asked.model, asked.peak, asked.guard)))
        return
    model, processor = load(asked.model)
    sheet = Sheet("cost", asked, model)
    if sheet.lacks([FIT, FORWARDS]):
        sheet.add(*fit_time(asked.model, model, processor, asked.rounds))
    guard = guard_for(asked.model, model, processor)
    if sheet.lacks([ATTACH, ATTACH_RATIO]):
        sheet.add(*attach_time(model, processor, guard, 5 * asked.rounds))
    with TemporaryDirectory() as folder:
        guard.save_pretrained(folder)
        size = sum(path.stat().st_size for path in Path(folder).iterdir())
        sheet.add(
            Cell(ARTIFACT, size / MB, "MB", note=f"rank {guard.policy.directions.rank} stored")
        )
        if sheet.lacks([FIT_PEAK, FIT_STATES, FIT_OVER, RUN_PEAK]):
            sheet.add(*memory(asked.model, guard, Path(folder)))
    sheet.show()


# --- time ---


@dataclass(frozen=True)
class Pass:
    """One pass that was made while fitting: of what, with what, and how many layers deep."""

    module: Any
    inputs: dict[str, Any]
    layers: list[int]


class _Left(Exception):  # noqa: N818 - not an error
    """Ends a pass where the recorded one ended."""


@contextmanager
def recorded(backbone: Backbone) -> Iterator[list[Pass]]:
    """While open, every pass through the model, or through its decoder alone, is noted."""
    passes: list[Pass] = []
    running: list[Any] = []

    def before(module: Any, args: Any, inputs: dict[str, Any]) -> None:
        if not running:
            running.append(module)
            passes.append(Pass(module, _own(inputs), []))

    def after(module: Any, args: Any, output: Any) -> None:
        if running == [module]:
            running.clear()

    handles = [
        layer.register_forward_hook(lambda *_: passes[-1].layers.append(1))
        for layer in backbone.layers
    ]
    for module in (backbone.model, backbone.decoder):
        handles.append(module.register_forward_pre_hook(before, with_kwargs=True))
        handles.append(module.register_forward_hook(after, always_call=True))
    try:
        yield passes
    finally:
        for handle in handles:
            handle.remove()


def _own(inputs: dict[str, Any]) -> dict[str, Any]:
    """A pass's inputs, with a cache that it alone adds to."""
    cache = inputs.get("past_key_values")
    return inputs if cache is None else {**inputs, "past_key_values": copied(cache)}


@torch.inference_mode()
def replay(backbone: Backbone, passes: list[Pass]) -> None:
    """The same passes with nothing around them."""

    def leave(*_: Any) -> None:
        raise _Left

    for made in passes:
        cut = backbone.layers[len(made.layers) : len(made.layers) + 1]
        handles = [layer.register_forward_pre_hook(leave) for layer in cut]
        with suppress(_Left):
            made.module(**_own(made.inputs))
        for handle in handles:
            handle.remove()


def fit_time(name: str, model: Any, processor: Any, rounds: int) -> list[Cell]:
    """Time of `Guard.fit` over that of the forward passes it makes."""
    backbone = Backbone.of(model)
    with recorded(backbone) as passes:
        fit(name, model, processor)
    found = in_turns(
        "fit and its forward passes",
        {
            "forwards": lambda: seconds(lambda: replay(backbone, passes)),
            "fit": lambda: seconds(lambda: fit(name, model, processor)),
        },
        rounds,
    )
    took = median(found["forwards"])
    return [
        Cell.ratio(
            FIT,
            Ratio.of(found["fit"], found["forwards"]),
            1.1,
            f"fit {median(found['fit']):.1f} s",
        ),
        Cell(FORWARDS, took, "s", rounds=rounds, note=f"{len(passes)} passes"),
    ]


def attach_time(model: Any, processor: Any, guard: Guard, rounds: int) -> list[Cell]:
    """Time to attach and leave, over one forward pass of a request with an image."""
    inputs = model_inputs(model, processor, ["What is shown here?"], [blank_image()])

    def attach() -> None:
        with guard.attach(model):
            pass

    @torch.inference_mode()
    def forward() -> None:
        model(**inputs, use_cache=False, logits_to_keep=1)

    found = in_turns(
        "attach and one forward pass",
        {"forward": lambda: seconds(forward), "attach": lambda: seconds(attach)},
        rounds,
    )
    took = median(found["forward"])
    return [
        Cell(ATTACH, 1e3 * median(found["attach"]), "ms", rounds=rounds),
        Cell.ratio(
            ATTACH_RATIO,
            Ratio.of(found["attach"], found["forward"]),
            note=f"forward {1e3 * took:.1f} ms",
        ),
    ]


# --- memory ---


def memory(name: str, guard: Guard, folder: Path) -> list[Cell]:
    """Peaks, each in a process of its own, beside what fitting has to keep."""
    if not torch.cuda.is_available() and not Path("/proc/self/clear_refs").exists():
        print("Peak memory is read from /proc, which is not here: these cells are left out.")
        return []
    fitting, run = (_in_a_process(name, what, folder) for what in ("fit", "run"))
    made = guard.provenance
    kept = sum(len(guard.scores[name]) for name in ("harmful", "harmless", "calibration"))
    states = kept * made.num_layers * made.hidden_size * 4 / MB
    beyond = fitting["all"] - fitting["once"]
    return [
        Cell(
            FIT_PEAK,
            fitting["all"],
            "MB",
            note=f"one batch of {_BATCH} alone {fitting['once']:.0f} MB",
        ),
        Cell(
            FIT_STATES,
            states,
            "MB",
            note=f"{kept} requests × {made.num_layers} layers × {made.hidden_size} × 4 bytes, host",
        ),
        Cell(FIT_OVER, beyond / states, "×", note=f"{beyond:.0f} MB"),
        Cell(
            RUN_PEAK,
            run["all"] - run["once"],
            "MB",
            note=f"batch {_ROWS}, {_TOKENS} tokens; unguarded {run['once']:.0f} MB",
        ),
    ]


def _in_a_process(name: str, what: str, guard: Path) -> dict[str, float]:
    """`peaks` in a fresh process: memory that was freed there would be used again here."""
    done = subprocess.run(
        [sys.executable, __file__, name, "--peak", what, "--guard", str(guard)],
        stdout=subprocess.PIPE,
        text=True,
        check=True,
        env=os.environ,
    )
    said: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return said


def peaks(name: str, what: str, folder: Path) -> dict[str, float]:
    """Peak MB above where it starts: `once` without what is in question, `all` with it."""
    model, processor = load(name)
    backbone = Backbone.of(model)
    longest = sorted(shipped_calibration(), key=len)[-_BATCH:]
    guard = with_gate(name, Guard.from_pretrained(folder), "open")
    texts = requests_with(model, processor, guard, "open", _ROWS) if what == "run" else []
    inputs = model_inputs(
        model, processor, texts or longest[:1], [blank_image()] * max(len(texts), 1)
    )

    def generate() -> None:
        model.generate(**inputs, do_sample=False, max_new_tokens=_TOKENS, min_new_tokens=_TOKENS)

    if what == "fit":
        start = _peak(fresh=True)
        text_states(backbone, [encode_chat(processor, each) for each in longest])
        image_states(backbone, processor, longest, [blank_image()] * _BATCH)
        once = _peak()
        fit(name, model, processor)
    else:
        start = _peak(fresh=True)
        generate()
        once = _peak()
        with guard.attach(model):
            generate()
    return {"once": once - start, "all": _peak() - start}


def _peak(*, fresh: bool = False) -> float:
    """MB held at most so far, on the GPU where there is one; `fresh` forgets what was before."""
    if torch.cuda.is_available():
        if fresh:
            torch.cuda.reset_peak_memory_stats()
        return torch.cuda.max_memory_allocated() / MB
    if fresh:
        Path("/proc/self/clear_refs").write_text("5", "ascii")
    (line,) = (
        x
        for x in Path("/proc/self/status").read_text("ascii").splitlines()
        if x.startswith("VmHWM")
    )
    return int(line.split()[1]) * 1024 / MB


if __name__ == "__main__":
    told(main)
