"""Equalizations change parameters, never what a float model computes; their factors."""

import copy

import pytest
import torch
from equalized import (
    EXAMPLES,
    POST,
    RESTORED,
    Block,
    each_method,
    each_model,
    prepared,
    relative,
)
from torch import Tensor, nn

from quanttune.quantization.methods import AWEQ, OutlierSuppression, RepQ, SmoothQuant
from quanttune.quantization.methods.equalizing import readers
from quanttune.quantization.methods.equalizing.channel_factors import Channels
from quanttune.quantization.methods.equalizing.norms import Norm
from quanttune.quantization.methods.equalizing.pairs import columns_of
from quanttune.quantization.methods.equalizing.readers import find_other_readers, find_pairs
from quanttune.quantization.running import Data
from quanttune.quantization.scheme import Scheme


def seen_by(model: nn.Module, names: list[str], inputs: Tensor) -> list[Tensor]:
    """Return what the modules multiply, as rows."""
    seen = {}
    for name in names:
        module = model.get_submodule(name)
        module.register_forward_pre_hook(
            lambda _, args, n=name: seen.__setitem__(n, args[0].flatten(0, -2))
        )
    model(inputs)
    return [seen[name] for name in names]


@each_method
@each_model
def test_the_float_model_computes_what_it_did(name, method):
    example = prepared(name)
    model, exact = example.model, example.logits()
    before = copy.deepcopy(model.state_dict())
    method.apply(model, Scheme(8), Data([example.inputs]))
    assert relative(example.logits(), exact) < 1e-14
    after = model.state_dict()
    norms = [pair.name for pair in find_pairs(model, Data([example.inputs]))]
    assert len(norms) == (7 if name == "swin" else 4)
    changed = [key for key in before if not torch.equal(after[key], before[key])]
    assert {*norms} == {key.rpartition(".")[0] for key in changed} & {
        module for module, m in model.named_modules() if isinstance(m, nn.LayerNorm)
    }


@pytest.mark.parametrize("name", ["opt", *POST])
def test_equalizations_add_up(name):
    example = prepared(name)
    exact = example.logits()
    for method in (SmoothQuant(0.7), OutlierSuppression(), RepQ()):
        method.apply(example.model, Scheme(4), Data([example.inputs]))
        assert relative(example.logits(), exact) < 1e-7  # restorations hold float32


def layers(*ends: str, start: str, count: int = 2) -> list[str]:
    return [f"{start}.{i}.{end}" for i in range(count) for end in ends]


FOLDED = {
    "vit": layers("norm1", "norm2", start="blocks"),
    "deit": layers("norm1", "norm2", start="blocks"),
    "gpt2": layers("ln_1", "ln_2", start="transformer.h"),
    "opt": layers("self_attn_layer_norm", "final_layer_norm", start="model.decoder.layers"),
    "swin": [
        *layers("norm1", "norm2", start="layers.0.blocks"),
        "layers.1.downsample.norm",
        *layers("norm1", "norm2", start="layers.1.blocks", count=1),
    ],
    "bert": [],
    "opt after": ["model.decoder.layers.1.final_layer_norm"],  # before project_out
}
# of queries, keys and values, which may be apart, and of feed-forward parts
READERS = {"vit": 4, "deit": 4, "gpt2": 4, "swin": 7, "opt": 8, "bert": 8, "opt after": 6}


@each_model
def test_which_modules_belong_together(name):
    example = EXAMPLES[name]()
    pairs = find_pairs(example.model, Data([example.inputs]))
    assert [pair.name for pair in pairs if pair.alone] == FOLDED[name]
    assert [pair.name for pair in pairs if not pair.alone] == RESTORED.get(name, [])
    assert sum(len(pair.readers) for pair in pairs) == READERS[name]
    assert [pair.name for pair in pairs if not pair.shifts] == (
        {"swin": ["layers.1.downsample.norm"], "opt after": FOLDED["opt after"]}.get(name, [])
    )


class Fixed(nn.LayerNorm):
    """A LayerNorm whose input is normalized already, so that a test can say what comes out."""

    def forward(self, x: Tensor) -> Tensor:
        return x * self.weight + self.bias


