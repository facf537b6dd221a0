"""What each defence costs: seconds of 32 new tokens over the undefended model's."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from statistics import median

from models import GATES, guard_for, load, requests_with, with_gate
from results import Cell, Sheet, in_turns, parser, told
from vlm_safeguard.defences.defence import Defence
from vlm_safeguard.defences.ecso import ECSO
from vlm_safeguard.defences.guard_model import GuardModel
from vlm_safeguard.defences.prompts import NONE, SELF_REMINDER
from vlm_safeguard.defences.shiftdc import ShiftDC
from vlm_safeguard.images import blank_image
from vlm_safeguard.model.conversation import chat_of
from vlm_safeguard.model.vlm import VLM
from vlm_safeguard.timing import Ratio, seconds

TOKENS = 32
CAPTION = 32  # tokens at most: short for a caption, to the baselines' favour
BATCHES = (1, 8)


def main(argv: Sequence[str] | None = None) -> None:
    """Measure every cell that is not there yet, and show all.

    Harmful requests show the cost where each defence acts, harmless ones where it need not; which
    of the two ECSO and the guard model do is set, so that no judgement of theirs is measured.
    """
    asked = parser(__doc__, rounds=5).parse_args(argv)
    model, processor = load(asked.model)
    sheet = Sheet("baselines", asked, model)
    fitted = guard_for(asked.model, model, processor)
    judge = VLM(*load(asked.model))  # weights of its own, as a second model has
    for size in BATCHES:
        for gate, kind in GATES.items():
            acts = -math.inf if gate == "open" else math.inf
            defences: dict[str, Defence] = {
                "none": NONE,
                "none again": NONE,
                "guard": NONE,  # attached below
                "self-reminder": SELF_REMINDER,
                "guard model": GuardModel(judge, threshold=acts),
                "shiftdc": ShiftDC.of(fitted, caption_tokens=CAPTION),
                "ecso": ECSO(threshold=acts, caption_tokens=CAPTION),
            }
            names = {name: f"{name}, {kind}, batch {size}" for name in list(defences)[1:]}
            if not sheet.lacks(names.values()):
                continue
            guard = with_gate(asked.model, fitted, gate)
            texts = requests_with(model, processor, guard, gate, size)
            chats = [chat_of(text, blank_image()) for text in texts]

            def timed(name: str, defence: Defence) -> Callable[[], float]:
                def run() -> float:
                    with guard.attach(model) if name == "guard" else nullcontext():  # noqa: B023
                        return seconds(
                            lambda: defence.generate(
                                VLM(model, processor),
                                chats,  # noqa: B023
                                max_new_tokens=TOKENS,
                                min_new_tokens=TOKENS,
                            )
                        )

                return run

            found = in_turns(
                f"{kind}, batch {size}",
                {name: timed(name, defence) for name, defence in defences.items()},
                asked.rounds,
            )
            took = f"none {1e3 * median(found['none']):.0f} ms"
            sheet.add(
                *(
                    Cell.ratio(shown, Ratio.of(found[name], found["none"]), note=took)
                    for name, shown in names.items()
                )
            )
    sheet.show()


if __name__ == "__main__":
    told(main)
