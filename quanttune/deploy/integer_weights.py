"""Weights that are held as integers, for as long as a quantized model is traced."""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..quantization.channel_grids import NoisyQuantizer
from ..quantization.modules import QuantizedConvolution, QuantizedEmbedding, QuantizedModule
from ..quantization.quantizer import WeightQuantizer
from ..quantization.row_quantizers import StackQuantizer
from ..quantization.state import weight_quantizers

MAX_INTEGER_BITS = 8  # of what runtimes multiply
CENTERS = {"uint8": 128, "int8": 0}  # codes of uint8 are those of int8, shifted


class IntegerWeight(nn.Module):
    """The codes and scales of a weight: a product's as (inputs, outputs), others as they were.

    Weights of more than 8 bits are kept as the floats that they were rounded to. Where a weight of
    integers meets a float it is int8, cast and scaled: of DequantizeLinear ONNX Runtime would make
    an operator that rounds the float too.
    """

    codes: Tensor
    scale: Tensor
    of_noise: Tensor | None  # what noise in the input adds to the outputs

    def __init__(self, module: Any, quantizer: WeightQuantizer, dtype: str) -> None:
        super().__init__()
        weight, outputs = module.weight.detach(), module.output_axis
        is_product = not isinstance(module, (QuantizedConvolution, QuantizedEmbedding))
        scale = quantizer.scale_of(weight)
        rounded = quantizer(weight).movedim(outputs, -1)
        self.is_integer = quantizer.bits <= MAX_INTEGER_BITS
        inputs = getattr(module, "input_quantizer", None)
        of_noise = None
        if isinstance(inputs, NoisyQuantizer):
            of_noise = (inputs.noise.double() @ rounded.double()).float()
        self.register_buffer("of_noise", of_noise)
        self.meets_integers = getattr(inputs, "bits", MAX_INTEGER_BITS + 1) <= MAX_INTEGER_BITS
        kind = dtype if self.meets_integers else "int8"
        codes = _codes(rounded / scale, kind) if self.is_integer else rounded
        self.axis = None if quantizer.axis is None else codes.dim() - 1 if is_product else outputs
        if not is_product:
            codes = codes.movedim(-1, outputs)
        self.register_buffer("codes", codes.contiguous())
        self.register_buffer("scale", scale.detach())

    def forward(self, weight: Tensor | None = None) -> Tensor:
        """Return the weight in float; the one that is given is not looked at."""
        if not self.is_integer:
            return self.codes
        product = dequantize if self.meets_integers else _scaled
        return product(self.codes, self.scale, self.axis)


class IntegerParameter(nn.Module):
    """The codes and scales of a parameter that a module multiplies with by itself."""

    codes: Tensor
    scale: Tensor

    def __init__(self, weight: Tensor, quantizer: WeightQuantizer, dtype: str) -> None:
        super().__init__()
        self.shape = weight.shape
        self.of_stack = quantizer if isinstance(quantizer, StackQuantizer) else None
        rounded, scale = quantizer(weight.detach()), quantizer.scale_of(weight)
        if self.of_stack:
            rounded = self.of_stack.rows(rounded)
        self.axis, self.is_integer = quantizer.axis, quantizer.bits <= MAX_INTEGER_BITS
        if self.is_integer:
            steps = scale if self.axis is None else scale.view(-1, *[1] * (rounded.dim() - 1))
            rounded = _codes(rounded / steps, dtype)
        self.register_buffer("codes", rounded.contiguous())
        self.register_buffer("scale", scale.detach())

    def forward(self, _: Tensor) -> Tensor:
        """Return the parameter in float; the one that is given is not looked at."""
        weight = self.dequantized() if self.is_integer else self.codes
        return self.of_stack.restored(weight, self.shape) if self.of_stack else weight

    def dequantized(self) -> Tensor:
        """Return in float what is held as integers."""
        return dequantize(self.codes, self.scale, self.axis)  # type: ignore[no-any-return]


