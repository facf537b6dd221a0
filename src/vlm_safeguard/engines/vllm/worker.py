"""vLLM's own worker, which reads and edits states for the guard: `--worker-cls` names it."""

from __future__ import annotations

import time
from typing import Any

from vllm.platforms import current_platform

from vlm_safeguard.engines.vllm.edit_passes import EditPasses
from vlm_safeguard.engines.vllm.edited_layers import EditedLayers
from vlm_safeguard.engines.vllm.layers import WatchedLayers
from vlm_safeguard.engines.vllm.marks import EditSettings, Settings
from vlm_safeguard.engines.vllm.passes import Passes
from vlm_safeguard.engines.vllm.plain import from_bytes
from vlm_safeguard.engines.vllm.scheduled import Admitted, Scheduled
from vlm_safeguard.errors import SafeguardError
from vlm_safeguard.policy.subspace import Subspace

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
        layers = _decoder_layers(self.get_model())
        self._policy, self._edited = settings.policy, self._edited_layers(layers, settings.edit)
        watched = WatchedLayers(
            layers,
            settings.layers,
            hidden_size=self.model_config.get_hidden_size(),
            capacity=self.scheduler_config.max_num_seqs,
            dtype=self.model_config.dtype,
            device=self.device,
        )
        self._passes = Passes(watched)
        self._edits = None if self._edited is None else EditPasses(self._edited)
        self._counts: dict[str, int] | None = None
        forward = runner._model_forward

        def guarded_forward(*args: Any, **kwargs: Any) -> Any:
            self._begin()
            return forward(*args, **kwargs)

        runner._model_forward = guarded_forward  # which vLLM leaves to be overridden

    def execute_model(self, scheduler_output: Any) -> Any:
        """As vLLM's; what is asked of the pass is read in it."""
        new = [
            Admitted.of(
                self._policy,
                each.req_id,
                each.sampling_params.extra_args,
                len(each.prompt_token_ids),
            )
            for each in scheduler_output.scheduled_new_reqs
        ]
        finished = scheduler_output.finished_req_ids
        self._passes.admit(new, finished)
        if self._edits is not None:
            self._edits.admit(new, finished)
        self._counts = scheduler_output.num_scheduled_tokens
        try:
            output = super().execute_model(scheduler_output)
        finally:
            self._counts = None
        self._passes.end()
        if self._edits is not None:
            self._edits.end()
        return output

    def set_subspaces(self, subspaces: dict[str, list[bytes]]) -> list[int]:
        """Take the policy's `Subspace` of each layer, in plain values; the layers of this worker.

        The client calls it on all workers, before anything is edited.
        """
        assert self._edited is not None, "only who edits is given subspaces"
        given = {}
        for number, values in subspaces.items():
            V, *rest = map(from_bytes, values)
            given[int(number)] = Subspace(V.view(self._edited.rank, -1), *rest)
        self._edited.fill(given)
        return list(self._edited.numbers)

    def hold(self, seconds: float) -> None:
        """Let requests arrive before the engine's next pass; the client calls it on all workers."""
        time.sleep(seconds)

    def take_states(self, names: list[str]) -> list[dict[str, Any] | None]:
        """See `Passes.take` and `EditPasses.take_seen`; the client calls it on all workers."""
        taken = self._passes.take(names)
        if self._edits is None:
            return taken
        seen = [self._edits.take_seen(name) for name in names]
        pairs = zip(taken, seen, strict=True)
        return [each and each | {"coordinates": more} for each, more in pairs]

    def take_edited(self, names: list[str]) -> list[dict[str, Any] | None]:
        """See `EditPasses.take_edited`; the client calls it on all workers."""
        assert self._edits is not None, "only who edits is asked for it"
        return self._edits.take_edited(names)

    def _edited_layers(self, layers: Any, settings: EditSettings | None) -> EditedLayers | None:
        if settings is None:
            return None
        return EditedLayers(
            layers,
            settings,
            hidden_size=self.model_config.get_hidden_size(),
            capacity=self.scheduler_config.max_num_batched_tokens,
            device=self.device,
        )

    def _begin(self) -> None:
        """The runner has put its batch together, in an order of its own."""
        if self._counts is None:  # a pass over nothing real
            return
        batch = self.model_runner.input_batch
        starts = batch.num_computed_tokens_cpu[: len(batch.req_ids)].tolist()
        scheduled = [
            Scheduled(request, start, self._counts[request], batch.token_ids_cpu[number])
            for number, (request, start) in enumerate(zip(batch.req_ids, starts, strict=True))
        ]
        self._passes.begin(scheduled)
        if self._edits is not None:
            self._edits.begin(scheduled)


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