@pytest.fixture
def block(monkeypatch) -> Block:
    """Return a block whose LayerNorm passes x on as it is."""
    block = Block().requires_grad_(False)
    block.norm.bias.zero_()
    block.norm.__class__ = Fixed
    monkeypatch.setattr(readers, "norm_of", lambda norm, *_: Norm(norm, True))
    return block


WORKED = torch.tensor([[1.0, -16, 2, 6], [-2, 8, -1, -9]])


def factors(block: Block, method, x: Tensor = WORKED) -> tuple[Tensor, Tensor]:
    """Return what a method divides and shifts by, as the LayerNorm's parameters tell."""
    method.apply(block, Scheme(8), Data([x]))
    scale = 1 / block.norm.weight
    return scale, -block.norm.bias * scale


def test_the_worked_example_of_smoothquant(block):
    block.one.weight.copy_(torch.tensor([[2, 0.5, -1, 1], [0, 1, 2, 0], [1, -1, 1, 0.1]]))
    block.other.weight.copy_(torch.tensor([[0.1, 0.2, -1.5, 0.1]]).expand(3, 4))
    scale, shift = factors(block, SmoothQuant())
    torch.testing.assert_close(scale, torch.tensor([1.0, 4, 1, 3]))
    assert not shift.any()


def test_alpha_is_where_the_range_goes(block):
    block.one.weight.copy_(torch.tensor([[2, 0.5, -1, 1], [0, 1, 2, 0], [1, -1, 1, 0.1]]))
    block.other.weight.zero_()
    of_weights, of_inputs = torch.tensor([2.0, 1, 2, 1]), torch.tensor([2.0, 16, 2, 9])
    scale, _ = factors(copy.deepcopy(block), SmoothQuant(0.0))
    torch.testing.assert_close(scale, 1 / of_weights)
    scale, _ = factors(copy.deepcopy(block), SmoothQuant(1.0))
    torch.testing.assert_close(scale, of_inputs)
    scale, _ = factors(copy.deepcopy(block), SmoothQuant(0.25))
    torch.testing.assert_close(scale, of_inputs**0.25 / of_weights**0.75)
    scale, _ = factors(block, RepQ())
    torch.testing.assert_close(scale, of_inputs / of_inputs.mean())


@pytest.mark.parametrize("alpha", [-0.1, 1.5, float("nan")])
def test_alpha_is_a_share(alpha):
    with pytest.raises(ValueError, match=f"alpha must be from 0 to 1, got {alpha}"):
        SmoothQuant(alpha)


def test_aweq_equalizes_ranges(block):
    block.one.weight.copy_(torch.tensor([[2, 0.5, -1, 1], [0, 1, 2, 0], [1, -1, 1, 0.1]]))
    block.other.weight.copy_(torch.tensor([[-1, 0, 0, 0.25]]).expand(3, 4))
    scale, shift = factors(block, AWEQ())
    torch.testing.assert_close(
        scale, (torch.tensor([3.0, 24, 3, 15]) / torch.tensor([3, 2, 3, 1])).sqrt()
    )
    assert not shift.any()


def test_channels_that_are_zero_have_a_smallest_factor(block):
    x = WORKED * torch.tensor([1.0, 0, 1, 1])
    for method in (SmoothQuant(), RepQ(), AWEQ()):
        scale, _ = factors(copy.deepcopy(block), method, x)
        assert scale[1] == pytest.approx(1e-5)
        assert (scale[[0, 2, 3]] > 0.1).all()
    scale, shift = factors(block, OutlierSuppression(), 0 * x)
    assert torch.equal(scale, torch.ones(4))
    assert not shift.any()


@each_model
def test_smoothquant_makes_the_largest_values_equal(name):
    example = prepared(name)
    SmoothQuant().apply(example.model, Scheme(8), Data([example.inputs]))
    drop = {pair.name: pair for pair in find_pairs(example.model, Data([example.inputs]))}
    for pair in drop.values():
        names = list(pair.readers)
        weights = torch.cat([columns_of(module) for module in pair.readers.values()])
        for x in seen_by(example.model, names, example.inputs):
            torch.testing.assert_close(x.abs().amax(0), weights.abs().amax(0), rtol=1e-6, atol=0)