class IntegerLinear(QuantizedModule, nn.Module):
    """Linear or Conv1D as a product with a weight of shape (inputs, outputs)."""

    bias: Tensor | None

    def forward(self, x: Tensor) -> Tensor:
        return self.multiply(x, self.bias)

    def multiply(self, x: Tensor, bias: Tensor | None) -> Tensor:
        """Do what `forward` does, with a bias that is not the module's own."""
        held: Any = self.weight_quantizer
        x, weight = self.input_quantizer(x), held()
        # not @, which would be a functional site where torch.export stands in for a shared module
        product = torch.ops.aten.matmul.default
        # ONNX Runtime makes a float Gemm of the product of two matrices and a bias
        flat = x.dim() < 3
        y = product(x.unsqueeze(0) if flat else x, weight)
        if (noise := getattr(held, "of_noise", None)) is not None:
            bias = -noise if bias is None else bias - noise
        # inside: else OpenVINO 2026.4 fuses small products of a fixed batch, and answers nonsense
        y = y if bias is None else y + bias
        return self.output_quantizer(y.squeeze(0) if flat else y)


class IntegerEmbedding(QuantizedModule, nn.Module):
    """Embedding that looks integers up, so that no runtime makes floats of the whole table."""

    def forward(self, indices: Tensor) -> Tensor:
        table: Any = self.weight_quantizer
        rows = F.embedding(indices, table.codes)
        if not table.is_integer:
            return rows
        scale = table.scale
        if table.axis is not None:
            scale = F.embedding(indices, scale.unsqueeze(1))
        return rows.float() * scale


class Layout(NamedTuple):
    """What stands for the weight of a module, for a parameter, and for a Linear."""

    weight: Any = IntegerWeight
    parameter: Any = IntegerParameter
    linear: Any = IntegerLinear


ONNX = Layout()


@contextmanager
def integer_weights(model: nn.Module, dtype: str = "int8", layout: Layout = ONNX) -> Iterator[None]:
    """Let a quantized model compute from integer weights, in the layout that runtimes multiply.

    Args:
        dtype: of the codes of what meets integers: "int8", or "uint8", whose zero point is 128.
    """
    with ExitStack() as undo:
        for module, quantizer in weight_quantizers(model).values():
            undo.callback(setattr, module, "weight_quantizer", quantizer)
            if not isinstance(module, QuantizedModule):  # one parameter of several
                module.weight_quantizer = layout.parameter(module.weight, quantizer, dtype)
                continue
            undo.callback(setattr, module, "__class__", type(module))
            held: Any = layout.weight(module, quantizer, dtype)
            if getattr(held, "of_noise", None) is not None:
                undo.enter_context(module.input_quantizer.keeping())  # type: ignore[operator]
            module.weight_quantizer = held
            module.__class__ = _integer_class(type(module), layout)
        yield


def _integer_class(quantized: type, layout: Layout) -> Any:
    if issubclass(quantized, QuantizedConvolution):
        return quantized
    return IntegerEmbedding if issubclass(quantized, QuantizedEmbedding) else layout.linear


def _codes(steps: Tensor, dtype: str) -> Tensor:
    return (steps.round() + CENTERS[dtype]).to(getattr(torch, dtype))


def _scaled(codes: Tensor, scale: Tensor, axis: int | None) -> Tensor:
    """Make floats of codes; those of uint8 have the zero point 128."""
    if axis is not None:
        scale = scale.view(-1, *[1] * (codes.dim() - axis - 1))
    if codes.dtype == torch.uint8:
        return (codes.float() - CENTERS["uint8"]) * scale
    return codes * scale


_OP = "quanttune::dequantize"
torch.library.define(_OP, "(Tensor codes, Tensor scale, int? axis) -> Tensor")
torch.library.impl(_OP, "CompositeExplicitAutograd")(_scaled)
torch.library.register_fake(_OP)(
    lambda codes, scale, axis: torch.empty_like(codes, dtype=scale.dtype)
)
dequantize = torch.ops.quanttune.dequantize.default
