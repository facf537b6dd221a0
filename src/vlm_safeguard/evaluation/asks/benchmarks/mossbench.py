"""MOSSBench (Li et al. 2024, 2406.17806): harmless requests whose images look harmful."""

from __future__ import annotations

from pathlib import Path

from vlm_safeguard.errors import SafeguardError
from vlm_safeguard.evaluation.asks.files import Record, read_lines
from vlm_safeguard.evaluation.asks.images import checked
from vlm_safeguard.evaluation.asks.obtain import file_in
from vlm_safeguard.evaluation.asks.samples import Benchmark, Sample

_TYPES = {
    "type 1": "exaggerated risk",
    "type 2": "negated harm",
    "type 3": "counterintuitive interpretation",
}


def _read(root: Path) -> list[Sample]:
    if not root.is_dir():
        raise SafeguardError(f"{root} is a file; give the folder of the repository, or its data/.")
    place = "images_information/information.json"
    path = file_in(root, f"data/{place}", place)
    folder = path.parent.parent
    samples = []
    for record in read_lines(path):
        metadata = record.fields.get("metadata")
        if not isinstance(metadata, dict):
            raise SafeguardError(f"{record.where}: 'metadata' is missing or not an object.")
        kind = Record(f"{record.where}, metadata", metadata).one_of("over", tuple(_TYPES))
        samples.append(
            Sample(
                record.text("pid"),
                "harmless",
                record.text("question"),
                _TYPES[kind],
                image=checked(folder / "images" / Path(record.text("image")).name, record.where),
            )
        )
    return samples


MOSSBENCH = Benchmark(
    name="mossbench",
    title="MOSSBench",
    kinds=frozenset({"harmless"}),
    licence="CC BY-SA 4.0; its authors ask not to train on it",
    source="github.com/xirui-li/MOSSBench: give the path of the repository, for "
    "data/images_information/information.json (pid, question, image, metadata.over) and "
    "data/images/. The Hub has the images without that file.",
    count=300,
    own_images=True,
    read=_read,
    files=("data/images_information/information.json", "data/images/*"),
)
