"""Ways to train in two processes, and what is compared with one."""

import os
from collections.abc import Sequence
from contextlib import nullcontext

import timm.layers.config
import torch
import torch.distributed as dist
from accelerate import Accelerator, FullyShardedDataParallelPlugin
from accelerate.state import AcceleratorState
from accelerate.utils import DistributedType
from models import BATCH
from torch import Tensor, nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import (
    apply_activation_checkpointing,
)
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

WORLD = 2
EVEN = (BATCH // WORLD,) * WORLD  # rows of each process
ALPHA = 0.3
BLOCKS = ("BertLayer", "OPTDecoderLayer", "Block", "SwinTransformerBlock")
BFLOAT16 = MixedPrecisionPolicy(torch.bfloat16, reduce_dtype=torch.float32)

Gradients = dict[str, Tensor]
Sizes = tuple[int, ...]


def join_environment() -> None:
    """Tell trainers of the process group in the way of torchrun, and no more of the last one."""
    os.environ |= {key: str(dist.get_rank()) for key in ("RANK", "LOCAL_RANK")}
    os.environ |= {"WORLD_SIZE": str(WORLD), "MASTER_ADDR": "localhost", "MASTER_PORT": "0"}
    AcceleratorState._reset_state(reset_partial_state=True)


def ddp(model: nn.Module, **options) -> nn.Module:
    return DistributedDataParallel(model, **options)


def fsdp(
    model: nn.Module,
    blocks: Sequence[str] = BLOCKS,
    precision: MixedPrecisionPolicy | None = None,
    output: torch.dtype | None = None,
) -> nn.Module:
    """Shard each block and the root; `output` is the dtype of the root's result."""
    mesh = init_device_mesh("cpu", (WORLD,))
    precision = precision or MixedPrecisionPolicy()
    for module in list(model.modules()):
        if type(module).__name__ in blocks:
            fully_shard(module, mesh=mesh, mp_policy=precision)
    root = MixedPrecisionPolicy(precision.param_dtype, precision.reduce_dtype, output)
    return fully_shard(model, mesh=mesh, mp_policy=root)


def accelerate_fsdp(model: nn.Module, **options) -> nn.Module:
    """Shard as accelerate does on GPUs. On a CPU it goes by DDP, so it is told that it is not."""
    join_environment()
    plugin = FullyShardedDataParallelPlugin(
        fsdp_version=2,
        auto_wrap_policy="transformer_based_wrap",
        transformer_cls_names_to_wrap=sorted(
            {type(m).__name__ for m in model.modules()} & set(BLOCKS)
        ),
        **options,
    )
    accelerator = Accelerator(cpu=True)
    accelerator.state.fsdp_plugin = plugin
    accelerator.state.distributed_type = DistributedType.FSDP
    sharded, _ = accelerator.prepare(model, torch.optim.SGD(model.parameters(), 0.1))
    assert isinstance(sharded, FSDPModule)
    return sharded


def checkpoints(model: nn.Module, reentrant: bool = False) -> None:
    """Turn on those of the model's own library."""
    if hasattr(model, "set_grad_checkpointing"):
        timm.layers.config._USE_REENTRANT_CKPT = reentrant
        model.set_grad_checkpointing()
    else:
        model.config.use_cache = False
        model.activation_checkpointing_enable({"use_reentrant": reentrant})


def wrap_blocks(model: nn.Module) -> None:
    """Put a CheckpointWrapper around each block, as PyTorch's own recipes do."""
    apply_activation_checkpointing(model, check_fn=lambda part: type(part).__name__ in BLOCKS)


def share(sizes: Sizes, rank: int | None = None) -> slice:
    """Return the rows of a process, by default of this one."""
    rank = dist.get_rank() if rank is None else rank
    return slice(sum(sizes[:rank]), sum(sizes[: rank + 1]))


def split(rows: slice, parts: int) -> list[slice]:
    size = (rows.stop - rows.start) // parts
    return [slice(start, start + size) for start in range(rows.start, rows.stop, size)]


def synchronized(model: nn.Module, last: bool):
    """Reduce gradients over processes after the last micro-batch only."""
    if isinstance(model, FSDPModule):
        model.set_requires_gradient_sync(last)
        return nullcontext()
    return nullcontext() if last else model.no_sync()


def gathered(model: nn.Module, scale: float) -> Gradients:
    """Return whole gradients, under the names that the parameters had before any wrapper."""
    found = {}
    for name, parameter in model.named_parameters():
        gradient = parameter.grad
        if gradient is not None:
            whole = gradient.full_tensor() if isinstance(gradient, DTensor) else gradient
            name = name.removeprefix("module.").replace("_checkpoint_wrapped_module.", "")
            found[name] = whole / scale
    return found


def largest_error(actual: Gradients, expected: Gradients) -> float:
    assert actual.keys() == expected.keys(), actual.keys() ^ expected.keys()
    errors = [((actual[n] - e).norm() / e.norm()).item() for n, e in expected.items()]
    return float("nan") if any(e != e for e in errors) else max(errors)
