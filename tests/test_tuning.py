"""Outlier-driven tuning of small Transformers, against eqs. 2 and 3 in plain PyTorch."""

import copy
import gc
import io
import pickle
import warnings
import weakref
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import pytest
import torch
from models import BATCH, MODELS, TOKENS, Example
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers import GPT2Config, GPT2LMHeadModel

import quanttune as qt
from quanttune.tuning.loss import instances
from quanttune.tuning.observers import Observers, batch_size
from quanttune.tuning.sites import find_heads, find_sites
from quanttune.tuning.tuner import is_attached

# Relative error of each parameter's gradient, by norm. The model runs in float32 with either loss,
# and gradients only meet in another order: measured below 1e-6.
TOLERANCE = 1e-5

HOOKS = [k for k, v in vars(nn.Module()).items() if "hook" in k and isinstance(v, dict)]

quiet = pytest.mark.filterwarnings("ignore:the outlier term's gradient norm")
each_model = pytest.mark.parametrize("name", MODELS)

# --------------------------------------------------------------------------------------- the oracle


class Oracle:
    """Eq. 2 by plain hooks on every Linear and LayerNorm, with autograd all the way."""

    def __init__(
        self,
        model: nn.Module,
        heads: Sequence[str],
        only: Sequence[str] | None = None,
        detach_deviation: bool = False,
    ) -> None:
        self.detach_deviation = detach_deviation
        self.ratios: list[Tensor] = []
        self.batch = BATCH
        self.handles = []
        for name, module in model.named_modules():
            if isinstance(module, (nn.Linear, nn.LayerNorm)) and (only is None or name in only):
                hook = module.register_forward_pre_hook(lambda _, args: self.see(args[0]))
                self.handles.append(hook)
                if name not in heads:
                    hook = module.register_forward_hook(lambda *call: self.see(call[2]))
                    self.handles.append(hook)

    def see(self, x: Tensor) -> None:
        rows = x.reshape(1 if x.shape[0] == 1 else self.batch, -1).double()
        magnitude = rows.abs()
        median = magnitude.median(1, keepdim=True).values.detach()
        # amax shares the gradient among ties, which bfloat16 has many of
        median = torch.where(magnitude <= median, magnitude, 0).amax(1)
        deviation = rows.std(1)
        if self.detach_deviation:
            deviation = deviation.detach()
        self.ratios.append(((magnitude.amax(1) - median) / deviation).mean())

    def combine(self, task: Tensor, alpha: float) -> Tensor:
        outlier, self.ratios = torch.stack(self.ratios).mean(), []
        return (1 - alpha) * task + alpha * outlier

    def __enter__(self) -> "Oracle":
        return self

    def __exit__(self, *_: object) -> None:
        for handle in self.handles:
            handle.remove()


def gradients(model: nn.Module, loss: Tensor) -> dict[str, Tensor]:
    model.zero_grad()
    loss.backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def expected_step(example: Example, alpha: float, **options) -> tuple[Tensor, dict[str, Tensor]]:
    with Oracle(example.model, example.heads, **options) as oracle:
        loss = oracle.combine(example.task_loss(), alpha)
    return loss.detach(), gradients(example.model, loss)


def assert_near(actual: dict, expected: dict, tolerance: float = TOLERANCE) -> None:
    assert actual.keys() == expected.keys()
    for name, gradient in expected.items():
        error = (actual[name] - gradient).norm()
        assert error <= tolerance * gradient.norm(), f"{name}: {error / gradient.norm()}"


def assert_same_bits(actual: dict, expected: dict) -> None:
    assert actual.keys() == expected.keys()
    for name, value in expected.items():
        assert torch.equal(actual[name], value), name


def constant(model: nn.Module, alpha: float = 0.3, **options) -> qt.Tuner:
    return qt.attach(model, alpha, "constant", **options)


@contextmanager
def observing(model: nn.Module) -> Iterator[Observers]:
    observers = Observers(model, find_sites(model), find_heads(model), False, False)
    yield observers
    observers.remove()


# ------------------------------------------------------------------------ the loss and its gradient


@quiet
@each_model
@pytest.mark.parametrize("alpha", [0.3, 0.9])
@pytest.mark.parametrize("detach_deviation", [False, True])
def test_loss_and_every_gradient_are_those_of_plain_pytorch(name, alpha, detach_deviation):
    example = MODELS[name]()
    loss, expected = expected_step(example, alpha, detach_deviation=detach_deviation)
    tuner = constant(example.model, alpha, detach_deviation=detach_deviation)
    for _ in range(2):  # the first step also compares gradients
        total = tuner.combine(example.task_loss())
        torch.testing.assert_close(total.double(), loss.double(), rtol=1e-6, atol=0)
        assert_near(gradients(example.model, total), expected)