def test_repq_gives_the_codes_of_a_scale_per_channel():
    example = prepared("vit")
    names = ["blocks.0.attn.qkv", "blocks.1.mlp.fc1"]
    wanted = [codes(x, x.abs().amax(0)) for x in seen_by(example.model, names, example.inputs)]
    RepQ().apply(example.model, Scheme(8), Data([example.inputs]))
    seen = seen_by(example.model, names, example.inputs)
    assert all(torch.equal(codes(x, x.abs().amax()), y) for x, y in zip(seen, wanted, strict=True))
    before = copy.deepcopy(example.model.state_dict())
    RepQ().apply(example.model, Scheme(8), Data([example.inputs]))  # all channels are alike now
    for key, value in example.model.state_dict().items():
        torch.testing.assert_close(value, before[key], rtol=1e-6, atol=0)


def codes(x: Tensor, absmax: Tensor, bits: int = 8) -> Tensor:
    return (x / (absmax / (2 ** (bits - 1) - 1))).round()


def test_the_largest_values_of_repq_keep_their_sum(block):
    scale, _ = factors(block, RepQ())
    absmax = WORKED.abs().amax(0)
    torch.testing.assert_close((absmax / scale).sum(), absmax.sum())
    torch.testing.assert_close(scale.mean(), torch.tensor(1.0))


def test_outlier_suppression_centres_channels_and_takes_the_best_threshold(block):
    x = torch.randn(300, 4) * torch.tensor([1, 9, 0.3, 2]) + torch.tensor([0, 20, -1, 5])
    found, shift = factors(copy.deepcopy(block), OutlierSuppression(), x)
    low, high = x.aminmax(dim=0)
    torch.testing.assert_close(shift, (low + high) / 2)
    centred = x.double() - shift
    absmax = centred.abs().amax(0)

    def error(threshold: float) -> float:
        total = 0.0
        scale = (absmax / threshold).clamp(min=1)
        y = centred / scale
        for module in (block.one, block.other):
            weight = module.weight.double() * scale
            rows = weight.abs().amax(1, keepdim=True)
            rounded = (
                codes(weight, rows) * rows / 127,
                codes(y, y.abs().max()) * y.abs().max() / 127,
            )
            total += (centred @ module.weight.double().T - rounded[1] @ rounded[0].T).square().sum()
        return float(total)

    grid = torch.linspace(absmax.max(), 1, 101).double()
    chosen = absmax.max() / found.max()
    errors = [error(threshold) for threshold in grid.tolist()]
    assert error(chosen.item()) == pytest.approx(min(errors), rel=1e-3)
    assert min(errors) < 0.7 * errors[0]
    torch.testing.assert_close(found.double(), (absmax / chosen).clamp(min=1))


def test_without_a_bias_nothing_is_shifted():
    block = Block(bias=False).requires_grad_(False)
    block.norm.bias.copy_(torch.tensor([0, 30, -20, 1]))
    x = torch.randn(50, 4)
    exact, bias = block(x), block.norm.bias.clone()
    OutlierSuppression().apply(block, Scheme(4), Data([x]))
    scale = bias[1:3] / block.norm.bias[1:3]
    assert (scale > 1.5).all()
    torch.testing.assert_close(block(x), exact, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    "overrides",
    [{"one.weight_quantizer": {"bits": 3}}, {"one.input_quantizer": {"bits": 3}}, {"*": None}],
    ids=str,
)
def test_outlier_suppression_rounds_as_the_call_will(overrides, block):
    """Coarser grids take another threshold; where nothing is rounded, none is better than all."""
    x = torch.randn(300, 4) * torch.tensor([1, 9, 0.3, 2])
    other = copy.deepcopy(block)
    OutlierSuppression().apply(block, Scheme(8, overrides=overrides), Data([x]))
    OutlierSuppression().apply(other, Scheme(8), Data([x]))
    assert not torch.equal(block.norm.weight, other.norm.weight)
    if None in overrides.values():
        torch.testing.assert_close(block.norm.weight, torch.ones(4))


