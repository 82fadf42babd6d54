"""Experts in 3-D parameters: rounded per expert and output channel, whoever multiplies."""

import copy
import pickle

import pytest
import torch
import transformers
from torch import nn

import quanttune as qt
from quanttune.fake_quantizer import integer_range
from quanttune.quantization.float_parameters import float_parameters
from quanttune.quantization.running import in_float
from quanttune.quantization.state import weight_quantizers

SIZES = {
    "vocab_size": 40,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "max_position_embeddings": 16,
    "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2}
FOUR = {"num_local_experts": 4, "num_experts_per_tok": 2}
MODELS = {
    "Mixtral": FOUR,
    "Qwen3Moe": {**EXPERTS, "moe_intermediate_size": 8, "head_dim": 8},
    "GptOss": {**FOUR, "head_dim": 8},
    "Olmoe": EXPERTS,
    "GraniteMoe": FOUR,
    "JetMoe": {**FOUR, "kv_channels": 8, "num_key_value_heads": 2},
    "Llama4": {**FOUR, "num_experts_per_tok": 1, "head_dim": 8, "intermediate_size_mlp": 24},
}
TRANSPOSED = ("GptOss", "Llama4")  # experts of (inputs, outputs)


def moe(name="Mixtral", implementation="eager"):
    """Return a model whose experts have weights that matter, and a batch."""
    suffix = "TextConfig" if name == "Llama4" else "Config"
    config = getattr(transformers, f"{name}{suffix}")(**SIZES | MODELS[name])
    config._experts_implementation = implementation
    model = getattr(transformers, f"{name}ForCausalLM")(config).eval()
    for parameter in model.parameters():
        nn.init.normal_(parameter, 0, parameter.shape[-1] ** -0.5)
    return model, {"input_ids": torch.randint(3, 40, (2, 6)), "use_cache": False}


def stacks(model):
    return {name: p for name, p in model.named_parameters() if p.dim() == 3}


def rounded(parameter, bits, axes):
    """Round to min-max grids, in float64: a scale for what is left when `axes` are reduced."""
    qmin, qmax = integer_range(bits)
    step = (parameter.abs().amax(axes, keepdim=True).float() / qmax).double()
    return (parameter.double() / step).round().clamp(qmin, qmax) * step


def round_weights_only(model):
    for _, quantizer in weight_quantizers(model).values():
        quantizer.enabled = True


@pytest.mark.parametrize("weights", ["channel", "tensor"])
@pytest.mark.parametrize("name", MODELS)
def test_each_expert_and_output_has_its_scale(name, weights):
    model, batch = moe(name)
    expected = copy.deepcopy(model)
    qt.quantize(model, weight_bits=4, weights=weights, data=[batch])
    for parameter, value in stacks(expected).items():
        inputs = 1 if name in TRANSPOSED else 2
        axes = inputs if weights == "channel" else (0, 1, 2)
        value.data = rounded(value.data, 4, axes).float()
        assert f"{parameter}_quantizer" in weight_quantizers(model)
    for site, (holder, quantizer) in weight_quantizers(model).items():  # what is not 3-D
        if holder.weight.dim() == 2:
            with torch.no_grad():
                name_of = site.removesuffix("_quantizer")
                expected.get_parameter(name_of).copy_(quantizer(holder.weight))
    with in_float(model):
        round_weights_only(model)
        given = model(**batch).logits
    torch.testing.assert_close(given, expected(**batch).logits, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", ["Mixtral", "GptOss"])
def test_every_implementation_reads_the_same_numbers(name):
    answers = []
    for implementation in ("eager", "batched_mm", "grouped_mm"):
        torch.manual_seed(0)
        model, batch = moe(name, implementation)
        qt.quantize(model, weight_bits=3, data=[batch])
        with in_float(model):
            round_weights_only(model)
            answers.append(model(**batch).logits)
    torch.testing.assert_close(answers[1], answers[0])
    torch.testing.assert_close(answers[2], answers[0])


def test_its_parameters_are_those_of_the_model_elsewhere():
    model, batch = moe()
    experts = model.model.layers[0].mlp.experts
    parameter, names = experts.gate_up_proj, set(model.state_dict())
    qt.quantize(model, data=[batch])
    assert experts.gate_up_proj is parameter
    assert {name for name in model.state_dict() if "quantizer" not in name} == names
    assert isinstance(experts, type(moe()[0].model.layers[0].mlp.experts))
    with pytest.raises(TypeError):
        experts(None, None, None)
    assert experts.gate_up_proj is parameter


def test_gradients_pass_straight_through():
    model, batch = moe()
    reference = copy.deepcopy(model)
    qt.quantize(model, weight_bits=4, data=[batch])
    for parameter in stacks(reference).values():
        parameter.data = rounded(parameter.data, 4, 2).float()
    for site, (holder, quantizer) in weight_quantizers(model).items():
        if holder.weight.dim() == 2:
            with torch.no_grad():
                name = site.removesuffix("_quantizer")
                reference.get_parameter(name).copy_(quantizer(holder.weight))
    reference(**batch).logits.square().mean().backward()
    with in_float(model):
        round_weights_only(model)
        model(**batch).logits.square().mean().backward()
    for name, parameter in stacks(model).items():
        expected = reference.get_parameter(name).grad
        assert expected.abs().max() > 1e-6
        torch.testing.assert_close(parameter.grad, expected, rtol=1e-3, atol=1e-7)


@pytest.mark.parametrize("name", ["Mixtral", "GptOss", "JetMoe"])
@pytest.mark.parametrize("learned", [False, True])
def test_files_give_the_same_bits(name, learned, tmp_path):
    model, batch = moe(name)
    qt.quantize(model, weight_bits=4, data=[batch])
    if learned:
        for scale in qt.learn_scales(model):
            scale.data *= 1.01
    expected = model(**batch).logits
    qt.save(model, tmp_path / "model.safetensors")
    loaded = qt.load(moe(name)[0], tmp_path / "model.safetensors")
    assert torch.equal(loaded(**batch).logits, expected)
    loaded.save_pretrained(tmp_path / "folder")
    again = type(model).from_pretrained(tmp_path / "folder", experts_implementation="eager")
    assert torch.equal(again(**batch).logits, expected)
    assert torch.equal(pickle.loads(pickle.dumps(model))(**batch).logits, expected)
    assert torch.equal(copy.deepcopy(model)(**batch).logits, expected)


@pytest.mark.parametrize("name", ["Mixtral", "GptOss"])
def test_scales_of_experts_are_learned(name):
    model, batch = moe(name)
    qt.quantize(model, weight_bits=4, data=[batch])
    before = model(**batch).logits
    qt.learn_scales(model)
    quantizer = model.model.layers[0].mlp.experts.gate_up_proj_quantizer
    assert quantizer.factor.shape == (4 * 48,)
    torch.testing.assert_close(model(**batch).logits, before)
    model(**batch).logits.square().mean().backward()
    assert quantizer.factor.grad.abs().max() > 0
    qt.freeze_scales(model)
    torch.testing.assert_close(model(**batch).logits, before)


def test_overrides_reach_parameters():
    model, batch = moe()
    overrides = {"*.gate_up_proj_quantizer": {"bits": 3}, "*.down_proj_quantizer": None}
    qt.quantize(model, overrides=overrides, data=[batch])
    sites = {site.name: site for site in qt.summary(model).sites}
    assert sites["model.layers.0.mlp.experts.gate_up_proj_quantizer"].bits == 3
    assert "model.layers.0.mlp.experts.down_proj_quantizer" not in sites
    reasons = float_parameters(model)
    assert reasons == {"model.layers.0.mlp.experts.down_proj": "an override leaves it in float"}


def test_experts_are_exported_as_integers(tmp_path):
    import onnx

    model, batch = moe("Mixtral", "batched_mm")
    qt.quantize(model, data=[batch])
    example = {"input_ids": batch["input_ids"]}
    qt.export_onnx(model, example, tmp_path / "m.onnx", dynamic={0: "batch"})
    sizes = {
        i.name: tuple(i.dims)
        for i in onnx.load(tmp_path / "m.onnx").graph.initializer
        if i.data_type == onnx.TensorProto.UINT8
    }
    assert {(4 * 48, 16), (4 * 16, 24)} <= set(sizes.values())
    import onnxruntime

    session = onnxruntime.InferenceSession(tmp_path / "m.onnx")
    answer = session.run(None, {"input_ids": example["input_ids"].numpy()})[0]
    expected = model(**batch).logits.detach()
    # where a code differs by one the router may choose another expert, for that token
    error = (torch.from_numpy(answer) - expected).abs().amax(-1)
    assert (error < 0.05 * expected.abs().max()).float().mean() > 0.6


class Mixture(nn.Module):
    """Experts of a user: the layout is that of Linear unless `is_transposed` says otherwise."""

    def __init__(self, transposed):
        super().__init__()
        self.n_experts, self.is_transposed = 3, transposed
        self.weight = nn.Parameter(torch.randn(3, *((4, 6) if transposed else (6, 4))))
        self.position = nn.Parameter(torch.randn(1, 5, 4))  # one, so no stack of theirs

    def forward(self, x):
        weight = self.weight if self.is_transposed else self.weight.mT
        return torch.stack([(x + self.position) @ one for one in weight]).sum(0)


@pytest.mark.parametrize("transposed", [False, True])
def test_experts_of_a_user(transposed):
    model, x = nn.Sequential(nn.Linear(4, 4), Mixture(transposed)).eval(), torch.randn(2, 5, 4)
    expected = copy.deepcopy(model)
    expected[1].weight.data = rounded(model[1].weight.data, 3, 1 if transposed else 2).float()
    qt.quantize(model, weight_bits=3, overrides={"0": None}, data=[x])
    assert list(weight_quantizers(model)) == ["1.weight_quantizer"]
    with in_float(model):
        round_weights_only(model)
        torch.testing.assert_close(model(x), expected(x))


def test_methods_leave_experts_to_nearest_rounding():
    model, batch = moe()
    before = {name: p.detach().clone() for name, p in stacks(model).items()}
    qt.quantize(model, weight_bits=4, methods=["gptq"], data=[batch])
    for name, parameter in stacks(model).items():
        assert torch.equal(parameter, before[name])
