"""Bias correction: mean outputs become those of the float model, whatever was rounded before."""

import copy

import pytest
import torch
from equalized import EXAMPLES, rounded_names
from torch import nn

import quanttune as qt
from quanttune.quantization.running import forward_batches
from quanttune.quantization.state import weight_quantizers


def means_of(model: nn.Module, names: list[str], data, keep=lambda x: x) -> dict[str, torch.Tensor]:
    """Return the mean output of modules over all tokens that are kept."""
    seen: dict[str, list[torch.Tensor]] = {name: [] for name in names}
    hooks = [
        model.get_submodule(name).register_forward_hook(
            lambda _, __, y, name=name: seen[name].append(keep(y).flatten(0, -2).double())
        )
        for name in names
    ]
    forward_batches(model, data, None)
    for hook in hooks:
        hook.remove()
    return {name: torch.cat(rows).mean(0) for name, rows in seen.items() if rows}


@pytest.mark.parametrize("name", EXAMPLES)
def test_mean_outputs_are_those_of_the_float_model(name):
    example = EXAMPLES[name]()
    model, data = example.model.eval(), example.inputs.split(3)
    options = {"weight_bits": 3, "coverage": "linear", "data": data}
    ours = qt.quantize(copy.deepcopy(model), 4, methods=["bias_correction"], **options)
    nearest = qt.quantize(copy.deepcopy(model), 4, **options)
    names = [n for n in rounded_names(ours) if ours.get_submodule(n).bias is not None]
    wanted, found, before = (means_of(m, names, data) for m in (model, ours, nearest))
    assert len(wanted) >= 8
    for name, mean in wanted.items():
        torch.testing.assert_close(
            found[name], mean, rtol=1e-5, atol=1e-6 * mean.abs().max().item()
        )
        assert (before[name] - mean).abs().max() > 1e-3 * mean.abs().max()
    quantizers = weight_quantizers(nearest)
    for name, (module, quantizer) in weight_quantizers(ours).items():
        expected = quantizers[name][1](nearest.get_submodule(name.rpartition(".")[0]).weight)
        assert torch.equal(quantizer(module.weight), expected)


def test_padding_takes_no_part():
    example = EXAMPLES["bert"]()
    mask = torch.ones_like(example.inputs)
    mask[1:, -3:] = 0
    data = [{"input_ids": example.inputs, "attention_mask": mask}]
    model = example.model.eval()
    options = {"weight_bits": 3, "coverage": "linear", "data": data}
    ours = qt.quantize(copy.deepcopy(model), 4, methods=["bias_correction"], **options)
    names = [name for name in rounded_names(ours) if "encoder" in name]
    wanted, found = (means_of(m, names, data, lambda y: y[mask > 0]) for m in (model, ours))
    for name, mean in wanted.items():
        torch.testing.assert_close(
            found[name], mean, rtol=1e-5, atol=1e-6 * mean.abs().max().item()
        )


def test_it_composes_with_an_equalization():
    example = EXAMPLES["opt"]()
    data = example.inputs.split(3)
    exact = example.logits().detach()
    errors = []
    for methods in (["aweq"], ["aweq", "bias_correction"]):
        model = copy.deepcopy(example.model.eval())
        qt.quantize(model, 8, weight_bits=3, coverage="linear", methods=methods, data=data)
        errors.append((example.logits(model) - exact).mean((0, 1)).norm())
    assert errors[1] < errors[0]


def test_layers_without_a_bias_are_told():
    x = torch.randn(6, 8, generator=torch.Generator().manual_seed(0))
    bare = nn.Sequential(nn.Linear(8, 8, bias=False), nn.ReLU(), nn.Linear(8, 4, bias=False))
    before = copy.deepcopy(bare.state_dict())
    with pytest.raises(ValueError, match="none of 2 Linear modules has a bias"):
        qt.quantize(bare, 4, methods=["bias_correction"], data=[x])
    assert all(torch.equal(before[name], tensor) for name, tensor in bare.state_dict().items())
    bare.insert(0, nn.Linear(8, 8))
    with pytest.warns(UserWarning, match="leaves 2 of 3 Linear modules as they are"):
        qt.quantize(bare, 4, methods=["bias_correction"], data=[x])
