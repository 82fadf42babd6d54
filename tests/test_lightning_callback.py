"""The callback of Lightning: its steps are those of a plain loop, also where a run is resumed."""

import copy
import csv
import pickle
from types import MethodType

import pytest
import torch
import torch.nn.functional as F
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.loggers import CSVLogger
from models import MODELS
from oracle import assert_near, assert_same_bits, quiet
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import quanttune as qt
from quanttune.trainer import QuantTuneCallback

STEPS = 4
TUNING = {"alpha": 0.3, "decay": "linear"}
pytestmark = [
    quiet,
    pytest.mark.filterwarnings("ignore:The 'train_dataloader' does not have many workers"),
    # what Lightning 2.6 asks of torch
    pytest.mark.filterwarnings(r"ignore:`isinstance\(treespec, LeafSpec\)` is deprecated"),
]


class Classifier(LightningModule):
    """Calls a model and returns the loss, in one of the ways that Lightning takes."""

    def __init__(self, model: nn.Module, returns: str = "tensor") -> None:
        super().__init__()
        self.model, self.returns = model, returns

    def training_step(self, batch, batch_idx: int):
        inputs, labels = batch
        loss = F.cross_entropy(self.model(inputs), labels)
        return {"loss": loss, "batch": batch_idx} if self.returns == "dict" else loss

    def configure_optimizers(self):
        return torch.optim.AdamW(self.parameters(), lr=1e-3)


def batches(count: int) -> list[tuple[Tensor, Tensor]]:
    return [(torch.randn(2, 3, 16, 16), torch.arange(2) + i % 3) for i in range(count)]


def loader(data: list[tuple[Tensor, Tensor]]) -> DataLoader:
    images, labels = (torch.cat(parts) for parts in zip(*data, strict=True))
    return DataLoader(TensorDataset(images, labels), batch_size=2)


def make_trainer(folder, *callbacks: Callback, **options) -> Trainer:
    settings = {
        "max_steps": STEPS,
        "max_epochs": -1,
        "accelerator": "cpu",
        "logger": False,
        "enable_checkpointing": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        **options,
    }
    return Trainer(default_root_dir=folder, callbacks=list(callbacks), **settings)


def plain_loop(model: nn.Module, data, parts=1, bfloat16=False, clip=None, tuning=TUNING):
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    tuner = qt.attach(model, total_steps=STEPS, **tuning)
    for i, (inputs, labels) in enumerate(data, start=1):
        with torch.autocast("cpu", torch.bfloat16, enabled=bfloat16):
            loss = F.cross_entropy(model(inputs), labels)
        (tuner.combine(loss) / parts).backward()
        if i % parts == 0:
            if clip:
                nn.utils.clip_grad_norm_(model.parameters(), clip)
            optimizer.step()
            optimizer.zero_grad()
            tuner.step()
    tuner.detach()


CASES = {
    "plain": ({}, {}),
    "accumulated": ({"accumulate_grad_batches": 2}, {"parts": 2}),
    "bfloat16": ({"precision": "bf16-mixed"}, {"bfloat16": True}),
    "clipped": ({"gradient_clip_val": 0.1}, {"clip": 0.1}),
    "balanced": ({}, {"tuning": {**TUNING, "balance": "initial"}}),
}


@pytest.mark.parametrize("returns", ["tensor", "dict"])
@pytest.mark.parametrize("case", CASES)
def test_the_weights_are_those_of_a_plain_loop(case, returns, tmp_path):
    options, plain = CASES[case]
    model = MODELS["vit"]().model
    twin = copy.deepcopy(model)
    data = batches(STEPS * plain.get("parts", 1))
    plain_loop(twin, data, **plain)
    callback = QuantTuneCallback(plain.get("tuning", TUNING))
    module = Classifier(model, returns)
    make_trainer(tmp_path, callback, **options).fit(module, loader(data))
    assert_same_bits(model.state_dict(), twin.state_dict())
    assert callback.tuner.alpha == 0
    assert "training_step" not in vars(module)
    assert not any(m._forward_hooks for m in model.modules())


