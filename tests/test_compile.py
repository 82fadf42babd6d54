"""Tuning a model under torch.compile: the gradient, one graph, and what it refuses."""

import shutil
from collections.abc import Iterator

import pytest
import torch
from models import BATCH, MODELS, Example, Shared
from oracle import assert_near, constant, expected_step, gradients, quiet
from torch import Tensor, nn
from torch._dynamo.utils import counters

import quanttune as qt

# Dynamo hides this warning from show, not from a filter that makes it an error
pytestmark = pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")


@pytest.fixture(autouse=True)
def fresh_compiler() -> Iterator[None]:
    torch.compiler.reset()
    counters.clear()
    yield
    torch.compiler.reset()


def compiled(model: nn.Module, backend: str = "aot_eager") -> nn.Module:
    return torch.compile(model, backend=backend, fullgraph=True)


def planned(example: Example, backend: str = "aot_eager") -> tuple[qt.Tuner, nn.Module]:
    """Attach a tuner, run the forward that plans, and return the compiled model with it."""
    tuner = constant(example.model)
    tuner.combine(example.task_loss())
    return tuner, compiled(example.model, backend)


@quiet
# a BERT follows below, and in test_trainer
@pytest.mark.parametrize(("name", "blocks"), [("vit", 2), ("opt", 1)])
def test_one_graph_has_the_gradient_of_every_alpha(name, blocks):
    example = MODELS[name](blocks)
    expected = [expected_step(example, alpha) for alpha in (0.4, 0.2)]
    tuner = qt.attach(example.model, 0.4, "linear", total_steps=2)
    tuner.combine(example.task_loss())  # the plan
    model = compiled(example.model)
    for loss, expected_gradients in expected:
        total = tuner.combine(example.task_loss(model))
        torch.testing.assert_close(total.double(), loss, rtol=1e-6, atol=0)
        assert_near(gradients(example.model, total), expected_gradients)
        tuner.step()
    assert counters["stats"]["unique_graphs"] == 1


@quiet
@pytest.mark.filterwarnings("ignore:`torch.jit.script_method` is deprecated")  # torch 2.11 does it
@pytest.mark.skipif(not shutil.which("g++"), reason="inductor needs a C++ compiler")
def test_inductor_compiles_it():
    example = MODELS["vit"]()
    _, expected = expected_step(example, 0.3)
    tuner, model = planned(example, "inductor")
    for _ in range(2):
        assert_near(gradients(example.model, tuner.combine(example.task_loss(model))), expected)


@quiet
def test_a_module_that_is_called_three_times():
    model = Shared()
    example = Example(model, torch.randn(BATCH, 5, 8), torch.randint(3, (BATCH, 5)), ("head",))
    _, expected = expected_step(example, 0.3)
    tuner, fast = planned(example)
    total = tuner.combine(example.task_loss(fast))
    assert_near(gradients(model, total), expected)


@quiet
def test_a_compiled_model_can_be_attached_and_accumulates():
    example = MODELS["bert"]()
    _, expected = expected_step(example, 0.3)
    model = compiled(example.model)
    tuner = constant(model)
    with torch.compiler.set_stance("force_eager"):
        tuner.combine(example.task_loss(model))
    example.model.zero_grad()
    half = BATCH // 2
    for rows in (slice(half), slice(half, BATCH)):
        (tuner.combine(example.task_loss(model, rows)) / 2).backward()
    assert counters["stats"]["unique_graphs"] == 1
    assert_near({name: p.grad for name, p in example.model.named_parameters()}, expected)
    tuner.detach()
    torch.testing.assert_close(model(example.inputs).logits, example.logits())


@quiet
def test_models_of_one_class_with_and_without_a_tuner():
    torch.manual_seed(0)
    teacher, example = MODELS["vit"](), MODELS["vit"]()
    alone = compiled(teacher.model)
    _, expected = expected_step(example, 0.3)
    model = compiled(example.model)
    torch.testing.assert_close(model(example.inputs), example.logits())
    tuner = constant(example.model)
    tuner.combine(example.task_loss())
    for _ in range(2):
        torch.testing.assert_close(alone(example.inputs), teacher.model(example.inputs))
        assert_near(gradients(example.model, tuner.combine(example.task_loss(model))), expected)
    assert not tuner._observers.take()


@quiet
def test_without_a_forward_before_it_says_what_to_do():
    example = MODELS["vit"]()
    _, expected = expected_step(example, 0.3)
    tuner = constant(example.model)
    model = compiled(example.model)
    with pytest.raises(RuntimeError, match="one forward in training mode without"):
        tuner.combine(example.task_loss(model))
    tuner.combine(example.task_loss())
    assert_near(gradients(example.model, tuner.combine(example.task_loss(model))), expected)


@quiet
def test_many_forwards_of_one_loss():
    example = MODELS["vit"]()
    tuner, model = planned(example)
    once = tuner.combine(example.task_loss(model)).detach()
    tasks = [example.task_loss(model) for _ in range(12)]  # more than Dynamo's limit of recompiling
    torch.testing.assert_close(tuner.combine(torch.stack(tasks).mean()), once)


class Skipping(nn.Module):
    """A model of two layers that can leave the second out."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.head = nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 3)
        self.skips = False

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x).relu()
        return self.head(x if self.skips else self.second(x).tanh())


@quiet
@pytest.mark.filterwarnings("ignore:the first forward did not call 1 observed module")
@pytest.mark.parametrize("skips_first", [False, True])
def test_another_forward_than_the_planned_is_refused(skips_first):
    model = Skipping()
    tuner = constant(model)
    x = torch.randn(BATCH, 8)
    model.skips = skips_first
    tuner.combine(model(x).sum())
    model.skips = not skips_first
    with pytest.raises(torch._dynamo.exc.Unsupported, match="skips or repeats layers"):
        compiled(model)(x)
    tuner.combine(model(x).sum())


@quiet
def test_evaluation_of_a_compiled_model_leaves_nothing_behind():
    example = MODELS["vit"]()
    tuner, model = planned(example)
    expected = example.model.eval()(example.inputs)
    torch.testing.assert_close(model(example.inputs), expected)
    example.model.blocks(torch.randn(BATCH, 17, 24))  # by itself, after a compiled forward
    example.model.train()
    tuner.combine(example.task_loss(model)).backward()


class Broken(nn.Module):
    """Blocks whose forward torch.compile cannot keep in one graph."""

    def __init__(self, blocks: int) -> None:
        super().__init__()
        self.blocks = nn.ModuleList([BrokenBlock() for _ in range(blocks)])
        self.head = nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = block(x)
        return self.head(x)


class BrokenBlock(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(8, 8), nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x).relu()
        torch._dynamo.graph_break()
        return self.second(x).tanh()


@quiet
@pytest.mark.parametrize("blocks", [2, 4])
def test_a_forward_in_several_graphs_is_right_or_refused(blocks):
    model = Broken(blocks)
    example = Example(model, torch.randn(BATCH, 5, 8), torch.randint(3, (BATCH, 5)), ("head",))
    _, expected = expected_step(example, 0.3)
    tuner = constant(model)
    tuner.combine(example.task_loss())
    broken = torch.compile(model, backend="aot_eager")
    with torch._dynamo.config.patch(recompile_limit=3):
        if blocks == 2:
            assert_near(gradients(model, tuner.combine(example.task_loss(broken))), expected)
            assert len(counters["graph_break"]) > 0
        else:  # more than the times that Dynamo compiles the forward of a block
            with pytest.raises(RuntimeError, match="several graphs"):
                example.task_loss(broken)
    assert_near(gradients(model, tuner.combine(example.task_loss())), expected)
