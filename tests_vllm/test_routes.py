"""Every route of the installed vLLM is classified."""

from __future__ import annotations

import argparse
from pathlib import Path

import pytest
import vllm
from vllm.engine.protocol import EngineClient
from vllm.entrypoints.launchers.app import build_app
from vllm.entrypoints.launchers.cli_args import make_arg_parser
from vllm.utils.argparse_utils import FlexibleArgumentParser

from vlm_safeguard.engines.vllm import routes
from vlm_safeguard.engines.vllm.supported import check_version

pytestmark = pytest.mark.xdist_group("pocket")  # they share a checkpoint and its guard


def test_the_installed_release_was_tested() -> None:
    check_version(vllm.__version__)


def test_no_route_is_unknown(checkpoints: tuple[Path, Path]) -> None:
    arguments: argparse.Namespace = make_arg_parser(FlexibleArgumentParser()).parse_args(
        ["--model", str(checkpoints[0])]
    )
    paths = {route.path for route in build_app(arguments, ("generate",), None).routes}
    assert paths >= routes.GUARDED
    assert paths <= routes.GUARDED | routes.PASSED | routes.REFUSED.keys()
    for path in paths:
        assert (routes.reason(path) is not None) == (path in routes.REFUSED)


def test_the_engine_client_is_the_one_that_was_wrapped() -> None:
    """A new method of it may be a new way to an answer."""
    known = {
        *("abort", "add_lora", "check_admission", "check_health", "collective_rpc"),
        *("compute_weight_checksums", "do_log_stats", "encode", "finish_weight_update"),
        *("generate", "get_kv_event_sources", "get_status", "get_supported_tasks"),
        *("get_weight_version", "handle_fault", "init_weight_transfer_engine", "is_paused"),
        *("is_sleeping", "is_tracing_enabled", "notify_kv_transfer_request_rejected"),
        *("pause_generation", "release_kv_cache_memory", "reset_encoder_cache", "reset_mm_cache"),
        *("reset_prefix_cache", "resume_generation", "scale_elastic_ep", "shutdown"),
        *("shutdown_weight_transfer_engine", "sleep", "start_draft_weight_update"),
        *("start_profile", "start_weight_update", "stop_profile", "update_weight_version"),
        *("update_weights", "wake_up", "dead_error", "errored", "is_running", "is_stopped"),
    }
    assert {name for name in vars(EngineClient) if not name.startswith("_")} == known
