"""The options of `vlm-safeguard eval`: a plan's fields, with their help and defaults."""

from __future__ import annotations

from collections.abc import Iterator
from inspect import Parameter

from vlm_safeguard.cli.model_options import argument, option
from vlm_safeguard.evaluation.plan import BenchmarkPlan, Plan


def plan_options() -> Iterator[Parameter]:
    """The command's parameters for a plan, in the plan's order.

    A field that holds several values is an option of one value that can be repeated: `defences`
    is `--defence`. `--condition` is that of every benchmark that is named.
    """
    for name in Plan.model_fields:
        if name == "model":
            yield argument(Plan, name)
        elif name not in ("frontier", "attack"):  # too much for a command line
            yield option(Plan, name)
        if name == "benchmarks":
            yield option(BenchmarkPlan, "conditions")
