"""Models that several processes run together: which ways of sharing the work are guarded."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch.distributed import is_available

from vlm_safeguard.errors import SafeguardError

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup
    from transformers import PreTrainedModel

#: What to do where tokens, layers or requests are shared out, and not weights alone.
SHARE_WEIGHTS = (
    'Share its weights alone, by tensor parallelism (DistributedConfig(tp_plan="auto")), or '
    "spread it over devices by device_map"
)
_SHARDED = {"FSDPModule", "FullyShardedDataParallel"}  # names, as there are several of each


def check_plan(model: PreTrainedModel) -> None:
    """Refuse a model whose processes share out more than weights.

    With tensor and expert parallelism every process has the states of all tokens after each layer.

    Raises:
        SafeguardError: what they share out.
    """
    for path, module in model.named_modules():
        if not _SHARDED.isdisjoint(each.__name__ for each in type(module).__mro__):
            raise SafeguardError(
                f"FSDP shards {path or 'this model'}, and gathers its weights around every pass of "
                "every process, each of which has requests of its own, so that the guard's passes "
                f"would wait for others that do not come. {SHARE_WEIGHTS}."
            )
    if getattr(model, "_pp_stage", None) is not None:
        raise SafeguardError(
            "By pipeline parallelism this process has some of the model's layers only, so the "
            f"guard cannot act in the others. {SHARE_WEIGHTS}."
        )
    if getattr(model, "_mesh_manager", None) is None:
        return  # whatever its plans are, they are not applied
    from transformers.distributed.tensor_parallel import ALL_PARALLEL_STYLES, SequenceParallel

    plans: Any = (model._tp_plan, model._ep_plan)
    sequence = [
        name
        for plan in plans
        for name, style in (plan or {}).items()
        if isinstance(ALL_PARALLEL_STYLES[style], SequenceParallel)
    ]
    if sequence or getattr(model.config.distributed_config, "enable_sequence_parallel", False):
        raise SafeguardError(
            "By sequence parallelism each process has the states of some tokens only"
            f"{f' ({sequence[0]})' if sequence else ''}, so the guard cannot tell which they are. "
            "Leave it out of the plan."
        )


def process_groups(model: PreTrainedModel) -> list[ProcessGroup]:
    """Of the processes that run this model together: one for each way they share its weights.

    In the same order in each of them.
    """
    if not is_available():
        return []
    from torch.distributed.tensor import DTensor

    meshes = [each.device_mesh for each in model.parameters() if isinstance(each, DTensor)]
    if (manager := getattr(model, "_mesh_manager", None)) is not None:
        meshes.append(manager.get_mesh("tp"))  # shards of packed weights are plain tensors
    groups = [group for mesh in dict.fromkeys(meshes) for group in mesh.get_all_groups()]
    return list({group.group_name: group for group in groups}.values())


def is_shard(tensor: object) -> bool:
    """Whether a tensor knows that this process has a part of it only."""
    if not is_available():
        return False
    from torch.distributed.tensor import DTensor

    return isinstance(tensor, DTensor)


@torch.no_grad()
def whole(tensor: torch.Tensor) -> torch.Tensor:
    """A tensor with the parts that other processes have, which have to call this, too."""
    return tensor.full_tensor() if is_shard(tensor) else tensor  # type: ignore[attr-defined]


@torch.no_grad()
def own_part(tensor: torch.Tensor) -> torch.Tensor:
    """The part of a tensor that this process has: a plain tensor on the same memory."""
    return tensor.to_local() if is_shard(tensor) else tensor  # type: ignore[attr-defined]
