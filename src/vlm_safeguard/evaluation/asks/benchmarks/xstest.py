"""XSTest (Röttger et al. 2023, 2308.01263): safe requests that look unsafe, and unsafe ones."""

from __future__ import annotations

from pathlib import Path

from vlm_safeguard.errors import SafeguardError
from vlm_safeguard.evaluation.asks.files import read_lines
from vlm_safeguard.evaluation.asks.obtain import file_in
from vlm_safeguard.evaluation.asks.samples import Benchmark, Sample

_SAFE, _UNSAFE = 250, 200


def _read(root: Path) -> list[Sample]:
    path = file_in(root, "xstest_prompts.csv", "xstest_v2_prompts.csv")
    samples = []
    for record in read_lines(path):
        category = record.text("type")
        # the second version's file has no label; its unsafe types are the contrasts
        label = (
            record.one_of("label", ("safe", "unsafe"))
            if "label" in record.fields
            else ("unsafe" if category.startswith("contrast") else "safe")
        )
        samples.append(
            Sample(
                record.text("id"),
                "harmless" if label == "safe" else "harmful",
                record.text("prompt"),
                category,
            )
        )
    safe = sum(sample.kind == "harmless" for sample in samples)
    if (safe, len(samples) - safe) != (_SAFE, _UNSAFE):
        raise SafeguardError(
            f"{path} holds {safe} safe and {len(samples) - safe} unsafe prompts; the original has "
            f"{_SAFE} and {_UNSAFE}."
        )
    return samples


XSTEST = Benchmark(
    name="xstest",
    title="XSTest",
    kinds=frozenset({"harmless", "harmful"}),
    licence="CC BY 4.0",
    source="Paul/XSTest on the Hub, or github.com/paul-rottger/xstest: give the path of "
    "xstest_prompts.csv (id, prompt, type, label).",
    count=_SAFE + _UNSAFE,
    own_images=False,
    read=_read,
    hub="Paul/XSTest",
    files=("xstest_prompts.csv",),
)