@quiet
def test_alpha_one_leaves_the_outlier_loss_alone():
    example = MODELS["vit"]()
    loss, expected = expected_step(example, 1.0)
    total = constant(example.model, 1.0).combine(example.task_loss())
    torch.testing.assert_close(total.double(), loss, rtol=1e-6, atol=0)
    actual = gradients(example.model, total)
    assert_near(actual, expected)
    assert not actual["head.weight"].any()


@quiet
def test_conv1d_of_gpt2_is_observed():
    special = {"bos_token_id": 0, "eos_token_id": 1}
    config = GPT2Config(n_embd=24, n_layer=1, n_head=2, vocab_size=60, **special)
    model = GPT2LMHeadModel(config).train()
    sites = find_sites(model)
    assert {f"transformer.h.0.{n}" for n in ("attn.c_attn", "mlp.c_fc", "mlp.c_proj")} < set(sites)
    with observing(model) as observers:
        model(torch.randint(60, (BATCH, 7)))
        # 4 Conv1D and 3 LayerNorm in and out, and the input of lm_head
        assert instances(observers.take()) == 2 * 4 + 2 * 3 + 1


@quiet
@each_model
def test_terms_are_kept_for_the_log_without_a_graph(name):
    example = MODELS[name]()
    task = example.task_loss()
    with Oracle(example.model, example.heads) as oracle:
        example.task_loss()
        outlier = oracle.combine(task, 1.0)
    tuner = constant(example.model)
    tuner.combine(example.task_loss())
    assert not tuner.task_loss.requires_grad
    assert not tuner.outlier_loss.requires_grad
    assert torch.equal(tuner.task_loss, task.detach())
    torch.testing.assert_close(tuner.outlier_loss.double(), outlier.detach(), rtol=1e-6, atol=0)


@quiet
@pytest.mark.parametrize("name", ["vit", "bert"])
def test_bfloat16_autocast(name):
    example = MODELS[name]()
    with torch.autocast("cpu", torch.bfloat16):
        loss, expected = expected_step(example, 0.3)
        tuner = constant(example.model)
        total = tuner.combine(example.task_loss())
    torch.testing.assert_close(total.double(), loss.double(), rtol=1e-5, atol=0)
    # a bfloat16 gradient is rounded once where plain autograd rounds each of its terms: 2^-9 each,
    # over the depth of the model
    assert_near(gradients(example.model, total), expected, tolerance=2e-2)


# ---------------------------------------------------------------------------------- what is counted


@each_model
def test_every_input_and_output_counts_but_each_tensor_is_computed_once(name):
    example = MODELS[name]()
    with Oracle(example.model, example.heads) as oracle:
        example.task_loss()
        literal = len(oracle.ratios)
    sites = find_sites(example.model)
    assert literal == 2 * len(sites) - len(example.heads)
    with observing(example.model) as observers:
        for _ in range(2):
            example.task_loss()
            observations = observers.take()
            assert instances(observations) == literal
            assert len(observations) < literal
            assert all(len(observation.ratio) == BATCH for observation in observations)


def test_a_layer_norm_that_feeds_query_key_and_value_counts_four_times():
    example = MODELS["bert"]()
    with observing(example.model) as observers:
        example.task_loss()
        counts = {o.site: o.multiplicity for o in observers.take()}
    layer = "bert.encoder.layer.0"
    assert counts[f"{layer}.output.LayerNorm.output"] == 4
    assert counts[f"{layer}.attention.output.LayerNorm.output"] == 2  # itself and the first Linear
    assert counts[f"{layer}.attention.self.query.output"] == 1
    assert f"{layer}.attention.self.query.input" not in counts


def test_logits_are_left_out_of_a_model_that_does_not_name_its_head():
    model = nn.Sequential(nn.Linear(8, 8), nn.GELU(), nn.Linear(8, 3)).train()
    with observing(model) as observers:
        for _ in range(2):
            model(torch.randn(BATCH, 8))
            sites = [observation.site for observation in observers.take()]
            assert sites == ["0.input", "0.output", "2.input"]


@pytest.mark.parametrize("several", [False, True])
def test_a_head_that_the_model_names_is_left_out_whatever_becomes_of_its_output(several):
    class Tempered(Shared):
        def get_classifier(self):
            return (self.head, nn.Identity()) if several else self.head

        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x) / 10

    with observing(Tempered()) as observers:
        observers.model(torch.randn(BATCH, 8))
        sites = [observation.site for observation in observers.take()]
        assert sites[-2:] == ["norm.input", "norm.output"]  # which is the input of the head


