"""What the two processes of test_sharded.py do: each trains a share of a batch and tells the error.

A case returns the largest relative error of a parameter's gradient, by norm, or raises.
"""

import copy
import datetime
import json
import os
import traceback
import warnings
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory

import timm.layers.config
import torch
import torch.distributed as dist
from models import BATCH, MODELS, Example
from oracle import Oracle, constant, expected_step, gradients
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

# ---------------------------------------------------------------------------------- ways to train


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


@dataclass(frozen=True)
class Case:
    """Train one batch, and compare with one process, without checkpoints: eq. 3 by autograd."""

    model: str
    shard: Callable[[nn.Module], nn.Module]
    checkpoint: Callable[[nn.Module], None] = lambda model: None
    attach_first: bool = False
    attach_to_wrapper: bool = False
    micro_batches: int = 1
    scale: float = 1.0
    sizes: Sizes = EVEN
    dtype: torch.dtype = torch.float32
    balance: str = "none"

    def __call__(self) -> float:
        torch.manual_seed(0)
        example = MODELS[self.model]()
        expected = self.expected(example)
        self.checkpoint(example.model)
        if self.attach_first:
            tuner = constant(example.model, ALPHA, balance=self.balance)
        model = self.shard(example.model)
        if not self.attach_first:
            attached = model if self.attach_to_wrapper else example.model
            tuner = constant(attached, ALPHA, balance=self.balance)
        micro_batches = split(share(self.sizes), self.micro_batches)
        for rows in micro_batches:
            with synchronized(model, rows == micro_batches[-1]):
                loss = tuner.combine(example.task_loss(model, rows)) / self.micro_batches
                (self.scale * loss).backward()
        return largest_error(gathered(model, self.scale), expected)

    def expected(self, example: Example) -> Gradients:
        if self.balance != "none":
            tuner = constant(example.model, ALPHA, balance=self.balance)
            expected = gradients(example.model, tuner.combine(example.task_loss()))
            tuner.detach()
        elif self.dtype == torch.float32 and len(set(self.sizes)) == 1:
            expected = expected_step(example, ALPHA)[1]
        else:
            expected = mean_over_processes(example, self.sizes, self.dtype)
        example.model.zero_grad()
        return expected


def mean_over_processes(example: Example, sizes: Sizes, dtype: torch.dtype) -> Gradients:
    """Return the mean of the gradients of eq. 3 on each process's rows, as DDP defines it."""
    model = copy.deepcopy(example.model).to(dtype)
    mean: Gradients = {}
    for rank, size in enumerate(sizes):
        with Oracle(model, example.heads) as oracle:
            oracle.batch = size
            loss = oracle.combine(example.task_loss(model, share(sizes, rank)), ALPHA)
        for name, gradient in gradients(model, loss).items():
            mean[name] = mean.get(name, 0) + gradient.float() / WORLD
    return mean


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


def logits_behind_a_cast() -> float:
    """A BERT names no head: it is known by its output, also where FSDP casts that."""
    example = MODELS["bert"]()
    tuner = constant(fsdp(example.model, precision=BFLOAT16, output=torch.float32))
    tuner.combine(example.task_loss(rows=share(EVEN))).backward()
    assert "classifier.input" in tuner.ranges()
    assert "classifier.output" not in tuner.ranges()
    return 0.0


def unused_module(shard: Callable[[nn.Module], nn.Module]) -> float:
    """What no forward calls is not observed, and gets no gradient."""
    torch.manual_seed(0)
    example = MODELS["bert"]()
    expected = expected_step(example, ALPHA)[1]
    example.model.zero_grad()
    example.model.spare = nn.Linear(4, 4)
    model = shard(example.model)
    constant(example.model, ALPHA).combine(example.task_loss(model, share(EVEN))).backward()
    return largest_error(gathered(model, 1.0), expected)


