"""The gradient in every way to train: accumulation, checkpoints, autocast, failures."""

import copy
import gc
import weakref

import pytest
import torch
from models import BATCH, MODELS, Example, Shared
from oracle import (
    Oracle,
    assert_near,
    assert_same_bits,
    constant,
    each_model,
    expected_step,
    gradients,
    observing,
    quiet,
)
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from quanttune.tuning.mixing import instances
from quanttune.tuning.sites import find_sites

# ------------------------------------------------------------------------------------ ways to train


@quiet
@each_model
@pytest.mark.parametrize("parts", [1, 2, 4])
def test_accumulated_micro_batches_are_one_batch(name, parts):
    example = MODELS[name]()
    _, expected = expected_step(example, 0.3)
    tuner = constant(example.model)
    example.model.zero_grad()
    size = BATCH // parts
    for part in range(parts):
        rows = slice(part * size, (part + 1) * size)
        (tuner.combine(example.task_loss(rows=rows)) / parts).backward()
    actual = {name: p.grad for name, p in example.model.named_parameters()}
    assert_near(actual, expected)


@quiet
@each_model
def test_a_loss_scale_scales_the_gradient_exactly(name):
    example = MODELS[name]()
    tuner = constant(example.model)
    plain = gradients(example.model, tuner.combine(example.task_loss()))
    scaled = gradients(example.model, 65536 * tuner.combine(example.task_loss()))
    assert_same_bits({name: gradient / 65536 for name, gradient in scaled.items()}, plain)


def enable_checkpoints(model: nn.Module, reentrant: bool, monkeypatch) -> None:
    if hasattr(model, "set_grad_checkpointing"):
        monkeypatch.setattr("timm.layers.config._USE_REENTRANT_CKPT", reentrant)
        model.set_grad_checkpointing()
    else:
        model.activation_checkpointing_enable({"use_reentrant": reentrant})


@quiet
@each_model
@pytest.mark.parametrize("reentrant", [False, True])
def test_activation_checkpoints_change_nothing(name, reentrant, monkeypatch):
    example = MODELS[name]()
    loss, expected = expected_step(example, 0.3)
    recomputed = []
    linear = next(m for n, m in example.model.named_modules() if n.endswith(("fc1", "query")))
    linear.register_forward_pre_hook(
        lambda *_: recomputed.append(torch._C._current_graph_task_id() != -1)
    )
    enable_checkpoints(example.model, reentrant, monkeypatch)
    tuner = constant(example.model)
    for _ in range(2):
        recomputed.clear()
        total = tuner.combine(example.task_loss())
        torch.testing.assert_close(total.double(), loss, rtol=1e-6, atol=0)
        assert_near(gradients(example.model, total), expected)
    assert recomputed == [False, True]


class Checkpointed(nn.Module):
    """A region observes what was observed before it, norm -> a, and its output is too, d -> e."""

    def __init__(self, reentrant: bool | None) -> None:
        super().__init__()
        self.reentrant = reentrant
        self.norm = nn.LayerNorm(8)
        self.a, self.b, self.c, self.d, self.e = (nn.Linear(8, 8) for _ in range(5))
        self.head = nn.Linear(8, 3)

    def run(self, region, x: Tensor) -> Tensor:
        if self.reentrant is None:
            return region(x)
        return checkpoint(region, x, use_reentrant=self.reentrant)

    def forward(self, x: Tensor) -> Tensor:
        x = self.run(lambda y: self.a(y).tanh() + self.b(y), self.norm(x))
        x = self.run(lambda y: self.d(self.c(y).tanh()), x)
        return self.head(self.e(x).tanh())


@quiet
@pytest.mark.parametrize("reentrant", [False, True])
def test_tensors_that_cross_the_border_of_a_checkpoint(reentrant):
    model = Checkpointed(None)
    example = Example(model, torch.randn(BATCH, 8), torch.arange(BATCH) % 3, ("head",))
    loss, expected = expected_step(example, 0.3)
    model.reentrant = reentrant
    tuner = constant(model)
    for _ in range(2):
        total = tuner.combine(example.task_loss())
        torch.testing.assert_close(total.double(), loss, rtol=1e-6, atol=0)
        assert_near(gradients(model, total), expected)


