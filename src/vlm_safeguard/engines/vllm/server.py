"""vLLM's own API server, with its engine client wrapped."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from vlm_safeguard.engines.vllm import question
from vlm_safeguard.engines.vllm.client import GuardedClient, read
from vlm_safeguard.engines.vllm.fitted import Fitted
from vlm_safeguard.engines.vllm.gate import check_order, runnable
from vlm_safeguard.engines.vllm.order import Order
from vlm_safeguard.engines.vllm.supported import check_config, check_version
from vlm_safeguard.engines.vllm.trial import Trial
from vlm_safeguard.engines.vllm.verdict import Judge
from vlm_safeguard.engines.vllm.worker_options import check_given, subspaces, worker_options
from vlm_safeguard.errors import SafeguardError

_FRONT = "vlm_safeguard.engines.vllm.front.Front"


def serve(
    model: str, guard: Fitted, options: Sequence[str], *, order: Order, refusal_alone: bool
) -> None:
    """Serve until the process is told to end.

    Args:
        options: vLLM's own, as `vllm serve` takes them.
        order: see there.
        refusal_alone: see `runnable`.

    Raises:
        SafeguardError: the policy, the release, an option or the model is not one that the guard
            was tested with; nothing is served.
    """
    import uvloop
    import vllm
    from vllm.entrypoints.launchers.cli_args import make_arg_parser, validate_parsed_serve_args
    from vllm.entrypoints.serve.utils.api_utils import cli_env_setup
    from vllm.logger import configure_logging_from_args
    from vllm.utils.argparse_utils import FlexibleArgumentParser

    check_version(vllm.__version__)
    judge = Judge(runnable(guard.policy, refusal_alone=refusal_alone))
    check_order(judge.policy, order)
    cli_env_setup()
    arguments = make_arg_parser(FlexibleArgumentParser()).parse_args(["--model", model, *options])
    configure_logging_from_args(arguments)
    validate_parsed_serve_args(arguments)
    _check_arguments(arguments)
    for name, value in worker_options(judge).items():
        setattr(arguments, name, value)
    arguments.middleware = [*arguments.middleware, _FRONT]  # the last one is outermost
    if order is not Order.TOGETHER:
        # rendering notes that the engine has an image, which it may never be given
        arguments.mm_processor_cache_gb = 0
    # asyncio would leave the sockets that vLLM makes to hold small packets back for 40 ms
    uvloop.run(_serve(arguments, guard, judge, order))


def _check_arguments(arguments: Any) -> None:
    """Refuse what would answer beside the guarded client.

    Raises:
        SafeguardError: which option.
    """
    refused = {
        "--api-server-count": (arguments.api_server_count or 1) > 1,
        "--headless": arguments.headless,
        "--grpc": getattr(arguments, "grpc", False),
        "--trust-request-chat-template": arguments.trust_request_chat_template,
        "--trust-request-mm-kwargs": arguments.trust_request_mm_kwargs,
        "--worker-cls": arguments.worker_cls != "auto",
        "--worker-extension-cls": bool(arguments.worker_extension_cls),
        "--additional-config": bool(arguments.additional_config),
        "--logits-processors": bool(arguments.logits_processors),
    }
    reasons = [name for name, given in refused.items() if given]
    if reasons:
        raise SafeguardError(f"The guard was not tested with {', '.join(reasons)}; leave it out.")


async def _serve(arguments: Any, guard: Fitted, judge: Judge, order: Order) -> None:
    from vllm.entrypoints.launchers.api_server import entry

    address, listening = entry.setup_server(arguments, reuse_port=False)
    try:
        async with entry.build_async_engine_client(arguments) as engine:
            check_config(engine.vllm_config, judge, guard.provenance)
            await _try(engine, guard, judge)
            client = GuardedClient(engine, judge, order)
            ended = await entry.build_and_serve(client, address, listening, arguments)
        await ended
    finally:
        listening.close()


async def _try(engine: Any, guard: Fitted, judge: Judge) -> None:
    """See `Trial`."""
    packed = engine.vllm_config.model_config.quantization is not None
    trial, outputs = Trial(guard, judge, packed=packed), []
    if judge.policy.edits:
        given = await engine.collective_rpc("set_subspaces", args=(subspaces(judge),))
        check_given(judge, given)
    for number, text in enumerate(trial.texts):
        last: Any = None
        prompt = question.tokens(text, {})
        async for output in engine.generate(prompt, trial.params, f"guard-trial-{number}"):
            last = output
        outputs.append(last)
    questions = trial.questions
    asked = list(zip(questions, await read(engine, questions, "trial", {}), strict=True))
    trial.check(outputs, asked)
    if (edit := trial.edit(asked)) is not None:
        text, mark = edit
        prompt = question.salted(question.tokens(text, {}), mark)
        async for _ in engine.generate(prompt, mark.on(trial.bare_params), "guard-edit"):
            pass
        question.check_edits(mark, await engine.collective_rpc("take_edited", args=([mark.name],)))
