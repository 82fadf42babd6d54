"""Programs for LiteRT multiply integers in it, and answer what the model simulates."""

import pytest
import torch
from models import shallow
from torch import nn

import quanttune as qt

litert_torch = pytest.importorskip("litert_torch", reason="make runtimes")
interpreter = pytest.importorskip("ai_edge_litert.interpreter", reason="make runtimes")
pytestmark = pytest.mark.filterwarnings("ignore")  # of litert-torch and of torchao, of themselves

PRODUCTS = ("FULLY_CONNECTED", "CONV_2D", "BATCH_MATMUL")


def converted(program, inputs, path):
    """Return an interpreter of a program that was converted as docs/deployment.md says."""
    from litert_torch.quantize.pt2e_quantizer import (
        PT2EQuantizer,
        get_symmetric_quantization_config,
    )
    from litert_torch.quantize.quant_config import QuantConfig

    config = get_symmetric_quantization_config(is_per_channel=True)
    how = QuantConfig(pt2e_quantizer=PT2EQuantizer().set_global(config))
    litert_torch.convert(program.module(), (inputs,), quant_config=how).export(str(path))
    # its own kernels: what XNNPACK computes of a ViT is further from the codes (docs/deployment.md)
    kernels = interpreter.OpResolverType.BUILTIN_WITHOUT_DEFAULT_DELEGATES
    found = interpreter.Interpreter(str(path), experimental_op_resolver_type=kernels)
    found.allocate_tensors()
    return found


def answers(model, inputs):
    """Call an interpreter with floats or ids, in its codes where it takes and returns those."""
    (source,), (result,) = model.get_input_details(), model.get_output_details()
    scale, zero = source["quantization"]
    given = (inputs / scale).round().clamp(-128, 127) + zero if scale else inputs
    model.set_tensor(source["index"], given.numpy().astype(source["dtype"]))
    model.invoke()
    found = torch.from_numpy(model.get_tensor(result["index"])).float()
    scale, zero = result["quantization"]
    return (found - zero) * scale if scale else found


def products(model):
    """Return the types of what each product takes."""
    types = {tensor["index"]: tensor["dtype"].__name__ for tensor in model.get_tensor_details()}
    return [
        [types[index] for index in operator["inputs"][:2]]
        for operator in model._get_ops_details()
        if operator["op_name"] in PRODUCTS
    ]


@pytest.mark.parametrize("name", ["vit", "bert"])
@torch.no_grad()
def test_all_weights_are_multiplied_as_integers(name, tmp_path):
    example = shallow(name)
    model = example.model.eval()
    exact = example.logits()
    qt.quantize(model, coverage="full_no_softmax", data=[example.inputs])
    program = qt.export_torch(model, example.inputs, target="litert")
    found = converted(program, example.inputs, tmp_path / "model.tflite")
    weights = sum(isinstance(module, (nn.Linear, nn.Conv2d)) for module in model.modules())
    assert products(found).count(["int8", "int8"]) >= weights
    expected, answered = example.logits(), answers(found, example.inputs)
    assert (answered - expected).abs().mean() < (exact - expected).abs().mean() / 2