# Dynamo hides this warning from show, not from a filter that makes it an error
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")
def test_a_compiled_model(tmp_path):
    model = MODELS["vit"]().model
    twin = copy.deepcopy(model)
    data = batches(2)
    tuning = {"alpha": 0.3, "decay": "constant"}
    plain_loop(twin, data, tuning=tuning)
    module = Classifier(torch.compile(model, backend="eager"))
    make_trainer(tmp_path, QuantTuneCallback(tuning), max_steps=2).fit(module, loader(data))
    assert_near(model.state_dict(), twin.state_dict(), 1e-5)


class Interrupt(Callback):
    """Saves a checkpoint after two steps, and raises an exception."""

    def on_train_batch_end(self, trainer, *_) -> None:
        if trainer.global_step == 2:
            trainer.save_checkpoint(f"{trainer.default_root_dir}/last.ckpt")
            raise OSError("no more memory")


@pytest.mark.parametrize("balance", ["none", "initial"])
def test_a_resumed_training_is_the_same(balance, tmp_path):
    tuning = {**TUNING, "balance": balance}
    start = MODELS["vit"]().model
    data = loader(batches(2))  # twice; Lightning goes on at the start of an epoch
    whole = Classifier(copy.deepcopy(start))
    make_trainer(tmp_path, QuantTuneCallback(tuning)).fit(whole, data)
    first = Classifier(copy.deepcopy(start))
    with pytest.raises(OSError, match="no more memory"):
        make_trainer(tmp_path, QuantTuneCallback(tuning), Interrupt()).fit(first, data)
    assert "training_step" not in vars(first)
    assert not any(m._forward_hooks for m in first.modules())
    second = Classifier(MODELS["vit"]().model)
    callback = QuantTuneCallback(tuning)
    make_trainer(tmp_path, callback).fit(second, data, ckpt_path=tmp_path / "last.ckpt")
    assert_same_bits(second.state_dict(), whole.state_dict())
    assert callback.tuner.alpha == 0


def test_a_second_fit_finds_a_balance_of_its_own(tmp_path):
    callback = QuantTuneCallback({**TUNING, "balance": "initial"})
    callback.load_state_dict({"balance_factor": torch.tensor(7.0)})  # as validate() may do
    module, data = Classifier(MODELS["vit"]().model), loader(batches(1))
    for _ in range(2):
        make_trainer(tmp_path, callback, max_steps=1).fit(module, data)
        tuner = callback.tuner
        assert tuner.balance_factor == tuner.task_loss / tuner.outlier_loss


def test_loggers_are_told_the_terms_and_the_ranges(tmp_path):
    module = Classifier(MODELS["vit"]().model)
    seen = []
    head = module.model.head
    head.register_forward_pre_hook(lambda _, args: seen.append(args[0].abs().max().item()))
    make_trainer(
        tmp_path,
        QuantTuneCallback(TUNING),
        logger=CSVLogger(tmp_path, name="", version="csv"),
        log_every_n_steps=2,
        accumulate_grad_batches=2,
    ).fit(module, loader(batches(2 * STEPS)))
    with (tmp_path / "csv" / "metrics.csv").open() as file:
        told = [{key: float(value) for key, value in row.items()} for row in csv.DictReader(file)]
    assert [row["step"] for row in told] == [1, 3]
    assert [row["alpha"] for row in told] == [pytest.approx(0.15), 0.0]
    assert [row["range/head.input"] for row in told] == pytest.approx([seen[3], seen[7]])
    assert {"loss_task", "loss_out"} <= told[0].keys()


def test_the_logged_terms_are_those_of_the_loss(tmp_path):
    losses = []

    class Watch(Callback):
        def on_train_batch_end(self, trainer, pl_module, outputs, *_) -> None:
            losses.append(outputs["loss"].item())

    callback = QuantTuneCallback(TUNING)
    module = Classifier(MODELS["vit"]().model)
    make_trainer(tmp_path, callback, Watch(), max_steps=1).fit(module, loader(batches(1)))
    task, outlier = callback.tuner.task_loss.item(), callback.tuner.outlier_loss.item()
    assert losses == [pytest.approx(0.7 * task + 0.3 * outlier, rel=1e-6)]


