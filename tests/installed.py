"""What `pip install vlm-safeguard` alone gives: run by `make wheel` where no extra is installed."""

from __future__ import annotations

import importlib
import os
import pkgutil
import subprocess
import sys
import tempfile
from importlib.util import find_spec
from pathlib import Path

import vlm_safeguard
from vlm_safeguard import pocket
from vlm_safeguard.anchors import shipped_anchors
from vlm_safeguard.extras import MissingExtraError

EXTRAS = ("fastapi", "gguf", "inspect_ai", "matplotlib", "peft", "pyarrow", "vllm")
ROOMS_OF_EXTRAS = ("cli", "engines.vllm", "evaluation", "playground", "report", "serving")
DATA = (
    *("py.typed", "pocket/weights/pocket.safetensors"),
    *("report/templates/report.css", "playground/page/index.html"),
)


def command(*arguments: str) -> tuple[int, str]:
    """Exit code and standard error of `vlm-safeguard`."""
    done = subprocess.run(
        [Path(sys.executable).with_name("vlm-safeguard"), *arguments],
        capture_output=True,
        text=True,
        check=False,
    )
    return done.returncode, done.stderr


def main() -> None:
    installed = Path(vlm_safeguard.__file__).parent
    assert installed.parent.name == "site-packages", installed
    assert all(find_spec(name) is None for name in EXTRAS), "an extra is installed"
    assert all((installed / path).is_file() for path in DATA)
    assert len(shipped_anchors()) > 100

    for module in pkgutil.walk_packages([str(installed)], "vlm_safeguard."):
        room = module.name.removeprefix("vlm_safeguard.")
        if not f"{room}.".startswith(tuple(f"{extra}." for extra in ROOMS_OF_EXTRAS)):
            importlib.import_module(module.name)

    sentence = "This needs {}: pip install 'vlm-safeguard[{}]'."
    with tempfile.TemporaryDirectory() as no_weights:
        os.environ["VLM_SAFEGUARD_CACHE"] = no_weights
        message = None
        try:
            pocket.load()
        except MissingExtraError as error:
            message = str(error)
    assert message == sentence.format("gguf", "pocket"), message
    for arguments, missing, extra in (
        (("eval",), "inspect_ai", "eval"),
        (("report", "."), "matplotlib", "report"),
        (("serve", "pocket"), "fastapi and prometheus_client and uvicorn", "serve"),
        (("playground",), "fastapi and uvicorn", "playground"),
    ):
        message = f"vlm-safeguard: {sentence.format(missing, extra)}\n"
        assert command(*arguments) == (1, message), command(*arguments)
    print("The wheel works without its extras, and names each where it is needed.")


if __name__ == "__main__":
    main()