@pytest.mark.parametrize(
    ("name", "site", "rows"),
    [
        ("opt", "model.decoder.layers.0.fc1", BATCH * TOKENS),  # (batch * tokens, channels)
        ("swin", "layers.0.blocks.0.attn.qkv", BATCH * 4),  # (windows * batch, tokens, channels)
    ],
)
def test_samples_come_from_the_model_input_and_not_from_the_layer(name, site, rows):
    example, shapes = MODELS[name](), []
    module = example.model.get_submodule(site)
    module.register_forward_pre_hook(lambda _, args: shapes.append(args[0].shape))
    with observing(example.model) as observers:
        example.task_loss()
        ratios = {o.site: o.ratio for o in observers.take()}
    assert [shape[0] for shape in shapes] == [rows]
    assert len(ratios[f"{site}.output"]) == BATCH


class Positions(nn.Module):
    """Adds what an MLP makes of a table that has no batch dimension."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("table", torch.randn(1, 6, 2))
        self.mlp = nn.Linear(2, 8)
        self.head = nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head((x + self.mlp(self.table)).mean(1))


@quiet
def test_a_tensor_that_does_not_depend_on_the_batch_is_one_sample():
    example = Example(Positions(), torch.randn(BATCH, 6, 8), torch.arange(BATCH) % 3, ("head",))
    _, expected = expected_step(example, 0.3)
    with observing(example.model) as observers:
        example.task_loss()
        counts = {o.site: len(o.ratio) for o in observers.take()}
    assert counts == {"mlp.input": 1, "mlp.output": 1, "head.input": BATCH}
    total = constant(example.model).combine(example.task_loss())
    assert_near(gradients(example.model, total), expected)


def test_batch_size_is_that_of_the_main_input():
    words, mask = torch.zeros(4, 7, dtype=torch.int64), torch.ones(1, 1, 7, 7)
    model = MODELS["bert"]().model
    assert batch_size(model, (), {"attention_mask": mask, "input_ids": words}) == 4
    assert batch_size(nn.Identity(), ([torch.tensor(3.0), words],), {"mask": mask}) == 4
    assert batch_size(nn.Identity(), (), {"inputs": {"first": words}}) == 4


def test_a_call_without_a_tensor_is_refused():
    class Constant(nn.Linear):
        def forward(self) -> Tensor:
            return super().forward(torch.ones(1, 8))

    model = Constant(8, 3)
    constant(model)
    with pytest.raises(ValueError, match="Constant was called without a tensor to take the batch"):
        model()


def test_include_and_exclude_are_patterns_of_qualified_names():
    model = MODELS["vit"]().model
    everything = set(find_sites(model))
    assert len(everything) == 2 * 6 + 2  # two blocks of four Linear and two LayerNorm, norm, head
    mlps = {f"blocks.{i}.mlp.fc{j}" for i in (0, 1) for j in (1, 2)}
    assert set(find_sites(model, include=["blocks.*.mlp.*"])) == mlps
    assert set(find_sites(model, exclude=["blocks.*.mlp.*"])) == everything - mlps
    assert set(find_sites(model, ["*.mlp.*", "norm"], ["*fc2"])) == {
        "blocks.0.mlp.fc1",
        "blocks.1.mlp.fc1",
        "norm",
    }


@quiet
def test_excluded_modules_are_not_in_the_loss():
    example = MODELS["vit"]()
    _, expected = expected_step(example, 0.3, only=["norm"])
    total = constant(example.model, include=["norm"]).combine(example.task_loss())
    assert_near(gradients(example.model, total), expected)


# -------------------------------------------------------------------------------- attach and detach


def fingerprint(model: nn.Module) -> list:
    """Return what attaching might change: every module's attributes, hooks and their options."""
    return [
        (name, list(vars(module)), [list(vars(module)[hook].items()) for hook in HOOKS])
        for name, module in model.named_modules()
    ]


@quiet
@each_model
def test_detach_restores_the_model(name):
    example = MODELS[name]()
    model = example.model
    model.register_forward_hook(lambda *_: None, always_call=True)  # the user's own hook stays
    before, state = fingerprint(model), copy.deepcopy(model.state_dict())
    logits, plain = example.logits(), gradients(model, example.task_loss())
    for _ in range(50):
        tuner = constant(model)
        assert is_attached(model)
        tuner.detach()
        assert not is_attached(model)
    tuner = constant(model)
    assert fingerprint(model) != before
    assert_same_bits(model.state_dict(), state)
    gradients(model, tuner.combine(example.task_loss()))
    assert torch.equal(example.logits(), logits)
    tuner.detach()
    model.zero_grad()
    assert len(before) == len(list(model.modules()))
    assert fingerprint(model) == before
    assert_same_bits(model.state_dict(), state)
    assert torch.equal(example.logits(), logits)
    assert_same_bits(gradients(model, example.task_loss()), plain)


