"""Rotations in the weights: models compute what they did, and outliers are gone."""

import copy
import warnings

import pytest
import torch
from models import Example, bert, deit, gpt2, opt, swin, vit
from oracle import assert_same_bits, quiet
from timm.layers import LayerNorm2d
from torch import nn
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

import quanttune as qt
import quanttune.quantization.pretrained  # from_pretrained loads what was saved
from quanttune.quantization.methods import Rotate
from quanttune.quantization.methods.rotating.matrices import rotation
from quanttune.quantization.running import Data
from quanttune.quantization.scheme import Scheme


def llama(blocks: int = 2, attention: str = "sdpa") -> Example:
    """Return a Llama with grouped queries, whose head is tied to the embeddings."""
    config = LlamaConfig(
        vocab_size=60, hidden_size=36, intermediate_size=40, num_hidden_layers=blocks,
        num_attention_heads=6, num_key_value_heads=2, head_dim=8, tie_word_embeddings=True,
        bos_token_id=1, eos_token_id=2, attn_implementation=attention,
    )  # fmt: skip
    words = torch.randint(60, (4, 7))
    return Example(LlamaForCausalLM(config), words, words.roll(-1, 1), ("lm_head",))


MODELS = {
    "llama": llama,
    "llama eager": lambda: llama(attention="eager"),
    "opt": lambda: opt(2),
    "gpt2": lambda: gpt2(2),
    "vit": lambda: vit(2),
    "deit": lambda: deit(2),
}