def trainer(name: str) -> float:
    """Two steps of the Trainer against two of a plain loop in one process, by what they moved."""
    from test_trainer import batch_of, parameters, rows
    from test_trainer import trainer as make_trainer

    torch.manual_seed(0)
    example = MODELS[name]()
    data = rows(2 * BATCH, name)
    start = parameters(example.model)
    twin = copy.deepcopy(example.model)
    for step in range(2):
        batch = batch_of(data[step * BATCH : (step + 1) * BATCH])
        with Oracle(twin, example.heads) as oracle:
            loss = oracle.combine(twin(**batch).loss, ALPHA * (1 - step / 2))
        expected = gradients(twin, loss)
        with torch.no_grad():
            for key, parameter in twin.named_parameters():
                parameter -= 0.1 * expected[key]
    os.environ |= {key: str(dist.get_rank()) for key in ("RANK", "LOCAL_RANK")}
    os.environ |= {"WORLD_SIZE": str(WORLD), "MASTER_ADDR": "localhost", "MASTER_PORT": "0"}
    with TemporaryDirectory() as folder:
        run = make_trainer(
            folder,
            example.model,
            data,
            max_steps=2,
            per_device_train_batch_size=1,
            gradient_accumulation_steps=BATCH // WORLD,
            train_sampling_strategy="sequential",
            ddp_find_unused_parameters=False,
        )
        assert run.args.world_size == WORLD
        run.train()
    moved, expected = (
        {key: start[key] - p for key, p in parameters(model).items()}
        for model in (example.model, twin)
    )
    return largest_error(moved, expected)


# ---------------------------------------------------------------------------------------- all cases

OF_WRAPPERS = partial(fsdp, blocks=("CheckpointWrapper",))

CASES: dict[str, Callable[[], float]] = {}
for _name in MODELS:
    CASES |= {
        f"{_name}-ddp": Case(_name, ddp),
        f"{_name}-fsdp": Case(_name, fsdp),
        f"{_name}-fsdp-checkpoints": Case(_name, fsdp, checkpoints),
        f"{_name}-fsdp-reentrant": Case(_name, fsdp, partial(checkpoints, reentrant=True)),
    }
for _name in ("bert", "opt"):  # post-LN and pre-LN
    CASES |= {
        f"{_name}-ddp-checkpoints": Case(_name, ddp, checkpoints),
        f"{_name}-fsdp-of-wrappers": Case(_name, OF_WRAPPERS, wrap_blocks),
        f"{_name}-fsdp-in-wrappers": Case(_name, fsdp, wrap_blocks),
        f"{_name}-fsdp-checkpoints-attached-first": Case(
            _name, fsdp, checkpoints, attach_first=True
        ),
        f"{_name}-bfloat16": Case(_name, partial(fsdp, precision=BFLOAT16), dtype=torch.bfloat16),
        f"{_name}-trainer": partial(trainer, _name),
    }
    for _way, _shard in {"ddp": ddp, "fsdp": fsdp}.items():
        CASES |= {
            f"{_name}-{_way}-attached-first": Case(_name, _shard, attach_first=True),
            f"{_name}-{_way}-micro-batches": Case(_name, _shard, micro_batches=2),
            f"{_name}-{_way}-scale": Case(_name, _shard, scale=65536.0),
            f"{_name}-{_way}-uneven": Case(_name, _shard, sizes=(BATCH - 1, 1)),
            f"{_name}-{_way}-balance": Case(_name, _shard, balance="initial"),
        }
    for _option in ("static_graph", "find_unused_parameters"):
        _shard = partial(ddp, **{_option: True})
        CASES |= {
            f"{_name}-{_option}": Case(_name, _shard),
            f"{_name}-{_option}-attached-to-ddp": Case(_name, _shard, attach_to_wrapper=True),
        }
CASES |= {
    "unused-module-ddp": partial(unused_module, partial(ddp, find_unused_parameters=True)),
    "unused-module-fsdp": partial(unused_module, fsdp),
    "logits-behind-a-cast": logits_behind_a_cast,
}

# ------------------------------------------------------------------------------------ the processes


def run_cases(rank: int, folder: Path) -> None:
    """Run every case in a process group of its own, and keep errors and tracebacks in a file."""
    torch.set_num_threads(1)
    torch.use_deterministic_algorithms(True, warn_only=True)  # memory is poisoned, as in conftest
    warnings.simplefilter("error")
    # a tap hands on a view, of which PyTorch refuses a change in place
    warnings.filterwarnings("ignore", "FSDP2-wrapped module .* returned a view tensor")
    outcomes: dict[str, float | str] = {}
    for name, case in CASES.items():
        store = dist.FileStore(str(folder / name), WORLD)
        limit = datetime.timedelta(seconds=30)  # where the other process has failed
        dist.init_process_group("gloo", store=store, rank=rank, world_size=WORLD, timeout=limit)
        try:
            outcomes[name] = case()
        except Exception:  # whatever it is, the parent shows it, and the next case runs
            outcomes[name] = traceback.format_exc()
        dist.destroy_process_group()
        (folder / f"rank{rank}.json").write_text(json.dumps(outcomes))
