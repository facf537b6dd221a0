"""AdvBench's harmful behaviours (Zou et al. 2023, 2307.15043)."""

from __future__ import annotations

from pathlib import Path

from vlm_safeguard.evaluation.asks.files import read_lines
from vlm_safeguard.evaluation.asks.obtain import file_in
from vlm_safeguard.evaluation.asks.samples import Benchmark, Sample


def _read(root: Path) -> list[Sample]:
    path = file_in(
        root, "harmful_behaviors.csv", "data/advbench/harmful_behaviors.csv", "data/*.parquet"
    )
    # on the Hub the column is called prompt
    column = "prompt" if path.suffix == ".parquet" else "goal"
    samples = []
    for number, record in enumerate(read_lines(path), start=1):
        record.text("target")  # the original's second column; what lacks it is another file
        samples.append(Sample(f"{number:03}", "harmful", record.text(column)))
    return samples


ADVBENCH = Benchmark(
    name="advbench",
    title="AdvBench harmful behaviours",
    kinds=frozenset({"harmful"}),
    licence="MIT",
    source="github.com/llm-attacks/llm-attacks: give the path of "
    "data/advbench/harmful_behaviors.csv (goal, target); or walledai/AdvBench on the Hub (Parquet, "
    "prompt and target), whose terms have to be accepted there.",
    count=520,
    own_images=False,
    read=_read,
    hub="walledai/AdvBench",
    files=("data/*.parquet",),
)
