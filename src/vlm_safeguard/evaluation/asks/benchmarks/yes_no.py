"""POPE (Li et al. 2023, 2305.10355) and MME (Fu et al. 2023, 2306.13394): yes or no, by an image.

MME's own score, accuracy+, wants both questions about an image right: their ids differ in the
last figure only.
"""

from __future__ import annotations

from collections import Counter
from pathlib import Path

from vlm_safeguard.evaluation.asks.files import read_lines
from vlm_safeguard.evaluation.asks.obtain import files_in
from vlm_safeguard.evaluation.asks.samples import Benchmark, Sample

_ANSWERS = ("yes", "no")
_POPE_CATEGORIES = ("adversarial", "popular", "random")
_FORM = " Answer with yes or no."  # POPE's questions do not say it; MME's do


def _pope(root: Path) -> list[Sample]:
    return [
        Sample(
            f"{record.one_of('category', _POPE_CATEGORIES)}-{record.text('question_id')}",
            "utility",
            record.text("question") + _FORM,
            record.one_of("category", _POPE_CATEGORIES),
            image=record.image("image"),
            answer=record.one_of("answer", _ANSWERS),
            choices=_ANSWERS,
        )
        for path in files_in(root, "data/test-*.parquet", "test-*.parquet")
        for record in read_lines(path)
    ]


def _mme(root: Path) -> list[Sample]:
    questions: Counter[str] = Counter()
    samples = []
    for path in files_in(root, "data/test-*.parquet", "test-*.parquet"):
        for record in read_lines(path):
            name = record.text("question_id")
            category = record.text("category")
            name = name if name.startswith(f"{category}/") else f"{category}/{name}"
            questions[name] += 1
            samples.append(
                Sample(
                    f"{name}-{questions[name]}",
                    "utility",
                    record.text("question"),
                    category,
                    image=record.image("image"),
                    answer=record.one_of("answer", _ANSWERS),
                    choices=_ANSWERS,
                )
            )
    return samples


POPE = Benchmark(
    name="pope",
    title="POPE",
    kinds=frozenset({"utility"}),
    licence="MIT; the images are COCO's, under Flickr's terms",
    source="lmms-lab/POPE on the Hub, or the path of such a folder: data/test-*.parquet "
    "(question_id, question, answer, category, image).",
    count=9000,
    own_images=True,
    read=_pope,
    hub="lmms-lab/POPE",
    files=("data/test-*.parquet",),
)
MME = Benchmark(
    name="mme",
    title="MME",
    kinds=frozenset({"utility"}),
    licence="for research only, as its authors have it",
    source="lmms-lab/MME on the Hub, or the path of such a folder: data/test-*.parquet "
    "(question_id, question, answer, category, image).",
    count=2374,
    own_images=True,
    read=_mme,
    hub="lmms-lab/MME",
    files=("data/test-*.parquet",),
)
