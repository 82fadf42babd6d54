"""Losses beyond the paper, against autograd in float64, by hand, and in whole models."""

import pytest
import torch
from models import BATCH, MODELS, Example, Shared
from oracle import assert_near, constant, expected_step, gradients, quiet
from scipy import stats
from torch import Tensor
from torch.utils.checkpoint import checkpoint

import quanttune as qt
from quanttune import ops
from quanttune.losses import LOSSES, HingeRatio, Kurtosis, LogRatio, Ratio, Tweo, find_loss

# each loss, and what it costs in plain PyTorch: a ratio, or the rows of a tensor
RATIO_LOSSES = {
    HingeRatio(2.5): lambda ratio: torch.relu(ratio - 2.5),
    LogRatio(): lambda ratio: torch.log(1 + ratio),
}
ROW_LOSSES = {
    Kurtosis(1.8): lambda rows: (_kurtosis(rows) - 1.8) ** 2,
    Tweo(0.7, 4.0): lambda rows: (rows.abs() / 0.7).pow(4).mean(1),
    Tweo(0.9, 3.0): lambda rows: (rows.abs() / 0.9).pow(3).mean(1),
}
CASES = [
    *[(loss, {"cost": cost}) for loss, cost in RATIO_LOSSES.items()],
    *[(loss, {"cost_of_rows": cost}) for loss, cost in ROW_LOSSES.items()],
]
each_case = pytest.mark.parametrize(("loss", "oracle"), CASES, ids=lambda value: str(value)[:12])


def _kurtosis(rows: Tensor) -> Tensor:
    centred = rows - rows.mean(1, keepdim=True)
    return centred.pow(4).mean(1) / centred.square().mean(1).square()


@quiet
@each_case
@pytest.mark.parametrize("name", ["vit", "opt"])
def test_every_gradient_is_that_of_plain_pytorch(name, loss, oracle):
    example = MODELS[name]()
    for module_name, module in example.model.named_modules():
        if module_name.endswith("k_proj"):  # to a softmax the bias of a key is nothing but rounding
            module.bias.requires_grad_(False)
    expected_loss, expected = expected_step(example, 0.4, **oracle)
    tuner = constant(example.model, 0.4, loss=loss)
    for _ in range(2):
        total = tuner.combine(example.task_loss())
        torch.testing.assert_close(total.double(), expected_loss.double(), rtol=1e-6, atol=0)
        assert_near(gradients(example.model, total), expected)


@quiet
@each_case
@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpoints_and_autocast_change_nothing(loss, oracle, reentrant):
    example = MODELS["vit"]()
    _, expected = expected_step(example, 0.4, **oracle)
    tuner = constant(example.model, 0.4, loss=loss)
    for block in example.model.blocks:
        plain = block.forward
        block.forward = lambda x, plain=plain: checkpoint(plain, x, use_reentrant=reentrant)
    assert_near(gradients(example.model, tuner.combine(example.task_loss())), expected)


@quiet
@pytest.mark.parametrize(("loss", "oracle"), CASES[1:3], ids=["of the ratio", "of rows"])
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")
def test_one_compiled_graph(loss, oracle):
    torch.compiler.reset()
    data = torch.randn(BATCH, 5, 8), torch.randint(3, (BATCH, 5))
    example = Example(Shared(), *data, ("head",))
    _, expected = expected_step(example, 0.4, **oracle)
    tuner = constant(example.model, 0.4, loss=loss)
    tuner.combine(example.task_loss())
    compiled = torch.compile(example.model, fullgraph=True, backend="aot_eager")
    total = tuner.combine(example.task_loss(compiled))
    assert_near(gradients(example.model, total), expected)


