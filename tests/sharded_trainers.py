"""The trainers of other libraries in two processes, against one plain loop in one."""

import copy
import shutil
from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory, mkdtemp

import cases
import datasets
import pytest
import test_lightning_callback
import test_trainer
import torch
import torch.distributed as dist
from lightning.pytorch import LightningModule
from lightning.pytorch.strategies import DDPStrategy
from models import BATCH, MODELS
from oracle import Oracle, constant, expected_step, gradients
from sharding import ALPHA, EVEN, WORLD, gathered, join_environment, largest_error, share
from torch import Tensor, nn
from torch.utils.data import DataLoader, DistributedSampler
from transformers import BertForSequenceClassification

from quanttune.jobs.run_folder import RunFolder
from quanttune.jobs.settings import Settings
from quanttune.jobs.tune import tune
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


def tuned_by_the_command() -> float:
    """A step of `quanttune tune`, each process with half of the rows, by what it moved."""
    torch.manual_seed(0)
    join_environment()
    shared = [mkdtemp() if dist.get_rank() == 0 else None]
    dist.broadcast_object_list(shared)
    folder = Path(shared[0])
    datasets.config.HF_DATASETS_CACHE = folder / "cache"
    (folder / str(dist.get_rank())).mkdir()
    data, rows, batch = cases.bert_case(folder / str(dist.get_rank()))
    dist.barrier()
    start = BertForSequenceClassification.from_pretrained(folder / "0" / "model").train()
    loss = constant(start, ALPHA).combine(start(**batch).loss)
    expected = gradients(start, loss)
    settings = Settings(
        str(folder / "0" / "model"), str(folder / "0" / data), tokens=16, steps=1,
        batch_size=rows // WORLD, learning_rate=0.1, tuning={"alpha": ALPHA},
        trainer={
            "optim": "sgd", "max_grad_norm": "0", "lr_scheduler_type": "constant",
            "ddp_find_unused_parameters": "false",
        },
    )  # fmt: skip
    said: list[str] = []
    outcome = tune(settings, folder / "run", say=said.append)
    assert any("1 steps of 6" in line for line in said) == (dist.get_rank() == 0)
    assert outcome["last"]["step"] == 1
    with pytest.raises(ValueError, match="processes was 2, is 1"):
        RunFolder(folder / "run").check({"processes": 1, "settings": settings.as_json()}, True)
    trained = BertForSequenceClassification.from_pretrained(folder / "run" / "model")
    before, after = (dict(model.named_parameters()) for model in (start, trained))
    moved = {name: (before[name] - after[name]).detach() / 0.1 for name in expected}
    dist.barrier()
    if dist.get_rank() == 0:
        shutil.rmtree(folder)
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
