"""Fisher information of layers against per-sample Jacobians of the float model, in float64."""

import pytest
import torch
from equalized import rounded_names
from models import MODELS
from torch import Tensor, nn
from torch.func import functional_call, jacrev

import quanttune as qt
from quanttune.quantization.methods import GPTQ
from quanttune.quantization.methods.rounding.fisher import fishers_of
from quanttune.quantization.methods.rounding.layers import layers_of
from quanttune.quantization.running import Data


class Shared(nn.Module):
    """Calls one layer twice, changes what it returns in place, and answers with one number."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.again = nn.Linear(5, 6), nn.Linear(6, 6, bias=False)
        self.last, self.unused = nn.Linear(6, 1), nn.Linear(6, 2)

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        x *= 2
        x = self.again(torch.tanh(x))
        return self.last(torch.tanh(self.again(x)).mean(1)) + 0 * self.unused(x).sum()


def quantized(model: nn.Module, x: Tensor, **options) -> nn.Module:
    """Return a model whose inputs' grids are so fine that rounding hardly changes them."""
    model.requires_grad_(False).eval()
    return qt.quantize(model, 16, coverage="linear", data=x.split(2), **options)


def jacobians(model: nn.Module, name: str, x: Tensor) -> Tensor:
    """Return d answer / d weight of each sample: (samples, outputs, rows, columns)."""
    weight = model.get_parameter(f"{name}.weight").detach()
    found = [
        jacrev(lambda w, x=sample: functional_call(model, {f"{name}.weight": w}, (x,))[0])(weight)
        for sample in x.split(1)
    ]
    return torch.stack(found).detach()


@pytest.mark.parametrize("batch", [1, 3, 7])
def test_equals_the_gradients_of_each_sample(batch):
    model, x = Shared().double(), torch.randn(7, 4, 5, dtype=torch.float64)
    expected = {}
    for name in ("first", "again", "last", "unused"):
        (gradients,) = jacobians(model, name, x).unbind(1)  # of one answer, whose sign is squared
        expected[name] = torch.einsum("bri,brj->ij", gradients, gradients)
    model = quantized(model, x)
    layers = layers_of(model)
    found = fishers_of(model, layers, Data(x.split(batch)))
    for layer, (name, wanted), fisher in zip(layers, expected.items(), found, strict=True):
        assert layer.module is model.get_submodule(name)
        torch.testing.assert_close(fisher, wanted, rtol=1e-3, atol=1e-4 * wanted.abs().max())
    assert expected["again"].any()
    assert not found[-1].any()
    assert all(not p.requires_grad and p.grad is None for p in model.parameters())


def test_is_on_average_that_of_a_gaussian_around_the_answer():
    torch.manual_seed(3)
    model = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3)).double()
    x = torch.randn(2, 4, dtype=torch.float64)
    gradients = jacobians(model, "0", x)
    expected = torch.einsum("bori,borj->ij", gradients, gradients)
    model = quantized(model, x)
    times = 1000
    (found,) = fishers_of(model, layers_of(model)[:1], Data(times * [x]))
    torch.testing.assert_close(found / times, expected, rtol=0, atol=0.06 * expected.abs().max())


def test_what_a_layer_multiplies_is_rounded():
    model, x = nn.Sequential(nn.Linear(4, 1)).requires_grad_(False), torch.randn(9, 4)
    model = qt.quantize(model, 3, coverage="linear", data=[x])
    rounded = model[0].input_quantizer(x).double()
    (found,) = fishers_of(model, layers_of(model), Data([x]))
    torch.testing.assert_close(found, rounded.T @ rounded, rtol=1e-9, atol=0)


def test_tokens_that_are_padding_give_nothing():
    example = MODELS["bert"]()
    model, words = example.model.bert.eval(), example.inputs
    mask = torch.ones_like(words)
    mask[:, -2:] = 0
    data = [{"input_ids": words, "attention_mask": mask}]
    qt.quantize(model, 8, coverage="linear", data=data)
    layers = layers_of(model)
    found = fishers_of(model, layers, Data(data))
    other = [{"input_ids": words.masked_fill(mask == 0, 3), "attention_mask": mask}]
    again = fishers_of(model, layers, Data(other))
    assert all(
        a.any() == ("pooler" not in name)
        for name, a in zip(rounded_names(model), found, strict=True)
    )
    for one, two in zip(found, again, strict=True):
        torch.testing.assert_close(one, two, rtol=1e-3, atol=1e-6 * one.abs().max().item())


@pytest.mark.parametrize("name", MODELS)
def test_the_model_changes_less_than_by_rounding_to_nearest(name):
    example = MODELS[name]()
    example.model.eval()
    exact = example.logits()
    errors = []
    for methods in ([GPTQ(hessian="fisher")], []):
        again = MODELS[name]().model.eval()
        again.load_state_dict(example.model.state_dict())
        options = {"weight_bits": 3, "coverage": "linear", "data": example.inputs.split(3)}
        model = qt.quantize(again, 16, methods=methods, **options)
        errors.append((example.logits(model) - exact).square().sum().item())
    assert errors[0] < errors[1]


def test_a_layer_that_the_answer_does_not_need_is_rounded_to_nearest():
    model, x = Shared(), torch.randn(8, 4, 5)
    weight = model.unused.weight.detach().clone()
    model = quantized(model, x, weight_bits=4, methods=[GPTQ(hessian="fisher")])
    nearest = nn.Sequential(nn.Linear(6, 2))
    nearest[0].weight.data = weight
    expected = quantized(nearest, torch.randn(2, 6), weight_bits=4)[0]
    assert torch.equal(model.unused.weight, expected.weight_quantizer(expected.weight))


def test_an_answer_without_gradient_is_refused():
    class Silent(Shared):
        @torch.no_grad()
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x)

    with pytest.raises(ValueError, match="has no gradient: does it compute under no_grad"):
        quantized(Silent(), torch.randn(2, 4, 5), methods=[GPTQ(hessian="fisher")])


def test_an_unknown_hessian_is_refused():
    with pytest.raises(ValueError, match="hessian must be inputs or fisher, got 'labels'"):
        GPTQ(hessian="labels")
