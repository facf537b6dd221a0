"""MM-SafetyBench (Liu et al. 2023, 2311.17600): images that carry the harm of a request."""

from __future__ import annotations

from functools import partial
from pathlib import Path

from vlm_safeguard.errors import SafeguardError
from vlm_safeguard.evaluation.asks.files import read_lines
from vlm_safeguard.evaluation.asks.obtain import file_in
from vlm_safeguard.evaluation.asks.samples import Benchmark, Sample

#: The number of questions in each configuration, spelt as the data set spells it.
CONFIGURATIONS = {
    "Illegal_Activitiy": 97,
    "HateSpeech": 163,
    "Malware_Generation": 44,
    "Physical_Harm": 144,
    "EconomicHarm": 122,
    "Fraud": 154,
    "Sex": 109,
    "Political_Lobbying": 153,
    "Privacy_Violence": 139,
    "Legal_Opinion": 130,
    "Financial_Advice": 167,
    "Health_Consultation": 109,
    "Gov_Decision": 149,
}
VARIANTS = ("SD", "SD_TYPO", "TYPO")
_PLAIN = "Text_only"


def _read(root: Path, variants: tuple[str, ...]) -> list[Sample]:
    if not root.is_dir():
        raise SafeguardError(f"{root} is a file; give the folder that holds data/.")
    samples: list[Sample] = []
    for configuration, count in CONFIGURATIONS.items():
        requests = {
            record.text("id"): record.text("question")
            for record in read_lines(_file(root, configuration, _PLAIN))
        }
        for variant in variants:
            path = _file(root, configuration, variant)
            before = len(samples)
            for record in read_lines(path):
                number = record.text("id")
                if number not in requests:
                    raise SafeguardError(f"{record.where}: no {_PLAIN} question has id {number}.")
                samples.append(
                    Sample(
                        f"{configuration}-{variant}-{number}",
                        "harmful",
                        requests[number],
                        f"{configuration}/{variant}",
                        image=record.image("image"),
                        beside=record.text("question"),
                    )
                )
            if (rows := len(samples) - before) != count:
                raise SafeguardError(f"{path} holds {rows} rows; the original has {count}.")
    return samples


def _file(root: Path, configuration: str, variant: str) -> Path:
    place = f"{configuration}/{variant}.parquet"
    return file_in(root, f"data/{place}", place)


def _benchmark(name: str, title: str, *variants: str) -> Benchmark:
    return Benchmark(
        name=name,
        title=title,
        kinds=frozenset({"harmful"}),
        licence="CC BY-NC 4.0",
        source="PKU-Alignment/MM-SafetyBench on the Hub, or the path of such a folder: "
        "data/CONFIGURATION/VARIANT.parquet (id, question, image), 13 configurations, the "
        "variants SD, SD_TYPO, TYPO and Text_only.",
        count=len(variants) * sum(CONFIGURATIONS.values()),
        own_images=True,
        read=partial(_read, variants=variants),
        hub="PKU-Alignment/MM-SafetyBench",
        files=tuple(f"data/*/{variant}.parquet" for variant in (*variants, _PLAIN)),
    )


MM_SAFETYBENCH = _benchmark("mm_safetybench", "MM-SafetyBench", *VARIANTS)
#: One variant each, as results are published; as text, all variants ask the same.
MM_SAFETYBENCH_BY_VARIANT = tuple(
    _benchmark(f"mm_safetybench_{variant.lower()}", f"MM-SafetyBench {variant}", variant)
    for variant in VARIANTS
)
