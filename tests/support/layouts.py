"""Small files of ours in the layouts in which benchmarks are published.

Each writer writes a whole benchmark, its rows changed by `change`, and gives what `load` takes.
"""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Callable, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from vlm_safeguard.evaluation.asks.benchmarks.mm_safetybench import CONFIGURATIONS

Rows = list[dict[str, Any]]


def make_folder(folder: Path) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def as_it_is(rows: Rows) -> None:
    """A change that changes nothing."""


@cache
def png(shade: int) -> bytes:
    content = io.BytesIO()
    Image.new("L", (4, 4), shade).save(content, "png")
    return content.getvalue()


def write_csv(path: Path, rows: Rows) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)


def write_parquet(path: Path, rows: Rows) -> None:
    arrow, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    path.parent.mkdir(parents=True, exist_ok=True)
    parquet.write_table(arrow.Table.from_pylist(rows), path)


def image_cell(shade: int) -> dict[str, Any]:
    return {"bytes": png(shade), "path": None}


def malicious_instruct(folder: Path, change: Callable[[Rows], None]) -> Path:
    rows: Rows = [{"line": f"Do the bad thing number {n}"} for n in range(100)]
    change(rows)
    path = folder / "MaliciousInstruct.txt"
    path.write_text("".join(row["line"] + "\n" for row in rows), "utf-8")
    return path


def advbench(folder: Path, change: Callable[[Rows], None]) -> Path:
    rows: Rows = [{"goal": f"Do bad, thing {n}", "target": "Sure"} for n in range(520)]
    change(rows)
    write_csv(folder / "data/advbench/harmful_behaviors.csv", rows)
    return folder


def xstest(folder: Path, change: Callable[[Rows], None]) -> Path:
    rows: Rows = [
        {
            "id": n,
            "prompt": f'Ask "{n}"',
            "type": "homonyms" if n < 250 else "contrast_homonyms",
            "label": "safe" if n < 250 else "unsafe",
            "focus": "kill",
            "note": "",
        }
        for n in range(450)
    ]
    change(rows)
    write_csv(folder / "xstest_prompts.csv", rows)
    return folder


def mm_harmful(folder: Path, change: Callable[[Rows], None]) -> Path:
    rows: Rows = [{"image_url": "https://x", "question": f"How to do {n}?"} for n in range(100)]
    change(rows)
    (folder / "images").mkdir()
    for n in range(len(rows)):
        Image.new("L", (4, 4), n).save(folder / "images" / f"{n}.jpg")
    (folder / "questions.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def figstep(folder: Path, change: Callable[[Rows], None]) -> Path:
    rows: Rows = [
        {
            "dataset": "ForbidQI",
            "category_id": c,
            "task_id": t,
            "category_name": f"Category {c}",
            "question": f"How could one do {t} of {c}?",
            "instruction": f"Steps to do {t} of {c}.",
        }
        for c in range(1, 11)
        for t in range(1, 51)
    ]
    change(rows)
    write_csv(folder / "data/question/safebench.csv", rows)
    images = make_folder(folder / "data/images/SafeBench")
    for row in rows:
        name = f"query_ForbidQI_{row['category_id']}_{row['task_id']}_6.png"
        (images / name).write_bytes(png(1))
    return folder


def mm_safetybench(
    folder: Path,
    change: Callable[[Rows], None],
    variants: Sequence[str] = ("SD", "SD_TYPO", "TYPO", "Text_only"),
) -> Path:
    for name, count in CONFIGURATIONS.items():
        for variant in variants:
            plain = variant == "Text_only"
            rows: Rows = [
                {
                    "id": str(n),
                    "question": f"{'Do' if plain else 'See the picture and do'} {n}",
                    "image": None if plain else image_cell(n),
                }
                for n in range(count)
            ]
            if (name, variant) == ("Fraud", "SD_TYPO"):
                change(rows)
            write_parquet(folder / "data" / name / f"{variant}.parquet", rows)
    return folder


def mm_safetybench_sd_typo(folder: Path, change: Callable[[Rows], None]) -> Path:
    return mm_safetybench(folder, change, ("SD_TYPO", "Text_only"))


def mossbench(folder: Path, change: Callable[[Rows], None]) -> Path:
    rows: Rows = [
        {
            "pid": str(n),
            "question": f"What about {n}?",
            "image": f"images/{n}.png",
            "metadata": {"over": f"type {n % 3 + 1}", "harm": [1]},
        }
        for n in range(1, 301)
    ]
    change(rows)
    images = make_folder(folder / "data/images")
    for n in range(1, 301):
        (images / f"{n}.png").write_bytes(png(2))
    path = make_folder(folder / "data/images_information") / "information.json"
    path.write_text(json.dumps({str(n): row for n, row in enumerate(rows, 1)}))
    return folder


def pope(folder: Path, change: Callable[[Rows], None]) -> Path:
    rows: Rows = [
        {
            "id": str(n),
            "question_id": str(n % 3000),
            "question": f"Is there {n} in the image?",
            "answer": "yes" if n % 2 else "no",
            "image_source": "COCO",
            "image": image_cell(n % 7),
            "category": ("adversarial", "popular", "random")[n // 3000],
        }
        for n in range(9000)
    ]
    change(rows)
    for part in range(3):
        there = rows[part * 3000 : (part + 1) * 3000]
        write_parquet(folder / "data" / f"test-0000{part}-of-00003-abc.parquet", there)
    return folder


def mme(folder: Path, change: Callable[[Rows], None]) -> Path:
    rows: Rows = [
        {
            "question_id": f"OCR/{n // 2}.jpg",
            "image": image_cell(n % 7),
            "category": "OCR",
            "question": f"Is it {n}? Please answer yes or no.",
            "answer": "Yes" if n % 2 else "No",
        }
        for n in range(2374)
    ]
    change(rows)
    write_parquet(folder / "data/test-00000-of-00001.parquet", rows)
    return folder


WRITERS = {
    writer.__name__: writer
    for writer in (
        malicious_instruct,
        advbench,
        xstest,
        mm_harmful,
        figstep,
        mm_safetybench,
        mm_safetybench_sd_typo,
        mossbench,
        pope,
        mme,
    )
}
