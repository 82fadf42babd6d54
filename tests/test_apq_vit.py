"""APQ-ViT: what blocks return, beside their error by hand; unsigned codes; what is left out."""

import copy

import pytest
import torch
from models import gpt2, shallow, with_padding
from oracle import assert_same_bits
from torch import nn

import quanttune as qt
from quanttune.fake_quantizer import fake_quant
from quanttune.quantization.methods import METHODS, APQViT
from quanttune.quantization.methods.apq_vit import without_bottom
from quanttune.quantization.methods.searching.blocks import blocks_of
from quanttune.quantization.methods.searching.scale_search import searched_in
from quanttune.quantization.quantizer import ActivationQuantizer
from quanttune.quantization.running import Data
from quanttune.quantization.saving.description import describe
from quanttune.quantization.state import quantizers
from quanttune.quantization.value_grids import UnsignedQuantizer

FEW = APQViT(candidates=8)
PROBABILITIES = "blocks.0.attn.attention0_probability_quantizer"
BLOCKS = {
    "vit": ["blocks.0"],
    "bert": ["bert.encoder.layer.0"],
    "opt": ["model.decoder.layers.0"],
    "swin": ["layers.0.blocks.0", "layers.1.blocks.0"],
    "gpt2": ["transformer.h.0"],
}


def made(name):
    torch.manual_seed(0)
    return gpt2() if name == "gpt2" else shallow(name)


def quantized(name="vit", methods=(FEW,), **options):
    """Return an example, and its model quantized."""
    example = made(name)
    options = {"bits": 4, "coverage": "linear", **options}
    model = copy.deepcopy(example.model).eval()
    return example, qt.quantize(model, methods=methods, data=[example.inputs], **options)


# ------------------------------------------------------------------ what is searched


def test_the_smallest_gradients_count_for_nothing():
    gradient = torch.tensor([[4.0, -1.0], [0.5, -3.0]])
    assert without_bottom(gradient, 0.5).tolist() == [[4, 0], [0, -3]]
    assert without_bottom(gradient, 0.25).tolist() == [[4, -1], [0, -3]]
    assert torch.equal(without_bottom(gradient, 0.0), gradient)
    counted = torch.tensor([[True], [False]])  # the share is that of what is no padding
    assert without_bottom(gradient, 0.5, counted).tolist() == [[4, 0], [0, -3]]


@pytest.mark.parametrize("name", BLOCKS)
def test_blocks_are_found(name):
    example, model = quantized(name, methods=())
    searched = searched_in(model, Data([example.inputs]), "")
    blocks, others = blocks_of(model, searched)
    names = {module: name for name, module in model.named_modules()}
    assert [names[block.module] for block in blocks] == BLOCKS[name]
    assert sum(len(b.linears) + len(b.attentions) for b in blocks) + len(others) == len(searched)
    assert all(len(block.attentions) == 2 and len(block.linears) >= 4 for block in blocks)
    assert not any(names[layer.module].startswith(tuple(BLOCKS[name]))
                   for one in others for layer in one.layers)  # fmt: skip


def weighted_error(example, model, block, weigh, bottom):
    """Return what a block loses, given what the float model gives it, by hooks and autograd."""
    exact, seen = example.model.eval(), {}

    def keep(_, args, kwargs, output):
        output = output if isinstance(output, torch.Tensor) else output[0]
        output.retain_grad()
        seen.update(args=args, kwargs=kwargs, output=output)

    handle = exact.get_submodule(block).register_forward_hook(keep, with_kwargs=True)
    answer = exact(example.inputs)
    handle.remove()
    answer = answer if isinstance(answer, torch.Tensor) else answer.logits
    signs = torch.randint(0, 2, answer.shape, generator=torch.Generator().manual_seed(0)) * 2 - 1
    (answer * signs).sum().backward()
    with torch.no_grad():
        found = model.get_submodule(block)(*seen["args"], **seen["kwargs"])
    found = found if isinstance(found, torch.Tensor) else found[0]
    error = (found - seen["output"]).detach().double()
    if not weigh:
        return error.square().sum().item()
    gradient = seen["output"].grad.double()
    least = gradient.abs().flatten().sort().values[: int(bottom * gradient.numel())]
    gradient[gradient.abs() <= (least[-1] if len(least) else -1)] = 0
    return (gradient * error).square().sum().item()


@pytest.mark.parametrize("name", BLOCKS)
@pytest.mark.parametrize("metric", ["mse", "hessian"])
def test_no_block_is_worse_than_with_min_max_by_the_metric(metric, name):
    method = APQViT(candidates=8, metric=metric)
    coverage = "full" if name == "vit" else "linear"
    example, ours = quantized(name, [method], coverage=coverage)
    _, plain = quantized(name, (), coverage=coverage)
    for block in BLOCKS[name]:
        after, before = (
            weighted_error(example, model, block, metric == "hessian", method.bottom)
            for model in (ours, plain)
        )
        assert after < 0.95 * before