@quiet
@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpoints_outside_training_are_left_alone(reentrant, monkeypatch):
    """A gradient of the input in evaluation mode recomputes as well, but what was not observed."""
    example = MODELS["vit"]()
    enable_checkpoints(example.model, reentrant, monkeypatch)
    example.model.eval()
    plain = gradients(example.model, example.task_loss())
    tuner = constant(example.model)
    assert_same_bits(gradients(example.model, example.task_loss()), plain)
    # also after a loss that was combined
    example.model.train()
    gradients(example.model, tuner.combine(example.task_loss()))
    example.model.eval()
    assert_same_bits(gradients(example.model, example.task_loss()), plain)


@quiet
def test_a_frozen_prefix_counts_but_gets_no_gradient():
    example = MODELS["vit"]()
    for frozen in (example.model.patch_embed, example.model.blocks[0]):
        frozen.requires_grad_(False)
    example.model.cls_token.requires_grad_(False)
    example.model.pos_embed.requires_grad_(False)
    loss, expected = expected_step(example, 0.3)
    total = constant(example.model).combine(example.task_loss())
    torch.testing.assert_close(total.double(), loss, rtol=1e-6, atol=0)
    assert_near(gradients(example.model, total), expected)


def test_a_change_in_place_of_an_observed_tensor_is_never_silent():
    model = nn.Sequential(nn.Linear(8, 8), nn.ReLU(inplace=True), nn.Linear(8, 3))
    constant(model)
    with pytest.raises(RuntimeError, match="is a view and is being modified inplace"):
        model(torch.randn(BATCH, 8))


@quiet
def test_a_frozen_tensor_that_is_changed_in_place_is_another_instance():
    model = nn.Sequential(nn.Linear(8, 8), nn.ReLU(inplace=True), nn.Linear(8, 8), nn.Linear(8, 3))
    model[0].requires_grad_(False)
    example = Example(model, torch.randn(BATCH, 8), torch.arange(BATCH) % 3, ("3",))
    loss, expected = expected_step(example, 0.3)
    total = constant(model).combine(example.task_loss())
    torch.testing.assert_close(total.double(), loss, rtol=1e-6, atol=0)
    assert_near(gradients(model, total), expected)


@quiet
def test_a_module_that_is_called_three_times_counts_three_times():
    example = Example(Shared(), torch.randn(BATCH, 6, 8), torch.arange(24) % 3, ("head",))
    loss, expected = expected_step(example, 0.3)
    with observing(example.model) as observers:
        example.task_loss()
        assert instances(observers.take()) == 3 * 2 + 2 + 1
    total = constant(example.model).combine(example.task_loss())
    torch.testing.assert_close(total.double(), loss, rtol=1e-6, atol=0)
    assert_near(gradients(example.model, total), expected)


@quiet
@pytest.mark.parametrize("reentrant", [None, False, True])
def test_two_forwards_of_other_sizes_before_one_combine(reentrant, monkeypatch):
    example, few = MODELS["vit"](), slice(1, 3)
    with Oracle(example.model, example.heads) as oracle:
        task = example.task_loss()
        oracle.batch = 2
        loss = oracle.combine(task + example.task_loss(rows=few), 0.3)
    expected = gradients(example.model, loss)
    if reentrant is not None:
        enable_checkpoints(example.model, reentrant, monkeypatch)
    tuner = constant(example.model)
    total = tuner.combine(example.task_loss() + example.task_loss(rows=few))
    torch.testing.assert_close(total.double(), loss.detach(), rtol=1e-6, atol=0)
    assert_near(gradients(example.model, total), expected)


@quiet
def test_two_combined_losses_in_one_backward():
    example = MODELS["bert"]()
    other = copy.copy(example)
    other.inputs = example.inputs.flip(1)
    with Oracle(example.model, example.heads) as oracle:
        losses = [oracle.combine(e.task_loss(), 0.3) for e in (example, other)]
    expected = gradients(example.model, 0.25 * losses[0] + losses[1])
    tuner = constant(example.model)
    losses = [tuner.combine(e.task_loss()) for e in (example, other)]
    assert_near(gradients(example.model, 0.25 * losses[0] + losses[1]), expected)


