"""torch.compile of quantized models, whole graphs: the numbers of eager."""

import copy

import pytest
import torch
from torch import nn

import quanttune as qt
from quanttune.quantization.running import main_output


def models():
    """Return small models of one layer, with what they are called with."""
    timm, transformers = pytest.importorskip("timm"), pytest.importorskip("transformers")
    size = {"vocab_size": 64, "hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 4}
    image = {"img_size": 16, "patch_size": 8, "embed_dim": 32, "depth": 1, "num_heads": 2}
    vit = timm.models.VisionTransformer(**image, num_classes=10)
    bert = transformers.BertForSequenceClassification(
        transformers.BertConfig(**size, intermediate_size=64)
    )
    opt = transformers.OPTForCausalLM(
        transformers.OPTConfig(**size, ffn_dim=64, word_embed_proj_dim=32, use_cache=False)
    )
    words = torch.randint(3, 60, (2, 8))
    mask = torch.tensor([[1] * 8, [1] * 5 + [0] * 3])
    return {
        "vit": (vit, {"x": torch.randn(2, 3, 16, 16)}),
        "bert": (bert, {"input_ids": words, "attention_mask": mask}),
        "opt": (opt, {"input_ids": words}),
    }


@pytest.mark.filterwarnings("ignore")  # of compilers
@pytest.mark.parametrize(
    ("name", "backend"), [("vit", "inductor"), ("bert", "eager"), ("opt", "eager")]
)
def test_a_whole_graph_has_the_numbers_of_eager(name, backend):
    model, inputs = models()[name]
    in_float = main_output(copy.deepcopy(model).eval()(**inputs))
    model = qt.quantize(model.eval(), 6, coverage="full", data=[inputs])
    expected = main_output(model(**inputs))
    torch.compiler.reset()
    compiled = torch.compile(model, backend=backend, fullgraph=True)
    # a value at the middle between two codes may fall to either side
    difference = (main_output(compiled(**inputs)) - expected).abs()
    assert difference.median() < 1e-5 * expected.abs().max()
    assert difference.norm() < 0.05 * expected.norm()
    assert (in_float - expected).norm() > 2 * difference.norm()


class Residual(nn.Module):
    def __init__(self):
        super().__init__()
        self.f, self.g = nn.Linear(16, 16), nn.Linear(16, 16)

    def forward(self, x, late=False):
        h = self.f(x)
        x = x + (h @ h.mT).softmax(-1) @ h
        return x + self.g(x) if late else self.g(x)


def test_gradients_of_a_compiled_model_are_those_of_eager():
    x = torch.randn(2, 5, 16)
    model = qt.quantize(Residual(), 4, coverage="full", data=[{"x": x, "late": True}])
    gradients = []
    for call in (model, torch.compile(model, backend="aot_eager", fullgraph=True)):
        model.zero_grad()
        call(x, late=True).square().sum().backward()
        gradients.append([p.grad for p in model.parameters()])
    for ours, theirs in zip(*gradients, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)


def test_what_calibration_did_not_meet_is_refused_in_a_compiled_model_too():
    x = torch.randn(2, 5, 16)
    model = qt.quantize(Residual(), 4, data=[x])
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    assert torch.equal(compiled(x), model(x))
    with pytest.raises(Exception, match="never reached during calibration"):
        compiled(x, late=True)


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")  # Dynamo's
def test_a_block_that_is_compiled_alone_is_rounded_too():
    x = torch.randn(2, 5, 16)
    model = qt.quantize(nn.Sequential(Residual(), Residual()), 4, data=[x])
    expected = model(x)
    model[1].compile(backend="aot_eager")
    torch.testing.assert_close(model(x), expected, rtol=1e-5, atol=1e-6)
    # and called alone, outside of the model
    torch.testing.assert_close(model[1](model[0](x)), expected, rtol=1e-5, atol=1e-6)