def prepared(name: str) -> Example:
    """Return an example in float64 whose norms have gains, and whose biases are not zero."""
    torch.manual_seed(0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        example = MODELS[name]()
    example.model.double().eval()
    if example.inputs.is_floating_point():
        example.inputs = example.inputs.double()
    for parameter in example.model.parameters():
        if parameter.dim() == 1:
            parameter.data += 0.3 * torch.randn_like(parameter)
    return example


def rotated(example: Example, **options) -> nn.Module:
    model = copy.deepcopy(example.model)
    Rotate(**options).apply(model, Scheme(8), Data([example.inputs]))
    return model


def answers(example: Example, model: nn.Module):
    with torch.no_grad():
        return example.logits(model)


@pytest.mark.parametrize("keeps_mean", [False, True])
@pytest.mark.parametrize("size", [1, 2, 7, 24, 36, 64, 576])
def test_rotations_are_orthogonal_and_flat(size, keeps_mean):
    matrix = rotation(size, 0, keeps_mean)
    eye = torch.eye(size, dtype=torch.float64)
    torch.testing.assert_close(matrix @ matrix.T, eye, rtol=0, atol=1e-12)
    assert matrix.abs().max() <= (5 if keeps_mean else 2**0.5 + 1e-9) / size**0.5
    if keeps_mean:
        torch.testing.assert_close(matrix.sum(0), torch.ones_like(eye[0]), rtol=0, atol=1e-12)
    if size > 7:
        assert not torch.equal(matrix, rotation(size, 1, keeps_mean))


@pytest.mark.parametrize("name", MODELS)
def test_outputs_stay_and_weights_do_not(name):
    example = prepared(name)
    expected = answers(example, example.model)
    model = rotated(example)
    # Llama's norms compute in float32, whatever they are given
    tolerance = 1e-6 if "llama" in name else 1e-12
    found = answers(example, model)
    assert (found - expected).norm() <= tolerance * expected.norm()
    before = dict(example.model.named_parameters(remove_duplicate=False))
    same = [
        n for n, p in model.named_parameters(remove_duplicate=False) if torch.equal(p, before[n])
    ]
    # what writes nothing into the stream and reads nothing of it: biases of q, k, fc1 get a norm's
    assert all(n.endswith("bias") for n in same), same
    again = rotated(example)
    assert_same_bits(again.state_dict(), model.state_dict())
    other = rotated(example, seed=1)
    assert not torch.equal(next(other.parameters()), next(model.parameters()))


def inputs_of(example: Example, model: nn.Module, name: str) -> torch.Tensor:
    seen = []
    hook = model.get_submodule(name).register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    answers(example, model)
    hook.remove()
    return seen[0].detach().flatten(0, -2).double()


def rotation_between(before: torch.Tensor, after: torch.Tensor) -> torch.Tensor:
    """Return the matrix that makes rows of the one to rows of the other, which must be exact."""
    matrix = torch.linalg.lstsq(before, after).solution
    torch.testing.assert_close(before @ matrix, after, rtol=0, atol=1e-5)
    return matrix


def test_the_stream_of_every_layer_is_turned_by_one_matrix_and_each_value_head_by_its_own():
    example = prepared("llama")
    model = rotated(example)
    tables = [m.get_input_embeddings().weight.detach() for m in (example.model, model)]
    matrix = rotation_between(*tables)
    eye = torch.eye(36, dtype=torch.float64)
    torch.testing.assert_close(matrix @ matrix.T, eye, rtol=0, atol=1e-9)
    for norm in (
        "model.layers.0.post_attention_layernorm",
        "model.layers.1.input_layernorm",
        "model.norm",
    ):
        before, after = (inputs_of(example, m, norm) for m in (example.model, model))
        torch.testing.assert_close(before @ matrix, after, rtol=0, atol=1e-5)
        assert (model.get_submodule(norm).weight == 1).all()
    reader = "model.layers.1.self_attn.o_proj"
    before, after = (inputs_of(example, m, reader) for m in (example.model, model))
    heads = [rotation_between(before[:, i : i + 8], after[:, i : i + 8]) for i in range(0, 48, 8)]
    for i, head in enumerate(heads):  # three queries' heads share one of the values
        torch.testing.assert_close(
            head @ head.T, torch.eye(8, dtype=torch.float64), rtol=0, atol=1e-4
        )
        torch.testing.assert_close(head, heads[i // 3 * 3], rtol=0, atol=1e-4)
        assert (head - torch.eye(8)).abs().max() > 0.1
    assert (heads[0] - heads[3]).abs().max() > 0.1


@pytest.mark.parametrize(
    ("name", "reader"), [("gpt2", "transformer.h.1.attn.c_proj"), ("vit", "blocks.1.attn.proj")]
)
def test_values_are_turned_inside_a_projection_that_queries_and_keys_share(name, reader):
    example = prepared(name)
    before, after = (inputs_of(example, m, reader) for m in (example.model, rotated(example)))
    for i in (0, 12):
        head = rotation_between(before[:, i : i + 12], after[:, i : i + 12])
        eye = torch.eye(12, dtype=torch.float64)
        torch.testing.assert_close(head @ head.T, eye, rtol=0, atol=1e-6)
        assert (head - eye).abs().max() > 0.1


def planted(name: str) -> Example:
    """Return an example in float32 whose stream has a channel some 60 times as large as others."""
    example = prepared(name)
    example.model.float()
    if example.inputs.is_floating_point():
        example.inputs = example.inputs.float()
    table, size = {"llama": ("model.embed_tokens.weight", 1.2), "vit": ("pos_embed", 60)}[name]
    example.model.get_parameter(table).data[..., 5] = size
    return example


@pytest.mark.parametrize(
    ("name", "norm"), [("llama", "model.layers.1.input_layernorm"), ("vit", "blocks.1.norm1")]
)
def test_a_channel_of_outliers_costs_less(name, norm):
    example = planted(name)

    def error(model: nn.Module) -> float:
        """Return the norm of what rounding to one grid changes; a rotation keeps norms."""
        x = inputs_of(example, model, norm)
        step = x.abs().max() / 127
        return ((x / step).round() * step - x).norm().item()

    assert error(rotated(example)) < 0.6 * error(example.model)


@pytest.mark.parametrize("make", [bert, swin])
def test_models_that_do_not_fit_are_refused_by_name_and_left_alone(make):
    torch.manual_seed(0)
    example = make()
    before = copy.deepcopy(example.model.state_dict())
    with pytest.raises(
        ValueError, match=r"has no residual stream that can be rotated: that of .*orm"
    ):
        qt.quantize(example.model, methods=["rotate"], data=[example.inputs])
    assert_same_bits(example.model.state_dict(), before)
    assert type(example.model.get_submodule(example.heads[0])) is nn.Linear


class PreNorm(nn.Module):
    """A pre-norm block, with something between the stream and its last norm."""

    def __init__(self, between=lambda x: x) -> None:
        super().__init__()
        self.embed = nn.Embedding(20, 8)
        self.norm = nn.LayerNorm(8)
        self.block = nn.Linear(8, 8)
        self.last = nn.LayerNorm(8)
        self.head = nn.Linear(8, 3, bias=False)
        self.between = between

    def forward(self, ids):
        x = self.embed(ids)
        x = x + torch.tanh(self.block(self.norm(x)))
        return self.head(self.last(self.between(x)))


class Scaled(PreNorm):
    def forward(self, ids):
        x = self.embed(ids)
        x = x + self.block(self.norm(x))
        return self.head(self.last(self.between(x)))


def mixed(x):
    """Mix the tokens of each half of the channels in its own way."""
    heads = x.unflatten(-1, (2, 4)).transpose(1, 2)
    queries, keys = torch.arange(80.0).sin().view(2, 1, 2, 5, 4).expand(2, 4, 2, 5, 4)
    mixed = nn.functional.scaled_dot_product_attention(queries, keys, heads)
    return mixed.transpose(1, 2).flatten(-2)


IDS = torch.arange(20).view(4, 5)


@pytest.mark.parametrize(
    ("model", "message"),
    [
        (PreNorm(), "it goes into add in the model"),  # of a tanh
        (Scaled(torch.relu), "it goes into relu in the model"),
        (Scaled(lambda x: x * torch.rand(8)), "it goes into mul in the model"),
        (Scaled(lambda x: x.flip(-1)), "it goes into the input in last"),
        (Scaled(lambda x: x + torch.ones(5, 8)), "it goes into add in the model"),
        (Scaled(lambda x: x + torch.ones(5, 8).type_as(x)), "it goes into add in the model"),
        (Scaled(lambda x: torch.div(torch.ones(1), x)), "it goes into div in the model"),
        (Scaled(lambda x: torch.flatten(input=x, end_dim=1)), "it goes into flatten in the mod"),
        (Scaled(mixed), "attention mixes its tokens, and those of each head in its own way"),
    ],
)
def test_what_is_done_to_a_stream_is_named(model, message):
    with pytest.raises(ValueError, match=message):
        qt.quantize(model, methods=["rotate"], data=[IDS])


@pytest.mark.parametrize(
    "between",
    [
        lambda x: x * 3,
        lambda x: x[:, 1:],
        lambda x: x.mean(1),
        lambda x: x.view(x.new_ones(4, 5, 8).shape),
        lambda x: x.transpose(0, 1).contiguous().view(20, 8),
        lambda x: torch.div(x, 3),
    ],
)
def test_what_keeps_channels_apart_is_no_obstacle(between):
    model = Scaled(between).double()
    example = Example(model, IDS, IDS, ())
    expected = answers(example, model)
    assert (answers(example, rotated(example)) - expected).norm() <= 1e-12 * expected.norm()


def test_batches_that_change_from_pass_to_pass_are_no_obstacle():
    class Shuffled:
        def __iter__(self):
            return iter([IDS[torch.randperm(4)], IDS])

    model = Scaled()
    qt.quantize(model, methods=["rotate"], data=Shuffled())


def test_a_stream_that_cannot_be_rotated_is_told_of_where_another_is():
    class Two(Scaled):
        def __init__(self):
            super().__init__()
            self.other = nn.LayerNorm(8)
            self.maps = LayerNorm2d(8)  # normalizes channels that are not last

        def forward(self, ids):
            image = self.maps(torch.ones(1, 8, 4, 4)).sum()
            return super().forward(ids) + self.other(torch.ones(8) * ids[..., None]).sum() + image

    with pytest.warns(UserWarning, match="some streams are not rotated: that of other: what it"):
        qt.rotate(Two(), [IDS])


def test_a_bias_before_a_linear_without_one_is_rotated_unless_its_gain_is_zero():
    model = Scaled().double()
    model.last.bias.data.normal_()
    example = Example(model, IDS, IDS, ())
    expected = answers(example, model)
    found = rotated(example)
    assert found.norm.bias.abs().max() == 0
    assert found.last.bias.abs().max() > 0
    assert (answers(example, found) - expected).norm() <= 1e-12 * expected.norm()
    model.last.weight.data[3] = 0
    with pytest.raises(ValueError, match="last has a bias, and a weight near zero"):
        rotated(example)


def test_what_was_not_foreseen_is_noticed():
    class Hidden(Scaled):
        def forward(self, ids):
            unseen = torch.from_numpy(self.embed(ids).detach().numpy())
            return super().forward(ids) + unseen[..., :1].square()

    model = Hidden()
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(ValueError, match="rotating changed what the model computes by"):
        qt.quantize(model, methods=["rotate"], data=[IDS])
    assert_same_bits(model.state_dict(), before)


def test_a_kept_prefix_stays_true_before_and_behind_a_rotation():
    example = planted("llama")
    alone, values = copy.deepcopy(example.model), "model.layers.1.self_attn.v_proj"
    qt.prefix(example.model, [7, 3])
    expected = answers(example, example.model)
    turned = rotated(example)  # without its values: the cache has some that are not turned
    assert (answers(example, turned) - expected).norm() <= 1e-5 * expected.norm()
    first = qt.rotate(alone, [example.inputs])
    qt.prefix(first, [7, 3])
    assert (answers(example, first) - expected).norm() <= 1e-5 * expected.norm()
    assert not torch.allclose(
        first.get_submodule(values).weight, turned.get_submodule(values).weight, atol=1e-3
    )


@quiet
def test_a_float_model_can_be_rotated_before_it_is_tuned():
    example = planted("llama")
    expected = answers(example, example.model)
    by_method = rotated(example)
    model = qt.rotate(example.model, [example.inputs])
    assert model is example.model
    assert_same_bits(model.state_dict(), by_method.state_dict())
    assert (answers(example, model) - expected).norm() <= 1e-5 * expected.norm()
    model.train()
    qt.attach(model, total_steps=1).combine(example.task_loss()).backward()
    assert model.lm_head.weight.grad.isfinite().all()
    quantized = qt.quantize(copy.deepcopy(example.model), data=[example.inputs])
    with pytest.raises(ValueError, match="quantized already"):
        qt.rotate(quantized, [example.inputs])
    with pytest.raises(ValueError, match="data is empty"):
        qt.rotate(model, [])


def test_an_error_ties_the_head_again():
    example = planted("llama")
    model, before = example.model, copy.deepcopy(example.model.state_dict())
    with pytest.raises(ValueError, match="matches no quantizer"):
        qt.quantize(model, methods=["rotate"], data=[example.inputs], overrides={"nothing": None})
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert model.config.tie_word_embeddings
    assert_same_bits(model.state_dict(), before)


def test_an_untied_head_is_saved_and_loaded_both_ways(tmp_path):
    example = planted("llama")
    model = copy.deepcopy(example.model)
    qt.quantize(model, methods=["rotate"], data=[example.inputs])
    assert model.lm_head.weight is not model.model.embed_tokens.weight
    assert not model.config.tie_word_embeddings  # transformers would warn of it, and untie it
    qt.save(model, tmp_path / "model.safetensors")
    again = qt.load(llama().model.eval(), tmp_path / "model.safetensors")
    assert_same_bits(again.state_dict(), model.state_dict())
    assert not again.config.tie_word_embeddings
    model.save_pretrained(tmp_path / "folder")
    third = AutoModelForCausalLM.from_pretrained(tmp_path / "folder").eval()
    assert torch.equal(answers(example, third), answers(example, model))
    # a tied one is written once, and stays tied
    plain = qt.quantize(copy.deepcopy(example.model), data=[example.inputs])
    qt.save(plain, tmp_path / "tied.safetensors")
    tied = qt.load(llama().model.eval(), tmp_path / "tied.safetensors")
    assert tied.lm_head.weight is tied.model.embed_tokens.weight


def test_it_comes_before_other_methods_and_calibrators():
    example = planted("llama")
    for options in (
        {"methods": ["rotate", "smooth_inputs", "gptq"]},
        {"methods": ["rotate", "erq"]},
        {"methods": ["rotate"], "calibrator": "omse", "symmetric": False},
    ):
        model = qt.quantize(copy.deepcopy(example.model), data=[example.inputs], **options)
        assert answers(example, model).isfinite().all()


def test_a_rotated_model_is_exported_and_its_file_agrees(tmp_path):
    torch.manual_seed(0)
    example = opt(2)
    example.model.eval()
    model = qt.quantize(example.model, methods=["rotate"], data=[example.inputs])
    qt.export_onnx(model, example.inputs, tmp_path / "model.onnx")
    assert qt.verify(tmp_path / "model.onnx", model, [example.inputs]).passed
