"""FigStep's SafeBench (Gong et al. 2023, 2311.05608): requests drawn as images of text."""

from __future__ import annotations

from pathlib import Path

from vlm_safeguard.errors import SafeguardError
from vlm_safeguard.evaluation.asks.files import read_lines
from vlm_safeguard.evaluation.asks.images import checked
from vlm_safeguard.evaluation.asks.obtain import file_in
from vlm_safeguard.evaluation.asks.samples import Benchmark, Sample
from vlm_safeguard.evaluation.asks.typography import INSTRUCTION


def _read(root: Path, table: str, images_folder: str) -> list[Sample]:
    if not root.is_dir():
        raise SafeguardError(f"{root} is a file; give the folder of the repository, or its data/.")
    path = file_in(root, f"data/question/{table}", f"question/{table}")
    folder = path.parent.parent / "images" / images_folder
    samples = []
    for record in read_lines(path):
        dataset, category, task = (
            record.text(name) for name in ("dataset", "category_id", "task_id")
        )
        record.text("instruction")  # what the image says
        image = checked(folder / f"query_{dataset}_{category}_{task}_6.png", record.where)
        samples.append(
            Sample(
                f"{category}-{task}",
                "harmful",
                record.text("question"),
                record.text("category_name"),
                image=image,
                beside=INSTRUCTION,
            )
        )
    return samples


_SOURCE = (
    "github.com/CryptoAILab/FigStep: give the path of the repository, for "
    "data/question/{} (dataset, category_id, task_id, category_name, question, instruction) and "
    "data/images/{}/. What stands beside the images is in its code, not its data: ours is in "
    "our own words."
)
FIGSTEP = Benchmark(
    name="figstep",
    title="FigStep SafeBench",
    kinds=frozenset({"harmful"}),
    licence="MIT",
    source=_SOURCE.format("safebench.csv", "SafeBench"),
    count=500,
    own_images=True,
    read=lambda root: _read(root, "safebench.csv", "SafeBench"),
    files=("data/question/safebench.csv", "data/images/SafeBench/*.png"),
)
FIGSTEP_TINY = Benchmark(
    name="figstep_tiny",
    title="FigStep SafeBench-Tiny",
    kinds=frozenset({"harmful"}),
    licence="MIT",
    source=_SOURCE.format("SafeBench-Tiny.csv", "SafeBench-Tiny"),
    count=50,
    own_images=True,
    read=lambda root: _read(root, "SafeBench-Tiny.csv", "SafeBench-Tiny"),
    files=("data/question/SafeBench-Tiny.csv", "data/images/SafeBench-Tiny/*.png"),
)