def test_attaching_twice_is_refused():
    model = MODELS["vit"]().model
    tuner = constant(model)
    before = fingerprint(model)
    for part in (model, model.blocks):
        message = f"{type(part).__name__} is attached already: detach\\(\\) its tuner first"
        with pytest.raises(ValueError, match=message):
            constant(part)
    assert fingerprint(model) == before
    tuner.detach()
    constant(model).detach()


def test_a_model_without_a_site_is_refused_and_left_alone():
    model = nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4))
    before = fingerprint(model)
    with pytest.raises(ValueError, match="no Linear, Conv1D or LayerNorm of Sequential matches"):
        constant(model)
    with pytest.raises(ValueError, match=r"include=\['head.\*'\] and exclude=\['0'\]"):
        constant(nn.Sequential(nn.Linear(2, 2)), include=["head.*"], exclude=["0"])
    assert fingerprint(model) == before


def test_detached_tuner_observes_nothing():
    example = MODELS["vit"]()
    tuner = constant(example.model)
    loss = example.task_loss()
    tuner.detach()
    with pytest.raises(RuntimeError, match="no activation was observed since the last combine"):
        tuner.combine(loss)


# ---------------------------------------------------------------------------------------- alpha = 0


def train(example: Example, steps: int, tuner: qt.Tuner | None, optimizer=None) -> None:
    optimizer = optimizer or torch.optim.AdamW(example.model.parameters(), lr=0.01)
    for _ in range(steps):
        loss = example.task_loss()
        if tuner:
            loss = tuner.combine(loss)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if tuner:
            tuner.step()


@pytest.mark.parametrize("name", ["vit", "bert"])
@pytest.mark.parametrize("decay", ["linear", "constant"])
def test_alpha_zero_trains_bit_for_bit_as_without_a_tuner(name, decay):
    example = MODELS[name]()
    plain = copy.deepcopy(example)
    train(plain, 5, None)
    train(example, 5, qt.attach(example.model, 0.0, decay, total_steps=9))
    assert_same_bits(example.model.state_dict(), plain.model.state_dict())


@quiet
@pytest.mark.parametrize("decay", ["linear", "cosine"])
def test_from_total_steps_on_training_is_plain(decay):
    example = MODELS["bert"]()
    start = example.model.classifier.weight.detach().clone()
    tuner = qt.attach(example.model, 0.5, decay, total_steps=2)
    optimizer = torch.optim.SGD(example.model.parameters(), lr=0.01)
    train(example, 2, tuner, optimizer)
    plain = copy.deepcopy(example)
    assert not torch.equal(plain.model.classifier.weight, start)
    assert tuner.alpha == 0
    loss = example.task_loss()
    assert tuner._observers.take() == []  # it costs nothing any more
    assert tuner.combine(loss) is loss
    train(example, 3, tuner, optimizer)
    train(plain, 3, None, torch.optim.SGD(plain.model.parameters(), lr=0.01))
    assert_same_bits(example.model.state_dict(), plain.model.state_dict())


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


class Shared(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.shared = nn.Linear(8, 8)
        self.alias = self.shared
        self.norm = nn.LayerNorm(8)
        self.head = nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        for _ in range(3):
            x = x + self.shared(x).tanh()
        return self.head(self.norm(x))


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

    handle = example.model.blocks[1].mlp.register_forward_pre_hook(fail)
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
            assert len(activations) > 50
            assert not [reference for reference in activations if reference() is not None]
    finally:
        gc.enable()


# ------------------------------------------------------------------------------------------- copies


def through_torch_save(model: nn.Module) -> nn.Module:
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


@quiet
@each_model
@pytest.mark.parametrize(
    "duplicate",
    [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model)), through_torch_save],
    ids=["deepcopy", "pickle", "save"],
)
def test_a_copy_is_not_attached(name, duplicate):
    example = MODELS[name]()
    plain = gradients(example.model, example.task_loss())
    loss, expected = expected_step(example, 0.3)
    example.model.zero_grad()
    tuner = constant(example.model)
    twin = duplicate(example.model)
    assert is_attached(example.model)
    assert not is_attached(twin)
    assert_same_bits(twin.state_dict(), example.model.state_dict())
    assert torch.equal(example.logits(twin), example.logits(example.model))
    tuner.combine(example.task_loss())
    assert_same_bits(gradients(twin, example.task_loss(twin)), plain)
    with pytest.raises(RuntimeError, match="no activation was observed"):
        tuner.combine(example.task_loss(twin))
    # both train on, each with its own tuner
    for model in (twin, example.model):
        own = tuner if model is example.model else constant(model)
        total = own.combine(example.task_loss(model))
        torch.testing.assert_close(total.double(), loss, rtol=1e-6, atol=0)
        assert_near(gradients(model, total), expected)


