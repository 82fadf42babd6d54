"""Folders of torchao's tensors: what transformers and torchao make of them."""

import copy
import json

import pytest
import torch
import transformers
from cases import LOADERS, bert_case, run
from models import MODELS
from oracle import quiet
from safetensors import safe_open
from torch import nn

import quanttune as qt

pytest.importorskip("torchao", "0.18")
pytestmark = [quiet, pytest.mark.filterwarnings("ignore::FutureWarning")]
DYNAMIC = {"calibrator": "dynamic", "coverage": "linear_inputs"}


def by_token(layer: nn.Linear, x):
    """Return the product of torchao's codes in float64: steps of a token are absmax / 127.5."""
    rows = x.double().reshape(-1, x.shape[-1])
    step = (rows.abs().amax(1, keepdim=True) / 127.5).float().double()
    codes = (rows / step).round().clamp(-128, 127)
    weight = layer.weight.detach().double()
    scale = (weight.abs().amax(1) / 127).float().double()
    integers = codes @ (weight / scale[:, None]).round().T
    return (integers * step * scale + layer.bias.detach().double()).view(*x.shape[:-1], -1)


@pytest.mark.parametrize("weights", ["channel", "tensor"])
def test_a_file_is_loaded_by_torchao_alone(weights, tmp_path):
    from torchao.prototype.safetensors.safetensors_support import unflatten_tensor_state_dict

    torch.manual_seed(0)
    layer, x = nn.Linear(32, 16), torch.randn(2, 7, 32)
    x[..., 0] = 5.0  # the largest, 127.5 steps: clamped, where -127.5 is a tie
    model = qt.quantize(nn.Sequential(copy.deepcopy(layer)), weights=weights, **DYNAMIC)
    qt.export_torchao(model, tmp_path / "out")
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["model.safetensors"]
    with safe_open(tmp_path / "out" / "model.safetensors", "pt") as file:
        metadata = file.metadata()
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 no mapping
    state, left = unflatten_tensor_state_dict(tensors, metadata)
    plain = nn.Sequential(nn.Linear(32, 16))
    plain.load_state_dict({**state, **left}, assign=True)
    codes = plain[0].weight.qdata
    assert codes.dtype == torch.int8
    rounded = model[0].weight_quantizer(model[0].weight)
    torch.testing.assert_close(plain[0].weight.dequantize(), rounded.detach())
    if weights == "channel":
        torch.testing.assert_close(plain(x).double(), by_token(layer, x), rtol=1e-5, atol=1e-5)
    exact = layer(x)
    assert (plain(x) - exact).norm() < 0.02 * exact.norm()


@pytest.mark.parametrize("name", ["bert", "opt"])
def test_what_transformers_loads_runs_on_integers_and_is_as_near(name, tmp_path):
    example = MODELS[name](2)
    example.model.eval()
    for parameter in example.model.parameters():
        if parameter.dim() > 1:
            nn.init.normal_(parameter, 0, parameter.shape[-1] ** -0.5)
    exact = example.logits()
    overrides = {"lm_head": None} if name == "opt" else None
    model = qt.quantize(copy.deepcopy(example.model), overrides=overrides, **DYNAMIC)
    qt.export_torchao(model, tmp_path / "out")
    config = json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]
    assert config["modules_to_not_convert"] == (["lm_head"] if name == "opt" else [])
    again = type(example.model).from_pretrained(tmp_path / "out").eval()
    held = {n for n, m in again.named_modules() if type(m) is nn.Linear and _is_int8(m.weight)}
    assert held == {n for n, m in example.model.named_modules() if type(m) is nn.Linear} - (
        {"lm_head"} if name == "opt" else set()
    )
    found, simulated = example.logits(again), example.logits(model)
    assert (found - simulated).norm() < 0.03 * exact.norm()  # a token's steps, for a tensor's
    assert (found - exact).norm() < 1.2 * (simulated - exact).norm()


def _is_int8(weight):
    return type(weight).__name__ == "Int8Tensor"


def test_codes_that_a_method_chose_are_kept(tmp_path):
    example = MODELS["bert"]()
    model = qt.quantize(
        example.model.eval(), methods=["gptq"], data=[example.inputs], weight_bits=8, **DYNAMIC
    )
    qt.export_torchao(model, tmp_path / "out")
    again = type(example.model).from_pretrained(tmp_path / "out")
    for name, module in again.named_modules():
        if type(module) is nn.Linear:
            torch.testing.assert_close(
                module.weight.dequantize(), model.get_parameter(f"{name}.weight")
            )


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"calibrator": "minmax"}, "takes no range from each tensor, as torchao does"),
        ({"coverage": "weight_only"}, "takes no range from each tensor, as torchao does"),
        ({"bits": 6}, "has 6 bits: torchao's tensors have the inputs and weights of Linear"),
        ({"coverage": "linear"}, "coverage must be .linear_inputs., got 'linear'"),
        ({"methods": ["llm_int8"]}, "llm_int8 rounds .* to a outlier_columns grid"),
        ({"weights": 8}, "has groups of weights: quantize with"),
        ({"overrides": {"*.query.input_quantizer": None}}, "stays in float, not the other operand"),
    ],
)
def test_what_is_refused(options, message, tmp_path):
    example = MODELS["bert"]()
    options = {**DYNAMIC, **options}
    model = qt.quantize(example.model.eval(), data=[example.inputs], **options)
    with pytest.raises(ValueError, match=message):
        qt.export_torchao(model, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_folder_that_holds_something_is_refused(tmp_path):
    model = qt.quantize(nn.Sequential(nn.Linear(8, 8)), **DYNAMIC)
    (tmp_path / "a").touch()
    with pytest.raises(FileExistsError, match="holds something already"):
        qt.export_torchao(model, tmp_path)


def test_the_command_line(tmp_path):
    *_, batch = bert_case(tmp_path)
    inputs = {name: x for name, x in batch.items() if name != "labels"}
    loader = getattr(transformers, LOADERS[bert_case])
    model = qt.quantize(loader.from_pretrained(tmp_path / "model").eval(), **DYNAMIC)
    model.save_pretrained(tmp_path / "model")
    run("export", tmp_path / "model", "--out", tmp_path / "served", "--format", "torchao")
    served = loader.from_pretrained(tmp_path / "served").eval()
    torch.testing.assert_close(
        served(**inputs).logits, model(**inputs).logits, rtol=0.05, atol=0.01
    )
    assert transformers.AutoTokenizer.from_pretrained(tmp_path / "served")("one two")["input_ids"]
