"""What our ops are in ONNX."""

from collections.abc import Callable
from typing import Any

import numpy as np
import onnx_ir as ir
import torch
from onnxscript import values

from .integer_weights import CENTERS, MAX_INTEGER_BITS

Translation = Callable[..., Any]


def translations(onnx: values.Opset, act_dtype: str) -> dict[Translation, Translation]:
    """Return the translation of each op, for the exporter of torch.onnx.

    Args:
        onnx: the operators, such as `onnxscript.opset20`.
        act_dtype: type of the codes, "uint8" or "int8".
    """

    def constant(value: float, dtype: str = "float32") -> Any:
        return onnx.Constant(value=ir.tensor(np.array(value, dtype)))

    def fake_quant(x: Any, scale: Any, qmin: int, qmax: int, axis: int | None = None) -> Any:
        codes = qmax - qmin + 1
        if codes > 2**MAX_INTEGER_BITS:  # no runtime multiplies such integers
            steps = onnx.Round(onnx.Div(x, scale))
            return onnx.Mul(onnx.Clip(steps, constant(qmin), constant(qmax)), scale)
        if codes < 2**MAX_INTEGER_BITS:
            # not between Q and DQ, where it would keep ONNX Runtime from computing in integers
            limits = (onnx.Mul(scale, constant(limit)) for limit in (qmin, qmax))
            x = onnx.Clip(x, *limits)
        zero_point = constant(CENTERS[act_dtype] - codes // 2 - qmin, act_dtype)
        return onnx.DequantizeLinear(onnx.QuantizeLinear(x, scale, zero_point), scale, zero_point)

    def dequantize(codes: Any, scale: Any, axis: int | None = None) -> Any:
        options = {} if axis is None else {"axis": axis}
        # said for int8 too: what leaves it out is taken for float by some of ONNX Runtime's passes
        zeros = np.full(tuple(scale.shape), CENTERS[act_dtype], act_dtype)
        return onnx.DequantizeLinear(codes, scale, onnx.Constant(value=ir.tensor(zeros)), **options)

    def dynamic_fake_quant(x: Any, qmin: int, qmax: int, axis: int | None = None) -> Any:
        """Round a weight that no module holds: of constants, which ONNX Runtime folds."""
        others = () if axis is None else (onnx.Constant(value=ir.tensor(np.array([1], "int64"))),)
        absmax = onnx.ReduceMax(onnx.Abs(x), *others, keepdims=1)
        scale = onnx.Div(absmax, constant(qmax))
        scale = onnx.Where(onnx.Equal(absmax, constant(0)), constant(1), scale)
        codes = onnx.Clip(onnx.Round(onnx.Div(x, scale)), constant(qmin), constant(qmax))
        return onnx.Mul(codes, scale)

    return {
        torch.ops.quanttune.fake_quant.default: fake_quant,
        torch.ops.quanttune.dynamic_fake_quant.default: dynamic_fake_quant,
        torch.ops.quanttune.dequantize.default: dequantize,
    }