class Parts(LightningModule):
    """Is called itself; its layers are several children, or one that is never called."""

    def __init__(self, listed: bool) -> None:
        super().__init__()
        layers = [nn.Linear(8, 8), nn.LayerNorm(8), nn.Linear(8, 3)]
        if listed:
            self.layers = nn.ModuleList(layers)
        else:
            self.body, self.norm, self.head = layers

    def forward(self, x: Tensor) -> Tensor:
        body, norm, head = getattr(self, "layers", self.children())
        return head(norm(body(x).tanh()))

    def training_step(self, batch, batch_idx: int) -> Tensor:
        return F.cross_entropy(self(batch[0]), batch[1])

    def configure_optimizers(self):
        return torch.optim.AdamW(self.parameters(), lr=1e-3)


@pytest.mark.parametrize(("listed", "name"), [(False, None), (True, "")])
def test_a_module_that_is_its_own_model(listed, name, tmp_path):
    module = Parts(listed)
    twin = copy.deepcopy(module)
    data = [(torch.randn(2, 8), torch.arange(2)) for _ in range(STEPS)]
    plain_loop(twin, data)
    make_trainer(tmp_path, QuantTuneCallback(TUNING, model=name)).fit(module, loader(data))
    assert_same_bits(module.state_dict(), twin.state_dict())


class Skipping(Classifier):
    """Leaves out a batch after its forward, and validates between the others."""

    def training_step(self, batch, batch_idx: int) -> Tensor | None:
        loss = super().training_step(batch, batch_idx)
        return None if batch_idx == 1 else loss

    def validation_step(self, batch, batch_idx: int) -> None:
        super().training_step(batch, batch_idx)


@pytest.mark.filterwarnings("ignore:.training_step. returned .None.")
@pytest.mark.filterwarnings("ignore:The 'val_dataloader' does not have many workers")
def test_what_is_not_trained_on_is_not_observed(tmp_path):
    model = MODELS["vit"]().model
    twin = copy.deepcopy(model)
    data = batches(STEPS + 1)
    constant = {"alpha": 0.3, "decay": "constant"}  # as a step that is left out counts
    plain_loop(twin, data[:1] + data[2:], tuning=constant)
    trainer = make_trainer(
        tmp_path, QuantTuneCallback(constant), max_steps=STEPS + 1, val_check_interval=1
    )
    trainer.fit(Skipping(model), loader(data), loader(data[:1]))
    assert_same_bits(model.state_dict(), twin.state_dict())


def test_a_copy_of_the_module_is_not_attached(tmp_path):
    copies = []

    class Copy(Callback):
        def on_train_batch_end(self, trainer, pl_module, *_) -> None:
            pl_module.trainer = None
            copies.extend([copy.deepcopy(pl_module), pickle.loads(pickle.dumps(pl_module))])
            pl_module.trainer = trainer

    data = batches(1)
    module = Classifier(MODELS["vit"]().model)
    make_trainer(tmp_path, QuantTuneCallback(TUNING), Copy(), max_steps=1).fit(module, loader(data))
    expected = module.training_step(data[0], 0)
    for twin in copies:
        assert twin.training_step.__self__ is twin
        assert torch.equal(twin.training_step(data[0], 0), expected)


def test_a_module_keeps_a_training_step_of_its_own(tmp_path):
    """Such as Lightning gives to a module that is compiled."""
    module = Classifier(MODELS["vit"]().model)
    own = module.training_step = MethodType(Classifier.training_step, module)
    make_trainer(tmp_path, QuantTuneCallback(TUNING), max_steps=1).fit(module, loader(batches(1)))
    assert vars(module)["training_step"] is own


class Manual(Classifier):
    automatic_optimization = False


@pytest.mark.parametrize(
    ("module", "options", "message"),
    [
        (
            Manual,
            {"max_epochs": 1},
            "needs automatic optimization. In manual optimization, call quanttune.attach",
        ),
        (Classifier, {"max_steps": -1}, "decay='linear' needs total_steps, a positive number, got"),
    ],
)
def test_what_cannot_be_tuned_is_refused(module, options, message, tmp_path):
    module = module(MODELS["vit"]().model)
    with pytest.raises(ValueError, match=message):
        make_trainer(tmp_path, QuantTuneCallback(TUNING), **options).fit(module, loader(batches(1)))
    assert "training_step" not in vars(module)
