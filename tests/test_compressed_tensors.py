"""Folders of compressed-tensors: what transformers and that library make of them."""

import copy
import json

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    BertConfig,
    BertForSequenceClassification,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    OPTConfig,
    OPTForCausalLM,
)

import quanttune as qt
from quanttune.deploy.compressed_formats import packed_codes

SIZES = {"vocab_size": 64, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
IDS = torch.arange(48).reshape(4, 12) * 5 % 61 + 3
LEFT = {"coverage": "linear_inputs", "data": [IDS]}
PACKED = {"coverage": "weight_only", "weights": 16}


def llama(**options):
    torch.manual_seed(0)
    config = {**SIZES, "intermediate_size": 48, "num_key_value_heads": 2, **options}
    return LlamaForCausalLM(LlamaConfig(**config)).eval()


def bert():
    torch.manual_seed(0)
    return BertForSequenceClassification(BertConfig(**SIZES, intermediate_size=48)).eval()


def opt():
    torch.manual_seed(0)
    config = {**SIZES, "word_embed_proj_dim": 32, "ffn_dim": 48, "max_position_embeddings": 16}
    return OPTForCausalLM(OPTConfig(**config)).eval()


def gpt2():
    return GPT2LMHeadModel(GPT2Config(**SIZES, bos_token_id=1, eos_token_id=2)).eval()


CASES = {
    "llama": (llama, AutoModelForCausalLM, {}),
    "rotated, smoothed": (llama, AutoModelForCausalLM, {"methods": ["rotate", "smoothquant"]}),
    "tied head": (
        lambda: llama(tie_word_embeddings=True),
        AutoModelForCausalLM,
        {"overrides": {"lm_head": None}},
    ),
    "weights per tensor": (llama, AutoModelForCausalLM, {"weights": "tensor"}),
    "bert, zero points": (bert, AutoModelForSequenceClassification, {"symmetric": False}),
    "opt, methods": (
        opt,
        AutoModelForCausalLM,
        {"methods": ["repq", "erq"], "overrides": {"lm_head": None}},
    ),
    "4 bits in groups": (llama, AutoModelForCausalLM, {**PACKED, "weight_bits": 4}),
    "3 bits in groups, gptq": (
        llama,
        AutoModelForCausalLM,
        {**PACKED, "weight_bits": 3, "methods": ["gptq"]},
    ),
    "4 bits, awq": (
        llama,
        AutoModelForCausalLM,
        {**PACKED, "weight_bits": 4, "methods": ["awq", "weight_clipping"]},
    ),
    "2 bits per tensor": (
        llama,
        AutoModelForCausalLM,
        {**PACKED, "weight_bits": 2, "weights": "tensor"},
    ),
    "5 bits per channel, others 8": (
        bert,
        AutoModelForSequenceClassification,
        {**PACKED, "weight_bits": 5, "weights": "channel", "overrides": {"*.key": {"bits": 8}}},
    ),
}


@torch.no_grad()
@pytest.mark.parametrize("name", CASES)
def test_transformers_computes_what_the_simulation_does(name, tmp_path):
    make, auto, options = CASES[name]
    model = qt.quantize(make(), 8, **{**LEFT, **options})
    before = {key: value.clone() for key, value in model.state_dict().items()}
    expected, floats = model(IDS).logits, make()(IDS).logits
    qt.export_compressed_tensors(model, tmp_path / "model")
    loaded, report = auto.from_pretrained(tmp_path / "model", output_loading_info=True)
    assert not any(report.values())
    actual = loaded.eval()(IDS).logits
    assert (actual - expected).norm() < 1e-3 * (actual - floats).norm()
    # the quantized model is what it was, its own configuration too
    assert all(torch.equal(before[key], value) for key, value in model.state_dict().items())
    assert model.config.quantization_config["quant_method"] == "quanttune"
    assert type(loaded).__name__ == type(model).__name__


def test_tensors_by_hand(tmp_path):
    model = llama()
    weight = model.model.layers[0].mlp.up_proj.weight.detach().numpy().copy()
    seen = []
    model.model.layers[0].mlp.up_proj.register_forward_pre_hook(lambda _, x: seen.append(x[0]))
    with torch.no_grad():
        model(IDS)
    qt.quantize(model, 8, **LEFT, overrides={"lm_head": None})
    qt.export_compressed_tensors(model, tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    stem = "model.layers.0.mlp.up_proj"
    scale = np.abs(weight).max(1, keepdims=True) / np.float32(127)
    np.testing.assert_array_equal(tensors[f"{stem}.weight_scale"].numpy(), scale)
    codes = np.clip(np.rint(weight / scale), -128, 127)
    np.testing.assert_array_equal(tensors[f"{stem}.weight"].numpy(), codes.astype(np.int8))
    torch.testing.assert_close(tensors[f"{stem}.input_scale"], seen[0].abs().max()[None] / 127)
    config = json.loads((tmp_path / "config.json").read_text())
    assert config["architectures"] == ["LlamaForCausalLM"]
    assert config["quantization_config"]["ignore"] == ["lm_head"]
    assert not [name for name in tensors if "quantizer" in name]


@pytest.mark.parametrize("bits", [2, 3, 4, 7, 8])
def test_packed_codes_are_the_digits_of_one_long_number(bits):
    codes = torch.randint(-(2 ** (bits - 1)), 2 ** (bits - 1), (3, 45)).to(torch.int8)
    packed = packed_codes(codes, bits)
    assert packed.dtype == torch.int32
    assert packed.shape == (3, -(-45 * bits // 32))
    for row, words in zip(codes.tolist(), packed.tolist(), strict=True):
        number = sum((code + 2 ** (bits - 1)) << (i * bits) for i, code in enumerate(row))
        assert sum((word % 2**32) << (32 * i) for i, word in enumerate(words)) == number


@pytest.mark.parametrize(
    ("make", "options", "message"),
    [
        (
            llama,
            {"coverage": "linear"},
            r"query_quantizer is rounded, .*coverage=\"linear_inputs\"",
        ),
        (llama, {"bits": 7}, "has 7 bits: the format has .* at 8 bits"),
        (llama, {"coverage": "weight_only", "weight_bits": 9}, "has 9 bits: .* at 2 to 8 bits"),
        (llama, {"overrides": {"*.up_proj.input*": None}}, "up_proj.input_quantizer stays in"),
        (llama, {"methods": ["smooth_inputs"]}, "a multiplication of channels, which the format"),
        (
            lambda: llama(tie_word_embeddings=True),
            {},
            r"lm_head shares .* overrides={'lm_head': No",
        ),
        (llama, {"calibrator": "dynamic"}, "quantize it with data"),
        (llama, {"overrides": {"*": None}}, "no Linear module of LlamaForCausalLM is rounded: the"),
        (gpt2, {"overrides": {"lm_head": None}}, "is rounded, and the format has"),
        (
            lambda: nn.Sequential(nn.Embedding(64, 8), nn.Linear(8, 8)),
            {},
            "one of transformers, got",
        ),
    ],
)
def test_what_the_format_cannot_say_is_refused(make, options, message, tmp_path):
    options = {**LEFT, **options}
    if options.get("calibrator") == "dynamic":
        options["data"] = None
    model = qt.quantize(make(), **options)
    with pytest.raises(ValueError, match=message):
        qt.export_compressed_tensors(model, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_what_calibration_did_not_reach_is_refused(tmp_path):
    model = llama()
    model.spare = nn.Linear(4, 4)
    with pytest.warns(UserWarning, match="spare"):
        qt.quantize(model, 8, **LEFT)
    with pytest.raises(
        ValueError, match=r"spare.input_quantizer was never reached .*'spare': None"
    ):
        qt.export_compressed_tensors(model, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_kept_prefix_is_refused(tmp_path):
    model = qt.quantize(qt.prefix(llama(), [1]), 8, **LEFT)
    with pytest.raises(ValueError, match="LlamaForCausalLM keeps a prefix, which the format"):
        qt.export_compressed_tensors(model, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_folder_that_holds_something_is_left_alone(tmp_path):
    (tmp_path / "notes.txt").write_text("mine")
    model = qt.quantize(copy.deepcopy(llama()), 8, **LEFT)
    with pytest.raises(FileExistsError, match="holds something already"):
        qt.export_compressed_tensors(model, tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["notes.txt"]
