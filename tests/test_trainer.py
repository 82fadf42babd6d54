"""The Trainer of transformers: its steps are those of a plain loop, resumed or compiled as well."""

import copy
import subprocess
import sys

import pytest
import torch
from models import BATCH, MODELS, TOKENS, WORDS
from oracle import assert_near, assert_same_bits, constant, quiet
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch import Tensor
from transformers import TrainerCallback, TrainingArguments

import quanttune.trainer
from quanttune.trainer import QuantTuneTrainer
from quanttune.tuning.hooks import is_attached

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


def trainer(folder, model, data, tuning=TUNING, measured=None, **arguments) -> QuantTuneTrainer:
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
    return QuantTuneTrainer(
        model=model, args=options, train_dataset=data, eval_dataset=measured, tuning=tuning
    )


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


class Interrupt(TrainerCallback):
    """Ends a training at its first checkpoint."""

    def on_save(self, *_, **__) -> None:
        raise KeyboardInterrupt


@pytest.mark.parametrize("balance", ["none", "initial"])
def test_a_resumed_training_is_the_same(balance, tmp_path):
    data = rows(16, "bert")
    start = MODELS["bert"]().model
    settings = {
        "tuning": {**TUNING, "balance": balance},
        "max_steps": 6,
        "per_device_train_batch_size": 4,
        "save_strategy": "steps",
        "save_steps": 3,
        "optim": "adamw_torch",
        "learning_rate": 1e-3,
    }
    whole = trainer(tmp_path / "whole", copy.deepcopy(start), data, **settings)
    whole.train()
    first = trainer(tmp_path / "parts", copy.deepcopy(start), data, **settings)
    first.add_callback(Interrupt)
    with pytest.raises(KeyboardInterrupt):
        first.train()
    second = trainer(tmp_path / "parts", MODELS["bert"]().model, data, **settings)
    second.train(resume_from_checkpoint=True)
    assert_same_bits(parameters(second.model), parameters(whole.model))
    assert [log["alpha"] for log in second.state.log_history if "alpha" in log] == [
        pytest.approx(0.3 * (1 - step / 6)) for step in (1, 2, 3, 4, 5, 6)
    ]
    assert not any(m._forward_hooks for m in second.model.modules())  # detached


def test_after_an_interruption_a_new_training_finds_its_own_balance(tmp_path):
    run = trainer(
        tmp_path,
        MODELS["bert"]().model,
        rows(16, "bert"),
        tuning={**TUNING, "balance": "initial"},
        max_steps=2,
        per_device_train_batch_size=4,
        save_strategy="steps",
        save_steps=1,
    )
    tuners = []

    class Keep(TrainerCallback):
        def on_step_end(self, *arguments, **_):
            tuners.append(run.tuner)

    run.add_callback(Keep)
    run.add_callback(Interrupt)
    for _ in range(2):
        with pytest.raises(KeyboardInterrupt):
            run.train()
        assert run.tuner is None
        assert not is_attached(run.model)
        assert tuners[-1].balance_factor == tuners[-1].task_loss / tuners[-1].outlier_loss
    assert len({id(tuner) for tuner in tuners}) == 2


@pytest.mark.parametrize(
    ("name", "balance", "backend"), [("bert", "none", "eager"), ("opt", "initial", "eager")]
)
def test_a_compiled_model(name, balance, backend, tmp_path):
    ends = []
    start = MODELS[name]().model
    data = rows(8, name)
    for compiled in (False, True):
        model = copy.deepcopy(start)
        trainer(
            tmp_path,
            model,
            data,
            tuning={**TUNING, "balance": balance},
            max_steps=2,
            per_device_train_batch_size=2,
            gradient_accumulation_steps=2,
            torch_compile=compiled,
            torch_compile_backend=backend if compiled else None,
        ).train()
        ends.append(parameters(model))
    assert_near(ends[1], ends[0], 1e-5)


def test_tensorboard_is_told_the_terms_and_the_ranges(tmp_path):
    model = MODELS["bert"]().model
    data = rows(2 * BATCH, "bert")
    settings = {"max_steps": 2, "per_device_train_batch_size": BATCH, "report_to": "tensorboard"}
    run = trainer(tmp_path, model, data, **settings)
    seen: list[float] = []
    model.bert.encoder.layer[0].output.dense.register_forward_pre_hook(
        lambda _, args: seen.append(args[0].abs().max().item())
    )
    run.train()
    (file,) = tmp_path.rglob("events.out.tfevents.*")
    events = EventAccumulator(str(file)).Reload()

    def series(tag: str) -> list[float]:
        return [event.value for event in events.Scalars(f"train/{tag}")]

    assert series("alpha") == pytest.approx([0.15, 0.0])
    for step, loss in enumerate(series("loss")):
        alpha = 0.3 * (1 - step / 2)
        terms = series("loss_task")[step], series("loss_out")[step]
        assert loss == pytest.approx((1 - alpha) * terms[0] + alpha * terms[1], rel=1e-5)
    assert series("range/bert.encoder.layer.0.output.dense.input") == pytest.approx(seen)


def test_evaluation_is_not_tuned(tmp_path):
    data = rows(8, "bert")
    run = trainer(tmp_path, MODELS["bert"]().model, data)
    run.eval_dataset = data
    run.train()
    loss = run.evaluate()["eval_loss"]
    assert loss == pytest.approx(run.model(**batch_of(data)).loss.item(), rel=1e-5)


def test_no_library_is_imported_before_its_trainer_is_asked_for(tmp_path):
    libraries = "{'transformers', 'lightning', 'timm'}"
    code = f"import sys, quanttune.trainer; assert not {libraries} & {{*sys.modules}}"
    subprocess.run([sys.executable, "-c", code], cwd=tmp_path, check=True)


def test_a_missing_library_is_named_with_its_extra(monkeypatch):
    monkeypatch.delitem(sys.modules, "quanttune.trainer.lightning_callback", raising=False)
    monkeypatch.setitem(sys.modules, "lightning.pytorch", None)
    with pytest.raises(ModuleNotFoundError, match=r'pip install "quanttune\[lightning\]"'):
        quanttune.trainer.QuantTuneCallback  # noqa: B018
    with pytest.raises(AttributeError, match="has no attribute 'Trainer'"):
        quanttune.trainer.Trainer  # noqa: B018
