"""What equalizations leave alone, and what is refused."""

import copy
import json
import re

import pytest
import torch
from equalized import Block
from models import MODELS, TOKENS
from safetensors.torch import save_file
from torch import Tensor, nn

import quanttune as qt
from quanttune.quantization.methods import RepQ, SmoothQuant
from quanttune.quantization.restoration import restorations
from quanttune.quantization.running import Data
from quanttune.quantization.saving.description import describe
from quanttune.quantization.scheme import Scheme


class Tied(Block):
    """Two readers that share a weight with a table."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(3, 4)
        self.other.weight = self.table.weight


class ReadsTwo(Block):
    """A reader that also reads something else."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) + self.other(x)


class Functional(Block):
    """A reader whose weight is used without calling it, after it was called."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) + x @ self.other.weight.t()


class InPlace(Block):
    """A reader that reads what something made of the LayerNorm's output, in its memory."""

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm(x)
        one = self.one(y)
        y.view(-1).relu_()
        return one + self.other(y)


class Transposed(Block):
    """A reader whose inputs are no channels."""

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm(x)
        return self.one(y) + self.other(y.transpose(1, 2).reshape(y.shape))


class Written(Block):
    """A LayerNorm whose output is written into another tensor."""

    def forward(self, x: Tensor) -> Tensor:
        y, kept = self.norm(x), torch.zeros_like(x)
        kept[:, :] = y
        return self.one(y) + kept[..., :3]


class Returned(Block):
    """A LayerNorm whose output the model returns beside others."""

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        y = self.norm(x)
        return {"outputs": self.one(y), "hidden": y}


class ByKeyword(Block):
    """A reader that takes its input where no hook of ours looks."""

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm(x)
        return self.one(y) + self.other(input=y)


def changed(model: nn.Module, x: Tensor) -> set[str]:
    """Return which parameters a method changes; what the model computes it must not."""
    before, exact = copy.deepcopy(model.state_dict()), model(x)
    SmoothQuant().apply(model, Scheme(8), Data([x]))
    torch.testing.assert_close(model(x), exact, rtol=1e-12, atol=1e-14)
    return {key for key, value in before.items() if not torch.equal(model.state_dict()[key], value)}


@pytest.mark.parametrize("kind", [Tied, ReadsTwo, Functional, InPlace, Transposed, ByKeyword])
def test_readers_that_cannot_change_are_named_and_left_alone(kind):
    model = kind().double().requires_grad_(False)
    x = torch.randn(3, 4, 4).double()
    if kind in (Tied, ReadsTwo, Functional):
        with pytest.warns(UserWarning, match=r"1 module\(s\) that read a norm .* other\."):
            names = changed(model, x)
    else:
        names = changed(model, x)
    assert names == {"norm.weight", "norm.bias", "one.weight"}
    assert list(restorations(model)) == ["norm"]


@pytest.mark.parametrize("kind", [Written, Returned])
def test_an_output_that_goes_elsewhere_is_restored(kind):
    model = kind().double().requires_grad_(False)
    assert "one.weight" in changed(model, torch.randn(3, 4, 4).double())
    assert list(restorations(model)) == ["norm"]


