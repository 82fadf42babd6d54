"""The Trainer of transformers: its steps are those of a plain loop, resumed or compiled as well."""

import copy

import pytest
import torch
from models import BATCH, MODELS, TOKENS, WORDS
from oracle import assert_near, assert_same_bits, constant, quiet
from torch import Tensor
from transformers import TrainingArguments

from quanttune.trainer import QuantTuneTrainer

TUNING = {"alpha": 0.3, "decay": "linear"}
pytestmark = [
    quiet,
    # a CPU has no use for pinned memory
    pytest.mark.filterwarnings("ignore:'pin_memory' argument is set as true"),
]


def rows(count: int, name: str) -> list[dict[str, Tensor]]:
    """Return rows of words with labels; those of BERT have one of each, those of OPT many."""
    words = torch.randint(2, WORDS, (count, TOKENS))
    labels = words.clone() if name == "opt" else torch.arange(count) % 5
    if name == "opt":  # micro-batches differ in how many tokens they score
        labels[: BATCH // 2, : TOKENS // 2] = -100
    return [{"input_ids": w, "labels": label} for w, label in zip(words, labels, strict=True)]


def batch_of(data: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    return {key: torch.stack([row[key] for row in data]) for key in data[0]}


def trainer(folder, model, data, tuning=TUNING, **arguments) -> QuantTuneTrainer:
    settings = {
        "max_steps": 1,
        "learning_rate": 0.1,
        "optim": "sgd",
        "lr_scheduler_type": "constant",
        "max_grad_norm": 0.0,
        "report_to": "none",
        "logging_steps": 1,
        "save_strategy": "no",
        "disable_tqdm": True,
        "use_cpu": True,
        "dataloader_pin_memory": False,
        "remove_unused_columns": False,
        **arguments,
    }
    options = TrainingArguments(str(folder), **settings)
    return QuantTuneTrainer(model=model, args=options, train_dataset=data, tuning=tuning)


def parameters(model) -> dict[str, Tensor]:
    return {name: p.detach().clone() for name, p in model.named_parameters()}


@pytest.mark.parametrize("micro_batches", [1, 2, 4])
@pytest.mark.parametrize("name", ["bert", "opt"])
def test_a_step_is_that_of_a_plain_loop(name, micro_batches, tmp_path):
    example = MODELS[name]()
    data = rows(BATCH, name)
    before = parameters(example.model)
    run = trainer(
        tmp_path,
        example.model,
        data,
        per_device_train_batch_size=BATCH // micro_batches,
        gradient_accumulation_steps=micro_batches,
    )
    run.train()
    moved = {name: (before[name] - p) / 0.1 for name, p in parameters(example.model).items()}
    with torch.no_grad():
        for name_, p in example.model.named_parameters():
            p.copy_(before[name_])
            p.grad = None
    tuner = constant(example.model, 0.3)
    tuner.combine(example.model(**batch_of(data)).loss).backward()
    expected = {name: p.grad for name, p in example.model.named_parameters()}
    assert_near(moved, expected, 1e-4)  # a float32 parameter minus a small step
    assert {"alpha", "loss_task", "loss_out"} <= run.state.log_history[0].keys()


def test_a_resumed_training_is_the_same(tmp_path):
    torch.manual_seed(0)
    data = rows(16, "bert")
    start = MODELS["bert"]().model
    ends = []
    for interrupted in (False, True):
        model = copy.deepcopy(start)
        settings = {
            "max_steps": 6,
            "per_device_train_batch_size": 4,
            "save_strategy": "steps",
            "save_steps": 3,
            "optim": "adamw_torch",
            "learning_rate": 1e-3,
        }
        folder = tmp_path / str(interrupted)
        trainer(folder, model, data, **settings).train()
        if interrupted:
            run = trainer(folder, MODELS["bert"]().model, data, **settings)
            run.train(resume_from_checkpoint=str(folder / "checkpoint-3"))
            model = run.model
            assert [log["alpha"] for log in run.state.log_history if "alpha" in log] == [
                pytest.approx(0.3 * (1 - step / 6)) for step in (1, 2, 3, 4, 5, 6)
            ]
        ends.append(parameters(model))
        assert not any(m._forward_hooks for m in model.modules())  # detached
    assert_same_bits(*ends)


def test_a_compiled_model(tmp_path):
    ends = []
    start = MODELS["bert"]().model
    data = rows(8, "bert")
    for compiled in (False, True):
        model = copy.deepcopy(start)
        trainer(
            tmp_path,
            model,
            data,
            max_steps=2,
            torch_compile=compiled,
            torch_compile_backend="aot_eager" if compiled else None,
        ).train()
        ends.append(parameters(model))
    assert_near(ends[1], ends[0], 1e-5)


def test_a_service_is_told_the_ranges(tmp_path):
    run = trainer(tmp_path, MODELS["bert"]().model, rows(BATCH, "bert"))
    run.args.report_to = ["service"]
    seen: dict[str, float] = {}

    def see(module, args):
        seen["range"] = args[0].abs().max().item()

    handle = run.model.bert.encoder.layer[1].output.dense.register_forward_pre_hook(see)
    run.train()
    handle.remove()
    (log,) = [log for log in run.state.log_history if "loss" in log]
    assert log["range/bert.encoder.layer.1.output.dense.input"] == pytest.approx(seen["range"])
    assert log["loss"] == pytest.approx(0.7 * log["loss_task"] + 0.3 * log["loss_out"], rel=1e-5)


def test_evaluation_is_not_tuned(tmp_path):
    data = rows(8, "bert")
    run = trainer(tmp_path, MODELS["bert"]().model, data)
    run.eval_dataset = data
    run.train()
    loss = run.evaluate()["eval_loss"]
    assert loss == pytest.approx(run.model(**batch_of(data)).loss.item(), rel=1e-5)