@quiet
@pytest.mark.parametrize("loss", RATIO_LOSSES, ids=str)
@pytest.mark.parametrize("detach_deviation", [False, True])
def test_losses_of_the_ratio_detach(loss, detach_deviation):
    example = MODELS["bert"]()
    options = {"detach_deviation": detach_deviation}
    _, expected = expected_step(example, 0.4, cost=RATIO_LOSSES[loss], **options)
    tuner = constant(example.model, 0.4, loss=loss, **options)
    for _ in range(2):
        total = tuner.combine(example.task_loss())
        assert_near(gradients(example.model, total), expected)


@pytest.mark.parametrize("option", ["exact", "detach_deviation"])
def test_an_option_of_the_loss_itself_counts(option):
    for loss, options in ((HingeRatio(**{option: True}), {}), (HingeRatio(), {option: True})):
        found = find_loss(loss, **{"exact": False, "detach_deviation": False} | options)
        assert found == HingeRatio(**{option: True})


@pytest.mark.parametrize("loss", [Ratio(), *RATIO_LOSSES, *ROW_LOSSES], ids=str)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_constant_samples_and_those_without_share_keep_their_gradient(loss, dtype):
    x = torch.tensor([[0.5] * 7, [1, -2, 3, -4, 5, -6, 7]], dtype=dtype)
    grad = torch.randn(2, 7).to(dtype)
    statistics = loss.measure(ops, x, 2)
    share = torch.tensor([1.0, 0.0], dtype=statistics.dtype)
    total = loss.backward(ops, grad, x, statistics, share)
    assert total.dtype == dtype
    if not isinstance(loss, Tweo):  # to which a constant is as good as anything
        assert torch.equal(total[0], grad[0])
        assert loss.values(statistics)[0] == 0
    assert torch.equal(total[1], grad[1])


@pytest.mark.parametrize("loss", [Ratio(), *RATIO_LOSSES, *ROW_LOSSES], ids=str)
def test_a_sample_with_nan_spoils_no_other(loss):
    x = torch.randn(3, 50)
    clean = loss.values(loss.measure(ops, x, 3))
    x[1, 7] = torch.nan
    values = loss.values(loss.measure(ops, x, 3))
    assert values[1].isnan()
    assert torch.equal(values[[0, 2]], clean[[0, 2]])


def test_values_by_hand():
    x = torch.tensor([[1.0, -1.0, 1.0, -1.0], [3.0, 0.0, -6.0, 0.0]])
    kurtosis = Kurtosis(0.0)
    values = kurtosis.values(kurtosis.measure(ops, x, 2))
    assert values[0] == 1  # two points: the smallest kurtosis there is
    expected = stats.kurtosis([3, 0, -6, 0], fisher=False) ** 2
    torch.testing.assert_close(values[1].item(), expected, rtol=1e-6, atol=0)
    tweo = Tweo()
    assert tweo.values(tweo.measure(ops, x, 2))[1] == (1 + 16) / 4
    ratio = Ratio().values(ops.outlier_statistics(x, 2, False))[1].item()
    # max 6, lower median 0, mean -0.75
    deviation = ((3.75**2 + 2 * 0.75**2 + 5.25**2) / 3) ** 0.5
    torch.testing.assert_close(ratio, 6 / deviation, rtol=1e-6, atol=0)


@quiet
def test_ranges_are_the_largest_magnitudes_with_every_loss():
    example = MODELS["vit"]()
    expected = None
    for name in LOSSES:
        tuner = constant(example.model, loss=name)
        tuner.combine(example.task_loss())
        ranges = tuner.ranges()
        tuner.detach()
        expected = expected or ranges
        assert ranges == expected
    assert len(expected) > BATCH


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"loss": "huber"}, "loss must be one of ratio, hinge_ratio, .*, got 'huber'"),
        ({"loss": "tweo", "detach_deviation": True}, "detach_deviation=True is for losses of the"),
        ({"loss": "kurtosis", "exact": True}, "exact=True is for losses of the ratio, not for"),
    ],
)
def test_refusals(options, message):
    with pytest.raises(ValueError, match=message):
        qt.attach(MODELS["vit"]().model, **options, total_steps=1)
