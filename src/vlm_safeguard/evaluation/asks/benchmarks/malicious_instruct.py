"""MaliciousInstruct (Huang et al. 2023, 2310.06987): a hundred requests, one a line."""

from __future__ import annotations

from pathlib import Path

from vlm_safeguard.errors import SafeguardError
from vlm_safeguard.evaluation.asks.files import read_lines
from vlm_safeguard.evaluation.asks.obtain import file_in
from vlm_safeguard.evaluation.asks.samples import Benchmark, Sample


def _read(root: Path) -> list[Sample]:
    path = file_in(root, "MaliciousInstruct.txt", "data/MaliciousInstruct.txt", "data/*.parquet")
    texts = (
        [record.text("prompt") for record in read_lines(path)]
        if path.suffix == ".parquet"
        else _lines(path)
    )
    return [Sample(f"{number:03}", "harmful", text) for number, text in enumerate(texts, start=1)]


def _lines(path: Path) -> list[str]:
    try:
        lines = path.read_text("utf-8-sig").rstrip("\n").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise SafeguardError(f"{path} cannot be read as UTF-8 text: {error}") from error
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            raise SafeguardError(f"{path}, line {number}: empty; each line is a request.")
    return [line.strip() for line in lines]


MALICIOUS_INSTRUCT = Benchmark(
    name="malicious_instruct",
    title="MaliciousInstruct",
    kinds=frozenset({"harmful"}),
    licence="CC BY-SA 4.0 on the Hub; the authors' repository names none",
    source="github.com/Princeton-SysML/Jailbreak_LLM: give the path of data/MaliciousInstruct.txt; "
    "or walledai/MaliciousInstruct on the Hub (Parquet, column prompt).",
    count=100,
    own_images=False,
    read=_read,
    hub="walledai/MaliciousInstruct",
    files=("data/*.parquet",),
)
