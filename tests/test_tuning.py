"""The outlier loss of small Transformers, against eqs. 2 and 3 in plain PyTorch."""

import warnings
import weakref

import pytest
import torch
from models import BATCH, DEEP, MODELS, TOKENS, Example, Shared
from oracle import (
    Oracle,
    assert_near,
    constant,
    each_model,
    expected_step,
    gradients,
    observing,
    quiet,
)
from torch import Tensor, nn
from transformers import GPT2Config, GPT2LMHeadModel

from quanttune.masks import batch_size
from quanttune.reference import RATIO
from quanttune.tuning.mixing import instances
from quanttune.tuning.sites import find_sites

# ------------------------------------------------------------------------ the loss and its gradient


@quiet
@each_model
@pytest.mark.parametrize("alpha", [0.3, 0.9])
@pytest.mark.parametrize("detach_deviation", [False, True])
def test_loss_and_every_gradient_are_those_of_plain_pytorch(name, alpha, detach_deviation):
    example = DEEP[name]()
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
            assert all(len(observation.statistics) == BATCH for observation in observations)


def test_a_layer_norm_that_feeds_query_key_and_value_counts_four_times():
    example = DEEP["bert"]()
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
        ratios = {o.site: o.statistics[:, RATIO] for o in observers.take()}
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
        counts = {o.site: len(o.statistics) for o in observers.take()}
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
    model = DEEP["vit"]().model
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


@quiet
def test_comparing_gradients_holds_one_set_of_them_at_a_time(monkeypatch):
    """Two sets of a model of billions of parameters would not fit where its training does."""
    exact, held, counts = torch.autograd.grad, [], []

    def counted(*args, **options):
        counts.append(sum(one() is not None for one in held))
        found = exact(*args, **options)
        held.extend(weakref.ref(gradient) for gradient in found if gradient is not None)
        return found

    monkeypatch.setattr(torch.autograd, "grad", counted)
    example = MODELS["vit"]()
    constant(example.model).combine(example.task_loss())
    assert held
    assert counts == [0, 0]


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