def test_the_tokens_that_are_kept_are_of_all_batches():
    channels = Channels(16)
    for batch in torch.arange(60.0).view(6, 2, 5, 1).expand(-1, -1, -1, 3):
        channels.see(nn.Identity(), (batch,))
    assert channels.low.tolist() == [0] * 3
    assert channels.high.tolist() == [59] * 3
    assert 8 < len(channels.rows) <= 16
    counts = torch.bincount(channels.rows[:, 0].long() // 10, minlength=6)
    assert counts.max() - counts.min() <= 1


class Gain(nn.Module):
    """An RMSNorm that multiplies with 1 + weight, as Gemma's does."""

    def __init__(self, size):
        super().__init__()
        self.weight, self.eps = nn.Parameter(torch.zeros(size)), 1e-6

    def forward(self, x):
        return x * (x.square().mean(-1, keepdim=True) + self.eps).rsqrt() * (1 + self.weight)


class OfRMS(nn.Module):
    """An RMSNorm, two Linear modules that read it, one behind them; and, perhaps, a residual."""

    def __init__(self, norm, residual=False):
        super().__init__()
        self.norm, self.residual = norm, residual
        self.one, self.other = (nn.Linear(8, 8, bias=False) for _ in range(2))
        self.last = nn.Linear(8, 8)

    def forward(self, x):
        y = self.norm(x)
        z = self.last(self.one(y) * self.other(y).sigmoid())
        return y + z if self.residual else z


def rms(norm, residual=False):
    torch.manual_seed(0)
    model = OfRMS(norm(8), residual).double().requires_grad_(False)
    model.norm.weight.add_(0.3 * torch.randn(8))
    x = torch.randn(5, 7, 8, dtype=torch.float64)
    x[..., 3] *= 40
    return model, x


@each_method
@pytest.mark.parametrize("norm", [nn.RMSNorm, Gain])
def test_an_rms_norm_gives_its_readers_what_they_can_take(norm, method):
    model, x = rms(norm)
    exact, offset = model(x), float(norm is Gain)
    (before,) = seen_by(model, ["one"], x)
    weights = model.one.weight.clone()
    method.apply(model, Scheme(8), Data([x]))
    assert relative(model(x), exact) < 1e-14
    (after,) = seen_by(model, ["one"], x)
    scale = before.abs().amax(0) / after.abs().amax(0)
    assert scale.max() > 1.5 * scale.min()
    torch.testing.assert_close(before / scale, after)  # nothing is shifted: there is no bias
    torch.testing.assert_close(model.one.weight, weights * scale)
    gain = rms(norm)[0].norm.weight + offset
    torch.testing.assert_close(model.norm.weight + offset, gain / scale)


def test_the_factors_of_smoothquant_for_an_rms_norm():
    model, x = rms(nn.RMSNorm)
    (inputs,) = seen_by(model, ["one"], x)
    columns = torch.cat([model.one.weight, model.other.weight]).abs().amax(0)
    expected = (inputs.abs().amax(0) / columns).sqrt()
    before = model.norm.weight.clone()
    SmoothQuant().apply(model, Scheme(8), Data([x]))
    torch.testing.assert_close(before / model.norm.weight, expected, rtol=1e-6, atol=0)


def test_an_rms_norm_that_others_read_is_left_to_smooth_inputs():
    model, x = rms(nn.RMSNorm, residual=True)
    with (
        pytest.warns(UserWarning, match="2 module.* an RMSNorm that others read"),
        pytest.raises(ValueError, match="no norm whose output a Linear module reads"),
    ):
        SmoothQuant().apply(model, Scheme(8), Data([x]))
    assert set(find_other_readers(model, Data([x]))) == {"one", "other", "last"}
    alone, x = rms(nn.RMSNorm)
    assert set(find_other_readers(alone, Data([x]))) == {"last"}


def test_a_gain_with_an_offset_is_divided_by_what_its_type_can_hold():
    """In bfloat16 a weight near -1 is coarse: its readers take the factor that came of it."""
    model, x = rms(Gain)
    model.bfloat16()
    gains = 1 + model.norm.weight.float()
    columns = model.one.weight.float()
    scale = torch.tensor([30, 1, 2, 0.5, 1e6, 7, 1, 3]).bfloat16()
    pair = find_pairs(model, Data([x.bfloat16()]))[0]
    pair.fold(scale, torch.zeros(8))
    product = (1 + model.norm.weight.float()) * model.one.weight.float()
    torch.testing.assert_close(product, gains * columns, rtol=2**-8, atol=0)
    assert (gains / (1 + model.norm.weight.float()))[[0, 2]].sub(scale[[0, 2]]).abs().max() < 3