# ----------------------------------------------------------------------------- balance and warnings


@quiet
def test_initial_balance_keeps_the_first_factor():
    example = MODELS["bert"]()
    tuner = constant(example.model, 0.3, balance="initial")
    first = tuner.combine(example.task_loss())
    factor = tuner.task_loss / tuner.outlier_loss
    # at first both terms are the task loss
    torch.testing.assert_close(first.detach(), tuner.task_loss, rtol=1e-6, atol=0)
    with torch.no_grad():
        for p in example.model.parameters():
            p.mul_(1.1)
    total = tuner.combine(example.task_loss())
    expected = 0.7 * tuner.task_loss + 0.3 * factor * tuner.outlier_loss
    torch.testing.assert_close(total.detach(), expected, rtol=1e-6, atol=0)
    assert abs(tuner.task_loss / tuner.outlier_loss / factor - 1) > 1e-3
    with Oracle(example.model, example.heads) as oracle:
        task = example.task_loss()
        outlier = oracle.combine(task, 1.0)
    plain = gradients(example.model, 0.7 * task + 0.3 * factor * outlier)
    assert_near(gradients(example.model, total), plain)


@pytest.mark.parametrize("task", [0.0, -1.0, float("nan"), float("inf")])
def test_initial_balance_needs_positive_losses(task):
    example = MODELS["vit"]()
    tuner = constant(example.model, balance="initial")
    loss = example.task_loss()
    message = f"needs positive first losses, got {task:.4g} for the task and [0-9.]+ for the out"
    with pytest.raises(ValueError, match='balance="initial" ' + message):
        tuner.combine(loss - loss.detach() + task)


def test_a_loud_outlier_gradient_is_reported_once_with_both_norms():
    example = MODELS["vit"]()
    with Oracle(example.model, example.heads) as oracle:
        outlier = oracle.combine(example.task_loss(), 1.0)
    task = example.task_loss()
    norms = [norm(gradients(example.model, loss)) for loss in (0.7e-3 * task, 0.3 * outlier)]
    tuner = constant(example.model)
    message = (
        f"the outlier term's gradient norm is {norms[1]:.3g} at the first step, the task's "
        f"{norms[0]:.3g}: the task may be lost"
    )
    with pytest.warns(UserWarning, match=message) as caught:
        loss = tuner.combine(1e-3 * example.task_loss())
    assert caught[0].filename == __file__
    loss.backward()
    tuner.combine(1e-3 * example.task_loss()).backward()  # any warning is an error


def norm(gradients: dict[str, Tensor]) -> Tensor:
    return torch.stack([gradient.norm() for gradient in gradients.values()]).norm()


@pytest.mark.parametrize("scale", [0.3, 0.4])
def test_the_warning_starts_where_the_outlier_gradient_is_three_times_the_task(scale):
    """The task loss is scaled so that the ratio of the norms is 1 / scale: 3.33 and 2.5."""
    example = MODELS["vit"]()
    with Oracle(example.model, example.heads) as oracle:
        outlier = oracle.combine(example.task_loss(), 1.0)
    task = example.task_loss()
    norms = [norm(gradients(example.model, loss)) for loss in (0.7 * task, 0.3 * outlier)]
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        constant(example.model).combine(scale * norms[1] / norms[0] * example.task_loss())
    assert len(caught) == (scale < 1 / 3)


class Detour(nn.Module):
    """Calls a Linear whose output nobody uses."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Linear(8, 8)
        self.unused = nn.Linear(8, 8)
        self.head = nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.body(x).tanh()
        self.unused(x)
        return self.head(x)


@quiet
def test_an_activation_that_does_not_reach_the_loss_is_named_once():
    example = Example(Detour(), torch.randn(BATCH, 8), torch.arange(BATCH) % 3, ("head",))
    tuner = constant(example.model)
    total = tuner.combine(example.task_loss())
    message = r"2 observed tensor\(s\) do not reach the loss .*: unused.input, unused.output. Leave"
    with pytest.warns(UserWarning, match=message):
        total.backward()
    tuner.combine(example.task_loss()).backward()
    tuner.detach()
    # the advice helps
    constant(example.model, exclude=["unused"]).combine(example.task_loss()).backward()