@quiet
def test_backward_of_a_loss_that_was_not_combined_is_plain():
    example = MODELS["vit"]()
    plain = gradients(example.model, example.task_loss())
    tuner = constant(example.model)
    combined = gradients(example.model, tuner.combine(example.task_loss()))
    assert not torch.equal(combined["blocks.0.attn.qkv.weight"], plain["blocks.0.attn.qkv.weight"])
    assert_same_bits(gradients(example.model, example.task_loss()), plain)
    # also where its forward came first
    task = example.task_loss()
    gradients(example.model, tuner.combine(example.task_loss()))
    assert_same_bits(gradients(example.model, task), plain)


@quiet
def test_backward_that_fails_halfway_leaves_no_weight_behind():
    class Fail(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x: Tensor) -> Tensor:
            return x.clone()

        @staticmethod
        def backward(ctx, grad: Tensor) -> Tensor:
            raise OSError("no more memory")

    example = MODELS["vit"]()
    plain = gradients(example.model, example.task_loss())
    tuner = constant(example.model)
    gradients(example.model, tuner.combine(example.task_loss()))
    handle = example.model.blocks[0].register_forward_hook(lambda *call: Fail.apply(call[2]))
    total = tuner.combine(example.task_loss())
    handle.remove()
    with pytest.raises(OSError, match="no more memory"):
        total.backward()
    assert_same_bits(gradients(example.model, example.task_loss()), plain)


@quiet
def test_a_combined_loss_that_is_thrown_away_changes_nothing():
    example = MODELS["vit"]()
    loss, expected = expected_step(example, 0.3)
    tuner = constant(example.model)
    tuner.combine(example.task_loss())  # and no backward, as after a loss that is not finite
    total = tuner.combine(example.task_loss())
    torch.testing.assert_close(total.double(), loss, rtol=1e-6, atol=0)
    assert_near(gradients(example.model, total), expected)


@quiet
@pytest.mark.parametrize("exception", [OSError, KeyboardInterrupt])
def test_an_exception_in_a_forward_leaves_nothing_behind(exception):
    example = MODELS["vit"]()
    loss, expected = expected_step(example, 0.3)
    tuner = constant(example.model)

    def fail(*_: object) -> None:
        raise exception("stop here")

    handle = example.model.blocks[0].mlp.register_forward_pre_hook(fail)
    with pytest.raises(exception, match="stop here"):
        example.task_loss()
    handle.remove()
    total = tuner.combine(example.task_loss())
    torch.testing.assert_close(total.double(), loss, rtol=1e-6, atol=0)
    assert_near(gradients(example.model, total), expected)


@each_model
def test_evaluation_and_no_grad_observe_nothing(name):
    example = MODELS[name]()
    logits = example.logits()
    with observing(example.model) as observers:
        with torch.no_grad():
            for _ in range(30):
                example.task_loss()
        example.model.eval()
        example.task_loss()
        assert observers.take() == []
        assert torch.equal(example.logits(), logits)
    tuner = constant(example.model)
    with torch.no_grad():
        loss = example.task_loss()
        assert tuner.combine(loss) is loss


def test_combine_in_evaluation_mode_is_refused():
    example = MODELS["vit"]()
    tuner = constant(example.model)
    example.model.eval()
    message = r"the attached model must be in training mode \(model.train\(\)\) and be called"
    with pytest.raises(RuntimeError, match=message):
        tuner.combine(example.task_loss())


@quiet
@each_model
def test_a_step_leaves_no_activation_in_memory(name):
    example = MODELS[name]()
    activations: list[weakref.ref] = []

    def remember(_, args, output) -> None:
        activations.extend(weakref.ref(x) for x in (*args[:1], output) if x is not example.inputs)

    def watch() -> None:
        for module in find_sites(example.model).values():
            module.register_forward_hook(remember)

    watch()
    tuner = constant(example.model)
    watch()  # before and after the tap
    gc.collect()
    gc.disable()
    try:
        for _ in range(2):
            gradients(example.model, tuner.combine(example.task_loss()))
            assert len(activations) > 25
            assert not [reference for reference in activations if reference() is not None]
    finally:
        gc.enable()
