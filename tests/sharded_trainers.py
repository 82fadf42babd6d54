"""The trainers of other libraries in two processes, against one plain loop in one."""

import copy
from collections.abc import Callable
from tempfile import TemporaryDirectory

import test_lightning_callback
import test_trainer
import torch
from lightning.pytorch import LightningModule
from lightning.pytorch.strategies import DDPStrategy
from models import BATCH, MODELS
from oracle import Oracle, expected_step, gradients
from sharding import ALPHA, EVEN, WORLD, gathered, join_environment, largest_error, share
from torch import Tensor, nn
from torch.utils.data import DataLoader, DistributedSampler

from quanttune.trainer import QuantTuneCallback, QuantTuneTask

Rows = list[dict[str, Tensor]]


def timm_task() -> float:
    """A task of timm, prepared by itself."""
    torch.manual_seed(0)
    example = MODELS["vit"]()
    expected = expected_step(example, ALPHA)[1]
    example.model.zero_grad()
    tuning = {"alpha": ALPHA, "decay": "constant"}
    task = QuantTuneTask(example.model, nn.CrossEntropyLoss(), tuning=tuning).prepare_distributed()
    rows = share(EVEN)
    with task.no_sync():
        (task(example.inputs[rows], example.labels[rows])["loss"] / 2).backward()
    (task(example.inputs[rows], example.labels[rows])["loss"] / 2).backward()
    return largest_error(gathered(example.model, 1.0), expected)


def two_steps(name: str, train: Callable[[nn.Module, Rows], None]) -> float:
    """Two steps of a trainer against two of a plain loop in one process, by what they moved."""
    torch.manual_seed(0)
    example = MODELS[name]()
    data = test_trainer.rows(2 * BATCH, name)
    start = test_trainer.parameters(example.model)
    twin = copy.deepcopy(example.model)
    for step in range(2):
        batch = test_trainer.batch_of(data[step * BATCH : (step + 1) * BATCH])
        with Oracle(twin, example.heads) as oracle:
            loss = oracle.combine(twin(**batch).loss, ALPHA * (1 - step / 2))
        expected = gradients(twin, loss)
        with torch.no_grad():
            for key, parameter in twin.named_parameters():
                parameter -= 0.1 * expected[key]
    join_environment()
    train(example.model, data)
    moved, expected = (
        {key: start[key] - p for key, p in test_trainer.parameters(model).items()}
        for model in (example.model, twin)
    )
    return largest_error(moved, expected)


def transformers_trainer(model: nn.Module, data: Rows) -> None:
    with TemporaryDirectory() as folder:
        run = test_trainer.trainer(
            folder,
            model,
            data,
            max_steps=2,
            per_device_train_batch_size=1,
            gradient_accumulation_steps=BATCH // WORLD,
            train_sampling_strategy="sequential",
            ddp_find_unused_parameters=False,
        )
        assert run.args.world_size == WORLD
        run.train()


def lightning_trainer(model: nn.Module, data: Rows) -> None:
    class Module(LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.model = model

        def training_step(self, batch, batch_idx: int):
            return self.model(**batch).loss

        def configure_optimizers(self):
            return torch.optim.SGD(self.parameters(), 0.1)

    with TemporaryDirectory() as folder:
        run = test_lightning_callback.make_trainer(
            folder,
            QuantTuneCallback({"alpha": ALPHA}),
            max_steps=2,
            strategy=DDPStrategy(process_group_backend="gloo"),
            devices=WORLD,
            use_distributed_sampler=False,  # which shuffles
        )
        sampler = DistributedSampler(data, shuffle=False)
        run.fit(Module(), DataLoader(data, BATCH // WORLD, sampler=sampler))
        assert run.world_size == WORLD
