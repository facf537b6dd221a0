"""Random calls of guarded models: `python tests/fuzz.py --cases 5000 --seed 1`.

Each piece of 500 cases has a seed of its own, counted from the one that is given: `--only 3` runs
the fourth piece. Prints how far it is, at the end what came of the cases and the
seeds; exits with 1 where something did not hold.
"""

from __future__ import annotations

import argparse
import sys
import time
import traceback
from collections import Counter

import hypothesis
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from transformers.utils import logging

from fuzzing.cases import Case, cases
from fuzzing.check import check
from fuzzing.media import Media, check_media, media_cases
from fuzzing.models import fitted, model
from fuzzing.threads import Threads, check_threads, thread_cases

PIECE = 500

kinds = st.sampled_from([*[cases()] * 16, thread_cases(), thread_cases(), media_cases()]).flatmap(
    lambda kind: kind
)


def came_of(case: Case | Threads | Media) -> str:
    """Run one."""
    if isinstance(case, Media):
        return check_media(case)
    if isinstance(case, Threads):
        return check_threads(case, model(), fitted())
    return check(case, model(), fitted())


def piece(seed: int, count: int, outcomes: Counter[str], failures: list[str]) -> None:
    """Run so many cases; nothing is shrunk, and none stops the others."""
    begun = time.monotonic()
    done = 0

    @hypothesis.seed(seed)
    @settings(
        max_examples=count,
        deadline=None,
        database=None,
        phases=[Phase.generate],
        suppress_health_check=list(HealthCheck),
    )
    @given(kinds)
    def run(case: Case | Threads | Media) -> None:
        nonlocal done
        done += 1
        try:
            outcomes[came_of(case)] += 1
        except Exception as error:
            kind = "does not hold" if isinstance(error, AssertionError) else "the check failed"
            failures.append(f"seed {seed}, {kind}: {traceback.format_exc(limit=-3)}\n{case}")
            print(failures[-1], flush=True)
        if done % 50 == 0:
            pace = (time.monotonic() - begun) / done
            print(f"seed {seed}: {done} of {count}, {pace:.2f} s each", flush=True)

    run()


def main() -> int:
    """Of the command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--cases", type=int, default=PIECE)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--only", type=int, help="one piece, counted from 0")
    arguments = parser.parse_args()
    logging.set_verbosity_error()
    outcomes: Counter[str] = Counter()
    failures: list[str] = []
    seeds = []
    pieces = range(-(-arguments.cases // PIECE))
    for number in pieces if arguments.only is None else [arguments.only]:
        count = min(PIECE, arguments.cases - number * PIECE)
        seeds.append(arguments.seed + number)
        piece(seeds[-1], count, outcomes, failures)
    for outcome, count in outcomes.most_common():
        print(f"{count:6} {outcome}")
    print(f"{sum(outcomes.values())} cases held, {len(failures)} did not; seeds {seeds}")
    return bool(failures)


if __name__ == "__main__":
    sys.exit(main())
