"""Modules that observe themselves: the gradient is that of taps, and the model stays what it is."""

import copy
import pickle

import pytest
import torch
from models import BATCH, DEEP, MODELS, Example
from oracle import assert_near, constant, each_model, expected_step, gradients, quiet
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import quanttune as qt
from quanttune import ops, reference
from quanttune.tuning import decomposed


def fused_modules(model: nn.Module) -> list[str]:
    return [name for name, module in model.named_modules() if "_observe_forward" in vars(module)]


def steps(example: Example, tuner: qt.Tuner, count: int = 2) -> list[dict[str, Tensor]]:
    """Return the gradients of some steps: from the second on activations are fused as well."""
    return [gradients(example.model, tuner.combine(example.task_loss())) for _ in range(count)]


@quiet
@each_model
@pytest.mark.parametrize("detach_deviation", [False, True])
def test_gradient(name, detach_deviation):
    example = MODELS[name]()
    options = {"detach_deviation": detach_deviation}
    loss, expected = expected_step(example, 0.3, **options)
    tuner = constant(example.model, fuse=True, **options)
    for actual in steps(example, tuner, 3):
        assert_near(actual, expected)
    torch.testing.assert_close(tuner.combine(example.task_loss()).double(), loss, rtol=1e-6, atol=0)


@quiet
@each_model
def test_norms_are_fused_at_once_and_activations_once_they_are_known(name):
    example = DEEP[name]()
    tuner = constant(example.model, fuse=True)
    observers = tuner._observers
    norms = {n for n, m in example.model.named_modules() if isinstance(m, nn.LayerNorm)}
    activations = {n for n, m in example.model.named_modules() if isinstance(m, (nn.ReLU, nn.GELU))}
    assert norms | activations <= set(fused_modules(example.model))
    steps(example, tuner, 1)
    assert len(observers._activations.fused) == len(observers._activations.deferred) > 1
    assert activations <= observers._activations.fused


@quiet
@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpoints(reentrant):
    example = MODELS["bert"]()
    _, expected = expected_step(example, 0.3)
    example.model.activation_checkpointing_enable({"use_reentrant": reentrant})
    for actual in steps(example, constant(example.model, fuse=True)):
        assert_near(actual, expected)


class Region(nn.Module):
    """An activation on the other side of a checkpoint's border than one of its neighbours."""

    reentrant: bool | None = None  # no checkpoint

    def __init__(self, first_inside: bool) -> None:
        super().__init__()
        self.first, self.norm, self.last = nn.Linear(6, 8), nn.LayerNorm(8), nn.Linear(8, 8)
        self.activation, self.head = nn.GELU(), nn.Linear(8, 3)
        self.first_inside = first_inside

    def forward(self, x: Tensor) -> Tensor:
        def region(x: Tensor) -> Tensor:
            if self.first_inside:
                return self.first(x)
            return self.last(self.activation(x))

        x = x if self.first_inside else self.first(x)
        if self.reentrant is None:
            x = region(x)
        else:
            x = checkpoint(region, x, use_reentrant=self.reentrant)
        x = self.last(self.activation(x)) if self.first_inside else x
        return self.head(self.norm(x))


@quiet
@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("first_inside", [False, True])
def test_a_checkpoint_s_border(first_inside, reentrant):
    x = torch.randn(BATCH, 5, 6, requires_grad=True)
    example = Example(Region(first_inside), x, torch.randint(3, (BATCH, 5)), ("head",))
    _, expected = expected_step(example, 0.3)
    example.model.reentrant = reentrant
    for actual in steps(example, constant(example.model, fuse=True), 3):
        assert_near(actual, expected)


class Branching(nn.Module):
    """Tensors with two readers, around an activation that is called twice."""

    def __init__(self, activation_first: bool) -> None:
        super().__init__()
        self.first, self.side, self.last = nn.Linear(6, 8), nn.Linear(8, 8), nn.Linear(8, 8)
        self.norm, self.other_norm = nn.LayerNorm(8), nn.LayerNorm(8, elementwise_affine=False)
        self.activation, self.head = nn.GELU(approximate="tanh"), nn.Linear(8, 3)
        self.activation_first = activation_first
        self.skips = False

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        if self.activation_first:
            y = self.last(self.activation(x))
            y = y + self.side(x)
        else:
            y = self.side(x)
            y = y + self.last(x.tanh() if self.skips else self.activation(x))
        y = self.norm(y) + self.other_norm(y)
        return self.head(self.activation(y) + y)


