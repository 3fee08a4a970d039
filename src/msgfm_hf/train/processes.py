"""Several processes as one run: a replica of the model each (DDP), or each with a part of it (FSDP2).

Whatever the number of processes, a checkpoint is that of one: full tensors under their plain names.
"""

import contextlib
from collections.abc import Callable
from typing import TypeVar

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedType, broadcast_object_list, gather_object
from torch import nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_optimizer_state_dict,
    set_optimizer_state_dict,
)
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor

from msgfm_hf.model.modeling_msgfm import MsGFMForPreTraining

T = TypeVar("T")
_FULL = StateDictOptions(full_state_dict=True, cpu_offload=True)


def prepare_model(accelerator: Accelerator, model: MsGFMForPreTraining, fsdp: bool) -> nn.Module:
    """What a step calls: the model itself, a replica that averages gradients, or with `fsdp` the model cut up.

    FSDP2 shards the weights of every block of the encoder, all its experts together, and what is left as one more unit
    (`torch.distributed.fsdp.fully_shard`): a block is whole in memory only while it is computed.

    Raises:
        ValueError: for `fsdp` with one process, or another way of sharding in the configuration of Accelerate.
    """
    if accelerator.distributed_type in (DistributedType.FSDP, DistributedType.DEEPSPEED, DistributedType.MEGATRON_LM):
        raise ValueError(
            f"`distributed_type` of Accelerate must be plain, got {accelerator.distributed_type.value}. Launch without "
            "it; `--fsdp true` shares weights and optimiser among the processes."
        )
    if not fsdp:
        return accelerator.prepare(model)
    if accelerator.num_processes == 1:
        raise ValueError(
            "`fsdp` must have two processes or more, got 1. Start with `accelerate launch --num_processes N`, or leave "
            "it out."
        )
    model.to(accelerator.device)
    mesh = init_device_mesh(accelerator.device.type, (accelerator.num_processes,))
    for layer in model.msgfm.encoder.layers:
        for block in layer.blocks:
            fully_shard(block, mesh=mesh)
    return fully_shard(model, mesh=mesh)


@contextlib.contextmanager
def gradients_stay_local(accelerator: Accelerator, prepared: nn.Module, local: bool):
    """Inside, a backward pass adds to this process's gradients alone (all but the last of accumulated batches)."""
    if isinstance(prepared, FSDPModule):
        prepared.set_requires_gradient_sync(not local)
        yield
    else:
        with accelerator.no_sync(prepared) if local else contextlib.nullcontext():
            yield


def clip_gradients(model: nn.Module, max_norm: float) -> float:
    """Clip to a norm, in place; the norm before, over the gradients of all processes."""
    norm = nn.utils.clip_grad_norm_(model.parameters(), max_norm)
    return float(norm.full_tensor() if isinstance(norm, DTensor) else norm)


def full_weights(model: nn.Module) -> dict[str, torch.Tensor]:
    """The whole state dict on the main process; every process must call it."""
    return get_model_state_dict(model, options=_FULL)


def full_optimizer_state(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict:
    """The whole state of the optimiser by parameter name, on the main process; every process must call it."""
    return get_optimizer_state_dict(model, optimizer, options=_FULL)


def load_optimizer_state(model: nn.Module, optimizer: torch.optim.Optimizer, state: dict):
    """The reverse of `full_optimizer_state`, whatever the number of processes was."""
    set_optimizer_state_dict(model, optimizer, state, options=StateDictOptions(full_state_dict=True))


def made_by_main(accelerator: Accelerator, make: Callable[[], T]) -> T:
    """What `make` returns in the main process, for all; it must be picklable. The others do not do the work."""
    made = [make() if accelerator.is_main_process else None]
    return broadcast_object_list(made)[0]


def total(accelerator: Accelerator, values: torch.Tensor) -> torch.Tensor:
    """The sum over processes."""
    if accelerator.num_processes == 1:
        return values
    return accelerator.reduce(values.to(accelerator.device), reduction="sum").cpu()


def gathered(accelerator: Accelerator, members: list) -> list:
    """The members of all processes' lists."""
    return gather_object(members) if accelerator.num_processes > 1 else members
