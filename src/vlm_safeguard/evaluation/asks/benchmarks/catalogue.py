"""Every benchmark by name: the project's own first."""

from __future__ import annotations

from vlm_safeguard.evaluation.asks.benchmarks.advbench import ADVBENCH
from vlm_safeguard.evaluation.asks.benchmarks.figstep import FIGSTEP, FIGSTEP_TINY
from vlm_safeguard.evaluation.asks.benchmarks.malicious_instruct import MALICIOUS_INSTRUCT
from vlm_safeguard.evaluation.asks.benchmarks.mm_harmful import MM_HARMFUL
from vlm_safeguard.evaluation.asks.benchmarks.mm_safetybench import (
    MM_SAFETYBENCH,
    MM_SAFETYBENCH_BY_VARIANT,
)
from vlm_safeguard.evaluation.asks.benchmarks.mossbench import MOSSBENCH
from vlm_safeguard.evaluation.asks.benchmarks.own import (
    DEVELOPMENT,
    HARMFUL,
    HARMLESS,
    JAILBREAK,
    LOOKALIKE,
    SCENE_QUESTIONS,
)
from vlm_safeguard.evaluation.asks.benchmarks.xstest import XSTEST
from vlm_safeguard.evaluation.asks.benchmarks.yes_no import MME, POPE
from vlm_safeguard.evaluation.asks.samples import Benchmark

BENCHMARKS: dict[str, Benchmark] = {
    benchmark.name: benchmark
    for benchmark in (
        HARMFUL,
        HARMLESS,
        JAILBREAK,
        LOOKALIKE,
        SCENE_QUESTIONS,
        DEVELOPMENT,
        MALICIOUS_INSTRUCT,
        MM_HARMFUL,
        ADVBENCH,
        FIGSTEP,
        FIGSTEP_TINY,
        MM_SAFETYBENCH,
        *MM_SAFETYBENCH_BY_VARIANT,
        XSTEST,
        MOSSBENCH,
        POPE,
        MME,
    )
}