class Channel2d(nn.LayerNorm):
    """A LayerNorm of dimension 1, as in ConvNeXt, which another one of as many channels reads."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.transpose(1, 2)).transpose(1, 2)


@pytest.mark.parametrize("norm", [Channel2d(4), nn.LayerNorm((4, 4)), nn.LayerNorm(4, bias=False)])
def test_layer_norms_of_other_dimensions_are_no_pairs(norm):
    model, x = Block().requires_grad_(False), torch.randn(3, 4, 4)
    model.norm = norm.requires_grad_(False)
    exact = model(x)
    if norm.bias is None:
        SmoothQuant().apply(model, Scheme(8), Data([x]))
        torch.testing.assert_close(model(x), exact)
        return
    with pytest.raises(ValueError, match="Block has no norm whose output a Linear module reads"):
        SmoothQuant().apply(model, Scheme(8), Data([x]))


def test_a_layer_norm_without_weights_is_left_alone():
    model, x = nn.Sequential(Block(), nn.Linear(3, 4), Block()), torch.randn(3, 4)
    model[2].norm = nn.LayerNorm(4, elementwise_affine=False)
    exact, before = model(x), copy.deepcopy(model[2].state_dict())
    with pytest.warns(UserWarning, match=r"2 module\(s\) .* 2\.one, 2\.other\. It has no weight"):
        RepQ().apply(model, Scheme(8), Data([x]))
    torch.testing.assert_close(model(x), exact)
    assert all(torch.equal(value, before[key]) for key, value in model[2].state_dict().items())


# ------------------------------------------------------------------ errors


def state(model: nn.Module) -> tuple:
    hooks = [
        (name, type(m), len(m._forward_hooks), len(m._forward_pre_hooks))
        for name, m in model.named_modules()
    ]
    return hooks, {key: value.clone() for key, value in model.state_dict().items()}, model.training


NOT_A_NUMBER = torch.full((2, TOKENS, 24), torch.nan)


@pytest.mark.parametrize(
    ("methods", "data", "message"),
    [
        (["smoothquant"], [], "data is empty"),
        (["smooth"], [{}], "methods must be of smoothquant, outlier_suppression, aweq, awq, repq"),
        (["repq"], [{"inputs_embeds": NOT_A_NUMBER}], "LayerNorm returned NaN, inf or nothing"),
    ],
)
def test_an_error_leaves_the_model_as_it_was(methods, data, message):
    example = MODELS["bert"]()
    hooks, tensors, training = state(example.model)
    with pytest.raises(ValueError, match=message):
        qt.quantize(example.model, methods=methods, data=data)
    assert (hooks, training) == (state(example.model)[0], state(example.model)[2])
    assert all(
        torch.equal(value, tensors[key]) for key, value in example.model.state_dict().items()
    )


def test_an_error_of_what_follows_takes_the_equalization_back():
    example = MODELS["bert"]()
    hooks, tensors, training = state(example.model)
    options = {"methods": ["smoothquant", "aweq"], "overrides": {"nowhere": None}}
    with pytest.raises(ValueError, match="override 'nowhere' matches no quantizer"):
        qt.quantize(example.model, data=[example.inputs], **options)
    assert (hooks, training) == (state(example.model)[0], state(example.model)[2])
    assert example.model.state_dict().keys() == tensors.keys()
    assert all(
        torch.equal(value, tensors[key]) for key, value in example.model.state_dict().items()
    )
    equalized = qt.quantize(example.model, methods=["smoothquant"], data=[example.inputs])
    hooks, tensors, _ = state(equalized)
    with pytest.raises(ValueError, match="BertForSequenceClassification is quantized already"):
        qt.quantize(equalized, methods=["smoothquant"], data=[example.inputs])
    assert state(equalized)[0] == hooks
    assert all(torch.equal(value, tensors[key]) for key, value in equalized.state_dict().items())


LAYER = "bert.embeddings.LayerNorm"
EMBEDDING = "bert.embeddings.word_embeddings"


@pytest.mark.parametrize(
    ("restorations", "message"),
    [
        ({LAYER: "head"}, f"restorations.{LAYER} must be a list of names, got 'head'"),
        ({LAYER: ["head"]}, "restorations: the model has no head"),
        ({LAYER: [""]}, "restorations: '' is no Linear or Conv1D of 24 inputs"),
        ({LAYER: [LAYER]}, f"restorations: {LAYER!r} is no Linear or Conv1D of 24 inputs"),
        ({LAYER: [EMBEDDING]}, f"restorations: {EMBEDDING!r} is no Linear or Conv1D of 24 inputs"),
        ({LAYER: ["classifier"] * 2}, "restorations: 'classifier' is listed more than once"),
        ({"classifier": []}, "restorations: 'classifier' is no LayerNorm with weights"),
        ({"norm": []}, "restorations: 'norm' is no LayerNorm with weights of this model"),
        ([], "restorations must be an object, got list"),
        ({LAYER: []}, "it lacks [], and has ['bert.encoder.layer.0.attention.output.LayerNorm.res"),
    ],
)
def test_restorations_of_something_else_are_refused(restorations, message, tmp_path):
    example = MODELS["bert"]()
    qt.quantize(example.model, methods=["smoothquant"], data=[example.inputs])
    description = {**describe(example.model), "restorations": restorations}
    metadata = {"quantization_config": json.dumps(description)}
    tensors = {key: value.clone() for key, value in example.model.state_dict().items()}
    save_file(tensors, tmp_path / "model.safetensors", metadata)
    other = MODELS["bert"]().model
    hooks, tensors, _ = state(other)
    with pytest.raises(ValueError, match=re.escape(message)):
        qt.load(other, tmp_path / "model.safetensors")
    assert state(other)[0] == hooks
    assert other.state_dict().keys() == tensors.keys()


def test_a_restoration_by_zero_is_refused(tmp_path):
    example = MODELS["bert"]()
    qt.quantize(example.model, methods=["smoothquant"], data=[example.inputs])
    restorations(example.model)[LAYER].scale[2] = 0
    qt.save(example.model, tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match=f"{LAYER}.restoration.scale must be finite and positive"):
        qt.load(MODELS["bert"]().model, tmp_path / "model.safetensors")
