"""What the two processes of test_sharded.py do: each trains a share of a batch and tells the error.

A case returns the largest relative error of a parameter's gradient, by norm, or raises.
"""

import copy
import datetime
import json
import traceback
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
import torch.distributed as dist
from models import BATCH, DEEP, MODELS, Example
from oracle import Oracle, constant, expected_step, gradients
from sharded_trainers import (
    lightning_trainer,
    timm_task,
    transformers_trainer,
    tuned_by_the_command,
    two_steps,
)
from sharding import (
    ALPHA,
    BFLOAT16,
    EVEN,
    WORLD,
    Gradients,
    Sizes,
    accelerate_fsdp,
    checkpoints,
    ddp,
    fsdp,
    gathered,
    largest_error,
    share,
    split,
    synchronized,
    wrap_blocks,
)
from torch import nn


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
        example = DEEP[self.model]()  # one block is gathered while the other is at work
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
    tuner = constant(example.model, ALPHA, exclude=["spare"])
    tuner.combine(example.task_loss(model, share(EVEN))).backward()
    return largest_error(gathered(model, 1.0), expected)


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
for _name in ("bert", "opt"):  # post-LN, and pre-LN whose samples are not its rows
    CASES |= {
        f"{_name}-fsdp-checkpoints-attached-first": Case(
            _name, fsdp, checkpoints, attach_first=True
        ),
        f"{_name}-ddp-uneven": Case(_name, ddp, sizes=(BATCH - 1, 1)),
        f"{_name}-bfloat16": Case(_name, partial(fsdp, precision=BFLOAT16), dtype=torch.bfloat16),
        f"{_name}-trainer": partial(two_steps, _name, transformers_trainer),
    }
# the rest is about wrappers, to which one architecture is as good as another
CASES |= {
    "bert-ddp-checkpoints": Case("bert", ddp, checkpoints),
    "bert-fsdp-of-wrappers": Case("bert", OF_WRAPPERS, wrap_blocks),
    "bert-fsdp-in-wrappers": Case("bert", fsdp, wrap_blocks),
    "bert-fsdp-uneven": Case("bert", fsdp, sizes=(BATCH - 1, 1)),
    "bert-trainer-of-lightning": partial(two_steps, "bert", lightning_trainer),
    "bert-accelerate": Case("bert", accelerate_fsdp),
    "bert-accelerate-checkpoints": Case(
        "bert", partial(accelerate_fsdp, activation_checkpointing=True)
    ),
    "bert-accelerate-attached-first": Case(
        "bert", partial(accelerate_fsdp, cpu_ram_efficient_loading=True), attach_first=True
    ),
}
for _way, _shard in {"ddp": ddp, "fsdp": fsdp}.items():
    CASES |= {
        f"bert-{_way}-attached-first": Case("bert", _shard, attach_first=True),
        f"bert-{_way}-micro-batches": Case("bert", _shard, micro_batches=2),
        f"bert-{_way}-scale": Case("bert", _shard, scale=65536.0),
        f"bert-{_way}-balance": Case("bert", _shard, balance="initial"),
    }
for _option in ("static_graph", "find_unused_parameters"):
    _shard = partial(ddp, **{_option: True})
    CASES |= {
        f"bert-{_option}": Case("bert", _shard),
        f"bert-{_option}-attached-to-ddp": Case("bert", _shard, attach_to_wrapper=True),
    }
CASES |= {
    "unused-module-ddp": partial(unused_module, partial(ddp, find_unused_parameters=True)),
    "unused-module-fsdp": partial(unused_module, fsdp),
    "trainer-of-tune": tuned_by_the_command,
    "task-of-timm": timm_task,
    "logits-behind-a-cast": logits_behind_a_cast,
}

# ------------------------------------------------------------------------------------ the processes


def run_cases(rank: int, folder: Path, cases: Sequence[str]) -> None:
    """Run each case in a process group of its own, and keep errors and tracebacks in a file."""
    torch.set_num_threads(1)
    torch.use_deterministic_algorithms(True, warn_only=True)  # memory is poisoned, as in conftest
    warnings.simplefilter("error")
    # a tap hands on a view, of which PyTorch refuses a change in place
    warnings.filterwarnings("ignore", "FSDP2-wrapped module .* returned a view tensor")
    # Lightning 2.6: of torch, and of its user
    warnings.filterwarnings("ignore", r"`isinstance\(treespec, LeafSpec\)` is deprecated")
    warnings.filterwarnings("ignore", "The 'train_dataloader' does not have many workers")
    outcomes: dict[str, float | str] = {}
    for name in cases:
        store = dist.FileStore(str(folder / name), WORLD)
        limit = datetime.timedelta(seconds=30)  # where the other process has failed
        dist.init_process_group("gloo", store=store, rank=rank, world_size=WORLD, timeout=limit)
        try:
            outcomes[name] = CASES[name]()
        except Exception:  # whatever it is, the parent shows it, and the next case runs
            outcomes[name] = traceback.format_exc()
        dist.destroy_process_group()
        (folder / f"rank{rank}.json").write_text(json.dumps(outcomes))