def test_the_signs_of_the_answer_are_those_of_the_search():
    """So that the test above weighs errors as the method does."""
    from quanttune.quantization.methods.rounding.fisher import signed_sum

    x = torch.randn(5, 7)
    signs = torch.randint(0, 2, x.shape, generator=torch.Generator().manual_seed(0)) * 2 - 1
    assert signed_sum(x, torch.Generator().manual_seed(0)).item() == pytest.approx(
        (x * signs).sum().item(), rel=1e-5
    )


def test_a_block_is_better_by_its_whole_error_than_product_by_product():
    """With the squared error of a block as metric, nothing else gives it that little."""
    errors = {}
    for way, methods in {"block": [APQViT(metric="mse")], "product": ["base_ptq"]}.items():
        example, model = quantized("bert", methods, bits=3)
        errors[way] = weighted_error(example, model, BLOCKS["bert"][0], False, 0)
    assert errors["block"] < errors["product"]


def test_layers_that_are_given_the_same_tensor_keep_grids_of_their_own():
    _, model = quantized("opt")
    attention = model.model.decoder.layers[0].self_attn
    grids = [getattr(attention, f"{name}_proj").input_quantizer for name in "qkv"]
    assert len({id(grid) for grid in grids}) == 3
    assert len({grid.scale.item() for grid in grids}) == 1


def test_weights_are_on_grids_of_one_factor():
    example, model = quantized("vit")
    layer, before = model.blocks[0].mlp.fc1, example.model.blocks[0].mlp.fc1.weight
    scale = layer.weight_quantizer.scale
    factors = scale / (before.abs().amax(1) / 7)
    torch.testing.assert_close(factors, factors[:1].expand_as(factors), rtol=1e-5, atol=0)
    assert torch.equal(layer.weight, fake_quant(before, scale, 4, 0))


def test_padded_tokens_change_nothing():
    example = made("bert")
    found = []
    for batch in with_padding(example.inputs):
        options = {"coverage": "linear", "methods": [FEW], "data": [batch]}
        model = qt.quantize(copy.deepcopy(example.model), 6, **options)
        found.append(torch.stack([q.scale for q in quantizers(model).values()]))
    assert torch.isclose(*found, rtol=1e-4).float().mean() > 0.9


# ------------------------------------------------------------------ unsigned codes


def unsigned(absmax, bits):
    grid = ActivationQuantizer(bits, "probability", None, torch.device("cpu"))
    grid.absmax, grid.calibrated = torch.tensor(absmax), True
    made = UnsignedQuantizer.after(grid)
    made.set_bits(bits)
    return made


def test_unsigned_codes_by_hand():
    """2 bits up to 0.6: steps of 0.2."""
    grid = unsigned(0.6, 2)
    found = grid.round(torch.tensor([-1.0, 0.0, 0.09, 0.11, 0.29, 0.31, 0.6, 0.9]))
    torch.testing.assert_close(found, torch.tensor([0, 0, 0, 0.2, 0.2, 0.4, 0.6, 0.6]))
    assert (grid.zero, grid.scale.item()) == (-2, pytest.approx(0.2))


@pytest.mark.parametrize("bits", [2, 4, 8])
def test_unsigned_codes_are_all_used_and_the_largest_stays(bits):
    p = (3 * torch.randn(200, 64)).softmax(-1)
    grid = unsigned(p.max().item(), bits)
    assert grid.round(p).max().item() == pytest.approx(p.max().item(), rel=1e-6)
    every = torch.linspace(0, p.max().item(), 5000)
    assert len(grid.round(every).unique()) == 2**bits
    signed = ActivationQuantizer(bits, "probability", None, torch.device("cpu"))
    signed.absmax, signed.calibrated, signed.dynamic = p.max(), True, False
    signed.set_bits(bits)
    errors = [(one.round(p) - p).square().sum().item() for one in (grid, signed)]
    assert errors[0] < errors[1] / 2


def test_a_softmax_gets_them_and_nothing_else_does():
    alone = {"blocks.0.mlp.*": None, "*_query_*": None, "*_key_*": None, "*_value_*": None}
    _, model = quantized(weight_bits=16, overrides=alone)
    grids = {name: q.grid for name, q in quantizers(model).items()}
    assert grids.pop(PROBABILITIES) == "unsigned"
    assert set(grids.values()) == {"uniform"}
    rows = {row.name: row for row in qt.summary(model).sites}
    assert rows[PROBABILITIES].grid == "unsigned"
    _, affine = quantized(symmetric=False)
    assert {q.grid for q in quantizers(affine).values()} == {"uniform"}
    assert affine.get_submodule(PROBABILITIES).zero == -8  # which is the same


# ------------------------------------------------------------------ with all else


