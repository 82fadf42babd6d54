"""The second moments of layers' inputs: of which tokens, and whose they are."""

import copy
from functools import partial

import pytest
import torch
from models import MODELS, TOKENS, Shared
from oracle import assert_same_bits
from torch import Tensor, nn

import quanttune as qt
from quanttune.quantization.methods import ERQ, GPTQ
from quanttune.quantization.methods.rounding import moments
from quanttune.quantization.methods.rounding.moments import (
    Means,
    Moments,
    groups_of,
    passes,
    sums_of,
)
from quanttune.quantization.running import Data, forward_batches
from quanttune.quantization.state import is_quantized


def bert() -> tuple[nn.Module, Tensor]:
    example = MODELS["bert"]()
    return example.model.eval(), example.inputs


def calibrated(model: nn.Module, data, **options) -> nn.Module:
    """Return a quantized copy of a model."""
    return qt.quantize(copy.deepcopy(model), 4, coverage="linear", data=data, **options)


def float_moments(x: Tensor, other: Tensor) -> Tensor:
    rows, others = (
        torch.cat([y.flatten(0, -2).double(), torch.ones(y[..., 0].numel(), 1).double()], 1)
        for y in (x, other)
    )
    return rows.T @ others


@pytest.mark.parametrize("budget", [2**30, 1])
def test_moments_are_those_of_all_tokens_and_no_padding(budget, monkeypatch):
    monkeypatch.setattr(moments, "BYTES", budget)
    model, x = bert()
    lengths = torch.tensor((5, TOKENS, 2, 4))
    mask = (torch.arange(TOKENS) < lengths[:, None]).long()
    batch = {"input_ids": x, "attention_mask": mask}
    data = [{name: y[rows] for name, y in batch.items()} for rows in (slice(0, 3), slice(3, 4))]
    model = calibrated(model, data)
    groups = groups_of(model, Data(data))
    names = {m: name for name, m in model.named_modules()}
    members = [[names[layer.module] for layer in group.layers] for group in groups]
    block = "bert.encoder.layer.0.attention.self."
    assert members[0] == [f"{block}query", f"{block}key", f"{block}value"]
    assert members[-2:] == [["bert.pooler.dense"], ["classifier"]]
    assert len(list(passes(groups, 2))) == (1 if budget > 1 else len(groups))
    sums = [
        found
        for chosen in passes(groups, 2)
        for found in sums_of(model, chosen, Data(data), partial(Moments, cross=True))
    ]
    seen: dict[str, list[Tensor]] = {name: [] for name, *_ in members}
    for name, given in seen.items():
        model.get_submodule(name).register_forward_pre_hook(
            lambda _, args, given=given: given.append(args[0])
        )
    for i, length in enumerate(lengths.tolist()):
        forward_batches(model, [x[i : i + 1, :length]])
    for name, found in zip(seen, sums, strict=True):
        tokens = torch.cat([y.flatten(0, -2) for y in seen[name]])
        a = model.get_submodule(name).input_quantizer(tokens)
        near = {"rtol": 1e-4, "atol": 1e-3}  # a row of a batch, and the same alone
        torch.testing.assert_close(found.gram, float_moments(a, a), **near)
        torch.testing.assert_close(found.cross, float_moments(a, tokens), **near)
        assert found.tokens == len(tokens)
    for found, mean in zip(sums, sums_of(model, groups, Data(data), Means), strict=True):
        tolerance = {"rtol": 1e-9, "atol": 1e-12}
        torch.testing.assert_close(found.gram[-1, :-1] / found.tokens, mean.rounded, **tolerance)
        torch.testing.assert_close(found.cross[-1, :-1] / found.tokens, mean.exact, **tolerance)


def test_layers_that_round_one_tensor_otherwise_share_nothing():
    model, x = bert()
    data = x.split(3)
    other = calibrated(model, data, overrides={"*.key.input_quantizer": {"bits": 6}})
    groups = groups_of(other, Data(data))
    assert [len(group.layers) for group in groups[:3]] == [1, 1, 1]
    same = calibrated(model, data)
    assert [len(group.layers) for group in groups_of(same, Data(data))[:2]] == [3, 1]


def test_a_module_that_is_called_several_times_counts_each_call():
    model, x = Shared().eval(), torch.randn(5, 8)
    model = calibrated(model, [x])
    shared, head = groups_of(model, Data([x]))
    assert (shared.calls, head.calls) == (3, 1)
    (found,) = sums_of(model, [shared], Data([x, x]), Moments)
    assert found.tokens == 2 * 3 * 5
    for method in (ERQ(), GPTQ()):
        assert is_quantized(calibrated(Shared().eval(), [x], methods=[method]))


def test_one_layer_at_a_time_gives_the_same_bits(monkeypatch):
    model, x = bert()
    data = x.split(3)
    expected = calibrated(model, data, methods=["erq"]).state_dict()
    monkeypatch.setattr(moments, "BYTES", 1)
    assert_same_bits(calibrated(model, data, methods=["erq"]).state_dict(), expected)


class Again(nn.Module):
    """Two layers that are given one tensor; one of them is called on another one as well."""

    def __init__(self, order: str) -> None:
        super().__init__()
        self.a, self.b, self.order = nn.Linear(8, 8), nn.Linear(8, 8), order

    def forward(self, x: Tensor) -> Tensor:
        y = sum(self.get_submodule(name)(x) for name in self.order)
        return self.a(y.tanh())


@pytest.mark.parametrize("order", ["ab", "ba"])
def test_layers_that_share_one_of_their_inputs_share_nothing(order):
    x = torch.randn(5, 8)
    model = calibrated(Again(order).eval(), [x])
    calls = {group.layers[0].module: group.calls for group in groups_of(model, Data([x]))}
    assert calls == {model.a: 2, model.b: 1}
