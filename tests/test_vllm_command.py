"""`vlm-safeguard serve --engine vllm`, where vLLM is not installed."""

from __future__ import annotations

import pytest

from support.command import Finished, Run


def fails_with(result: Finished, words: str) -> None:
    assert result.code == 1
    assert words in result.err
    assert "Traceback" not in result.err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["m"], "vLLM needs a MODEL and a --guard"),
        (["--guard", "g"], "vLLM needs a MODEL and a --guard"),
        (["m", "--guard", "g", "--max-batch", "4"], "--max-batch is not for vLLM"),
        (["m", "--guard", "g", "--", "--port", "0"], "vLLM is not in this environment"),
    ],
)
def test_what_is_missing_is_told(run: Run, arguments: list[str], message: str) -> None:
    fails_with(run("serve", "--engine", "vllm", *arguments), message)


def test_options_of_vllm_need_its_engine(run: Run) -> None:
    fails_with(run("serve", "m", "--", "--port", "0"), "'--port' is one argument too many")