def with_unsigned(name="vit", **options):
    """Return an example and its model, whose probabilities have unsigned codes."""
    example, model = quantized(name, **options)
    sites = [site for site, q in quantizers(model).items() if q.kind == "probability"]
    for site in sites:
        owner, _, child = site.rpartition(".")
        one = model.get_submodule(site)
        if one.grid == "uniform":
            made = UnsignedQuantizer.after(one)
            made.set_bits(made.bits)
            setattr(model.get_submodule(owner), child, made)
    assert sites
    return example, model


@pytest.mark.parametrize("name", ["vit", "bert"])
def test_it_is_saved_loaded_and_learned(name, tmp_path):
    example, model = with_unsigned(name)
    qt.save(model, tmp_path / "model.safetensors")
    again = qt.load(made(name).model.eval(), tmp_path / "model.safetensors")
    assert torch.equal(example.logits(again), example.logits(model))
    assert_same_bits(again.state_dict(), model.state_dict())
    assert describe(again) == describe(model)
    for scale in qt.learn_scales(again):
        scale.data.mul_(1.02)
    learned = example.logits(again)
    assert not torch.equal(learned, example.logits(model))
    qt.freeze_scales(again)
    assert torch.equal(example.logits(again), learned)


@pytest.mark.parametrize(("bits", "act_dtype"), [(8, "uint8"), (6, "int8")])
def test_an_onnx_file_has_the_same_codes(bits, act_dtype, tmp_path):
    example, model = with_unsigned(bits=bits)
    path = tmp_path / "model.onnx"
    qt.export_onnx(model, example.inputs, path, act_dtype=act_dtype)
    found = qt.verify(path, model, [example.inputs])
    assert found.passed, str(found)


def test_a_program_of_torch_computes_the_same():
    example, model = with_unsigned(bits=8)
    program = qt.export_torch(model, example.inputs).module()
    torch.testing.assert_close(program(example.inputs), example.logits(model), rtol=0.05, atol=0.05)


def test_progress_is_told():
    told = []
    example = made("swin")
    qt.quantize(example.model, coverage="linear", methods=[FEW], data=[example.inputs],
                progress=lambda *what: told.append(what))  # fmt: skip
    assert ("apq_vit", 0, 2) in told
    assert ("apq_vit", 2, 2) in told


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"coverage": "weight_only"}, "apq_vit is for models of blocks in which products of atten"),
        ({"coverage": "linear_inputs"}, "apq_vit is for models of blocks"),
        ({"methods": ["apq_vit", "erq"]}, "apq_vit and erq both choose the codes"),
    ],
)
def test_where_it_does_not_apply(options, message):
    with pytest.raises(ValueError, match=message):
        quantized(**options)


def test_a_decoder_that_caches_is_searched_as_one_that_does_not():
    """A block that is run again must not find the keys that its last run left behind."""
    found = []
    for use_cache in (True, False):
        example = made("gpt2")
        example.model.config.use_cache = use_cache
        options = {"coverage": "linear", "methods": [FEW], "data": [example.inputs]}
        model = qt.quantize(example.model.eval(), 4, **options)
        assert model.config.use_cache == use_cache
        found.append(model.state_dict())
    assert_same_bits(*found)


class Changing(nn.Module):
    """A block that adds to its input in place."""

    def __init__(self):
        super().__init__()
        self.qkv, self.proj = nn.Linear(8, 24), nn.Linear(8, 8)

    def forward(self, x):
        q, k, v = self.qkv(x).chunk(3, -1)
        return x.add_(self.proj(nn.functional.scaled_dot_product_attention(q, k, v)))


def test_a_block_that_changes_its_input_is_refused():
    model = nn.Sequential(nn.Linear(8, 8), Changing())
    with pytest.raises(ValueError, match="changes what it is given in place"):
        qt.quantize(model, coverage="linear", methods=["apq_vit"], data=[torch.randn(4, 5, 8)])


def test_models_without_blocks_are_refused():
    assert "apq_vit" in METHODS
    with pytest.raises(ValueError, match="apq_vit is for models of blocks"):
        qt.quantize(nn.Sequential(nn.Linear(8, 8)), coverage="linear", methods=["apq_vit"],
                    data=[torch.randn(9, 8)])  # fmt: skip


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"bottom": 1.0}, "bottom must be from 0 to below 1, got 1.0"),
        ({"candidates": 0}, "candidates must be a whole number from 2, got 0"),
        ({"metric": "x"}, "metric must be one of"),
    ],
)
def test_options_out_of_range(options, message):
    with pytest.raises(ValueError, match=message):
        APQViT(**options)


def test_an_error_leaves_the_model_as_it_was(monkeypatch):
    from quanttune.quantization.methods.searching.blocks import BlockSearch

    def fail(self):
        raise ValueError("install failed")

    example = made("vit")
    before = copy.deepcopy(example.model.state_dict())
    monkeypatch.setattr(BlockSearch, "install", fail)
    with pytest.raises(ValueError, match="install failed"):
        qt.quantize(example.model, coverage="linear", methods=[FEW], data=[example.inputs])
    assert_same_bits(example.model.state_dict(), before)
