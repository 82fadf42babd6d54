"""The tasks of timm: their steps are those of a plain loop, also where a run is resumed."""

import copy

import pytest
import timm
import torch
import torch.nn.functional as F
from models import CLASSES, MODELS
from oracle import assert_near, assert_same_bits, gradients, quiet
from timm.task import FeatureDistillationTask, LogitDistillationTask, resume_task_checkpoint
from timm.utils import CheckpointSaver
from torch import Tensor, nn

import quanttune as qt
from quanttune.trainer import QuantTuneTask, QuantTuneTaskMixin
from quanttune.tuning.hooks import is_attached

STEPS = 4
TUNING = {"alpha": 0.3, "total_steps": STEPS}
Batches = list[tuple[Tensor, Tensor]]
pytestmark = [
    quiet,
    # Dynamo hides this warning from show, not from a filter that makes it an error
    pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf"),
]


def batches(count: int = STEPS) -> Batches:
    return [(torch.randn(2, 3, 16, 16), torch.arange(2) + i % 3) for i in range(count)]


def optimizer_of(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.AdamW(model.parameters(), lr=1e-3)


def begin(model: nn.Module, **tuning) -> tuple[QuantTuneTask, torch.optim.Optimizer]:
    task = QuantTuneTask(model, nn.CrossEntropyLoss(), tuning={**TUNING, **tuning})
    return task, optimizer_of(model)


def train(task: QuantTuneTask, optimizer: torch.optim.Optimizer, data: Batches) -> list[dict]:
    task.train()
    results = []
    for inputs, labels in data:
        results.append(task(inputs, labels))
        results[-1]["loss"].backward()
        optimizer.step()
        optimizer.zero_grad()
        task.update_ema()
        task.tuner.step()
    return results


def plain_loop(model: nn.Module, data: Batches) -> None:
    optimizer, tuner = optimizer_of(model), qt.attach(model, **TUNING)
    for inputs, labels in data:
        tuner.combine(F.cross_entropy(model(inputs), labels)).backward()
        optimizer.step()
        optimizer.zero_grad()
        tuner.step()
    tuner.detach()


@pytest.mark.parametrize("compiled", [False, True])
def test_the_weights_are_those_of_a_plain_loop(compiled):
    model = MODELS["vit"]().model
    twin = copy.deepcopy(model)
    data = batches()
    plain_loop(twin, data)
    task, optimizer = begin(model)
    if compiled:
        task.compile(backend="eager")
    results = train(task, optimizer, data)
    if compiled:
        assert_near(model.state_dict(), twin.state_dict(), 1e-5)
    else:
        assert_same_bits(model.state_dict(), twin.state_dict())
    for step, result in enumerate(results):
        alpha = 0.3 * (1 - step / STEPS)
        mixed = (1 - alpha) * result["loss_task"] + alpha * result["loss_out"]
        torch.testing.assert_close(result["loss"].detach(), mixed, rtol=1e-6, atol=0)
        assert result["output"].shape == (2, CLASSES)
    task.tuner.detach()
    assert not is_attached(model)


def test_the_average_of_the_weights_is_not_attached():
    task, optimizer = begin(MODELS["vit"]().model)
    average = copy.deepcopy(task.trainable_module.state_dict())
    task.setup_ema(decay=0.5)
    for batch in batches():
        train(task, optimizer, [batch])
        for name, value in task.trainable_module.state_dict().items():
            average[name].lerp_(value, 0.5)
    ema = task.get_eval_model(ema=True).module
    assert_same_bits(ema.state_dict(), average)
    assert is_attached(task.trainable_module)
    assert not is_attached(ema)
    ema.train()(batches(1)[0][0])


def test_evaluation_is_not_tuned():
    model = MODELS["vit"]().model
    inputs, labels = batches(1)[0]
    result = begin(model)[0].eval()(inputs, labels)
    assert torch.equal(result["loss"], F.cross_entropy(model(inputs), labels))
    assert result.keys() == {"loss", "output"}


@pytest.mark.parametrize("balance", ["none", "initial"])
def test_a_resumed_training_is_the_same(balance, tmp_path):
    start = MODELS["vit"]().model
    data = batches()
    whole, optimizer = begin(copy.deepcopy(start), balance=balance)
    train(whole, optimizer, data)
    first, optimizer = begin(copy.deepcopy(start), balance=balance)
    first.setup_ema()
    train(first, optimizer, data[:2])
    saver = CheckpointSaver(first.trainable_module, optimizer, task=first, checkpoint_dir=tmp_path)
    saver.save_checkpoint(epoch=0)
    second, optimizer = begin(MODELS["vit"]().model, balance=balance)
    assert resume_task_checkpoint(second, tmp_path / "last.pth.tar", optimizer) == 1
    train(second, optimizer, data[2:])
    assert_same_bits(second.trainable_module.state_dict(), whole.trainable_module.state_dict())
    assert second.tuner.alpha == 0


@pytest.mark.parametrize("base", [LogitDistillationTask, FeatureDistillationTask])
def test_other_tasks_can_be_mixed_with(base):
    shape = {"img_size": 16, "patch_size": 4, "depth": 1, "num_heads": 2, "num_classes": CLASSES}
    student, teacher = (
        timm.create_model("vit_tiny_patch16_224", embed_dim=width, **shape) for width in (24, 48)
    )

    class Mixed(QuantTuneTaskMixin, base):
        pass

    expected = base(copy.deepcopy(student), teacher, nn.CrossEntropyLoss())
    task = Mixed(student, teacher, nn.CrossEntropyLoss(), tuning=TUNING)
    if base is FeatureDistillationTask:  # which has a projection of its own
        task.load_task_state(expected.get_task_state())
    tuner = qt.attach(expected.trainable_module, **TUNING)
    batch = batches(1)[0]
    losses = task(*batch)["loss"], tuner.combine(expected(*batch)["loss"])
    of_task, of_expected = (
        gradients(t.trainable_module, loss)
        for t, loss in zip((task, expected), losses, strict=True)
    )
    assert_same_bits(of_task, of_expected)
    assert task.get_task_state().keys() == {*expected.get_task_state(), "tuner"}
    assert task.get_task_state(ema=True) == expected.get_task_state(ema=True)
