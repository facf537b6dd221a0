"""vLLM's own worker, which reads states for the guard: `--worker-cls` names it."""

from __future__ import annotations

from typing import Any

from vllm.platforms import current_platform

from vlm_safeguard.engines.vllm.layers import WatchedLayers
from vlm_safeguard.engines.vllm.marks import Settings
from vlm_safeguard.engines.vllm.passes import Passes, Scheduled
from vlm_safeguard.errors import SafeguardError

if current_platform.is_cpu():
    from vllm.v1.worker.cpu_worker import CPUWorker as Worker
else:
    from vllm.v1.worker.gpu_worker import Worker


class GuardedWorker(Worker):  # type: ignore[misc]  # vLLM is not in every environment
    """Of one rank."""

    def load_model(self, **options: Any) -> None:
        """Load it, and hook its layers before it is compiled.

        Raises:
            SafeguardError: its layers are not known, or the engine is not set up for the guard.
        """
        super().load_model(**options)
        settings, runner = Settings.of(self.vllm_config.additional_config), self.model_runner
        if self.use_v2_model_runner:
            raise SafeguardError(
                "The guard was not tested with vLLM's second model runner; set "
                "VLLM_USE_V2_MODEL_RUNNER=0."
            )
        layers = WatchedLayers(
            _decoder_layers(self.get_model()),
            settings.layers,
            hidden_size=self.model_config.get_hidden_size(),
            capacity=self.scheduler_config.max_num_seqs,
            dtype=self.model_config.dtype,
            device=self.device,
        )
        self._passes = Passes(settings.policy, layers)
        self._counts: dict[str, int] | None = None
        forward = runner._model_forward

        def guarded_forward(*args: Any, **kwargs: Any) -> Any:
            self._begin()
            return forward(*args, **kwargs)

        runner._model_forward = guarded_forward  # which vLLM leaves to be overridden

    def execute_model(self, scheduler_output: Any) -> Any:
        """As vLLM's; what is asked of the pass is read in it."""
        new = scheduler_output.scheduled_new_reqs
        self._passes.admit(
            [(x.req_id, x.sampling_params.extra_args, len(x.prompt_token_ids)) for x in new],
            scheduler_output.finished_req_ids,
        )
        self._counts = scheduler_output.num_scheduled_tokens
        try:
            output = super().execute_model(scheduler_output)
        finally:
            self._counts = None
        self._passes.end()
        return output

    def take_states(self, names: list[str]) -> list[dict[str, Any] | None]:
        """See `Passes.take`; the client calls it on all workers."""
        return self._passes.take(names)

    def _begin(self) -> None:
        """The runner has put its batch together, in an order of its own."""
        if self._counts is None:  # a pass over nothing real
            return
        batch = self.model_runner.input_batch
        starts = batch.num_computed_tokens_cpu[: len(batch.req_ids)].tolist()
        self._passes.begin(
            [
                Scheduled(request, start, self._counts[request])
                for request, start in zip(batch.req_ids, starts, strict=True)
            ]
        )


def _decoder_layers(model: Any) -> Any:
    """Of the language model inside, as vLLM's own classes lay it out.

    Raises:
        SafeguardError: it is laid out otherwise.
    """
    inner = getattr(getattr(model, "get_language_model", lambda: model)(), "model", None)
    layers = getattr(inner, "layers", None)
    if layers is None:
        raise SafeguardError(
            f"The guard does not know where {type(model).__name__} has its decoder layers in vLLM, "
            "so their states cannot be read; choose --refusal-alone."
        )
    return layers