def branching(activation_first: bool) -> Example:
    labels = torch.randint(3, (BATCH, 5))
    return Example(Branching(activation_first), torch.randn(BATCH, 5, 6), labels, ("head",))


@quiet
@pytest.mark.parametrize("activation_first", [False, True])
def test_tensors_with_two_readers(activation_first):
    example = branching(activation_first)
    _, expected = expected_step(example, 0.3)
    for actual in steps(example, constant(example.model, fuse=True), 3):
        assert_near(actual, expected)


@quiet
def test_several_forwards_of_one_loss():
    example = MODELS["vit"]()
    _, expected = expected_step(example, 0.3)
    tuner = constant(example.model, fuse=True)
    half = BATCH // 2
    for _ in range(2):
        halves = [example.task_loss(rows=rows) for rows in (slice(half), slice(half, BATCH))]
        assert_near(gradients(example.model, tuner.combine(sum(halves) / 2)), expected)


@quiet
def test_autocast():
    """LayerNorm of float32 and activations of bfloat16 are fused; the error is that of taps."""
    example = MODELS["bert"]()
    _, exact = expected_step(example, 0.3)
    errors = {}
    for fuse in (False, True):
        tuner = constant(example.model, fuse=fuse)
        for _ in range(2):
            with torch.autocast("cpu", torch.bfloat16):
                loss = example.task_loss()
            actual = gradients(example.model, tuner.combine(loss))
        tuner.detach()
        flat = [torch.cat([g.flatten() for g in each.values()]) for each in (actual, exact)]
        errors[fuse] = (flat[0] - flat[1]).norm() / flat[1].norm()
    assert errors[True] <= 1.2 * errors[False] < 0.5


@quiet
def test_the_model_stays_what_it_is():
    example = MODELS["bert"]()
    before = {name: type(module) for name, module in example.model.named_modules()}
    expected = example.model.eval()(example.inputs).logits
    example.model.train()
    tuner = constant(example.model, fuse=True)
    steps(example, tuner)
    for other in (copy.deepcopy(example.model), pickle.loads(pickle.dumps(example.model))):
        assert {name: type(module) for name, module in other.named_modules()} == before
        assert not fused_modules(other)
        assert torch.equal(other.eval()(example.inputs).logits, expected)
    assert torch.equal(example.model.eval()(example.inputs).logits, expected)
    tuner.detach()
    assert {name: type(module) for name, module in example.model.named_modules()} == before
    assert not fused_modules(example.model)


@quiet
def test_a_forward_without_a_fused_activation_is_refused():
    example = branching(activation_first=False)
    tuner = constant(example.model, fuse=True, exclude=["side"])
    steps(example, tuner)
    example.model.skips = True
    with pytest.raises(RuntimeError, match=r"first.output did not reach.*fuse=False"):
        example.task_loss()
    example.model.skips = False
    tuner.combine(example.task_loss()).backward()


@quiet
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")
def test_compiled():
    torch.compiler.reset()
    example = branching(activation_first=True)
    _, expected = expected_step(example, 0.3)
    tuner = constant(example.model, fuse=True)
    steps(example, tuner, 1)
    model = torch.compile(example.model, backend="aot_eager", fullgraph=True)
    total = tuner.combine(example.task_loss(model))
    assert_near(gradients(example.model, total), expected)
    torch.compiler.reset()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize(
    ("size", "exact"), [(1, False), (1000, False), (70_001, False), (70_001, True)]
)
def test_decomposed_statistics(size, exact, dtype):
    x = (torch.randn(6, size) * 3 + 1).to(dtype)
    x[1] = -1.7
    x[2, 0] = torch.nan
    x[3, size // 2] = torch.inf
    x[4] = torch.inf
    actual = decomposed.outlier_statistics(x, 6, exact)
    expected = reference.outlier_statistics(x, 6, exact)
    assert actual.dtype == expected.dtype
    torch.testing.assert_close(actual, expected, rtol=2e-6, atol=2e-7, equal_nan=True)
    grad, share = torch.randn(6, size).to(dtype), torch.full((6,), size**0.5)
    arguments = (share, exact, False)
    ours = decomposed.outlier_statistics_backward(grad, x, expected, *arguments)
    theirs = ops.outlier_statistics_backward(grad, x, expected, *arguments)
    assert torch.equal(ours.isnan(), theirs.isnan())
    error = (ours - theirs).nan_to_num().double().norm()
    assert error <= 4 * torch.finfo(dtype).eps * theirs.nan_to_num().double().norm()
