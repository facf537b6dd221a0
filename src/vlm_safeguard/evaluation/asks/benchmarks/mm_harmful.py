"""MM-Harmful Bench (Wang et al. 2024, 2401.11206): requests that need their image."""

from __future__ import annotations

from pathlib import Path

from vlm_safeguard.errors import SafeguardError
from vlm_safeguard.evaluation.asks.files import read_lines
from vlm_safeguard.evaluation.asks.images import checked
from vlm_safeguard.evaluation.asks.obtain import file_in
from vlm_safeguard.evaluation.asks.samples import Benchmark, Sample


def _read(root: Path) -> list[Sample]:
    if not root.is_dir():
        raise SafeguardError(f"{root} is a file; give the folder that holds it and images/.")
    path = file_in(root, "*.jsonl", "MM-HarmfulBench/*.jsonl")
    samples = []
    for number, record in enumerate(read_lines(path)):
        record.text("image_url")
        # the images are numbered in the order of the questions
        image = checked(path.parent / "images" / f"{number}.jpg", record.where)
        samples.append(Sample(f"{number:02}", "harmful", record.text("question"), image=image))
    return samples


MM_HARMFUL = Benchmark(
    name="mm_harmful",
    title="MM-Harmful Bench",
    kinds=frozenset({"harmful"}),
    licence="CC BY-NC 4.0",
    source="github.com/Jihuai-wpy/InferAligner: give the path of MM-HarmfulBench, the folder of "
    "the questions (JSONL: image_url, question) and images/0.jpg to 99.jpg.",
    count=100,
    own_images=True,
    read=_read,
    files=("*.jsonl", "images/*.jpg"),
)
