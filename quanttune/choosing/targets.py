"""What a runtime wants to be integer, and as which file: a table of named schemes."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any

from ..quantization.calibrators import AFFINE, CALIBRATORS

# ema follows minmax, and mse omse (docs/results.md): they are not tried beside them
_TRIED = ("minmax", "percentile", "percentile_ema", "omse", "kl")


@dataclass(frozen=True)
class Target:
    """What must be integer, and what stays free to choose.

    Args:
        scheme: arguments of `quantize` that are given: coverage, zero points, granularity, widths.
        format: of the file, "onnx" or "torch".
        export: arguments of `export_onnx` or `export_torch`.
        spares: whether tensors that hurt may stay in float, where nothing else helps.
        bits: widths of activations that it takes; any by default.
    """

    scheme: Mapping[str, Any] = field(default_factory=dict)
    format: str = "onnx"
    export: Mapping[str, Any] = field(default_factory=dict)
    spares: bool = True
    bits: tuple[int, ...] = ()

    @property
    def calibrators(self) -> tuple[str, ...]:
        """The calibrators to try, the cheapest first."""
        known = CALIBRATORS if self.scheme.get("symmetric", True) else AFFINE
        return tuple(name for name in _TRIED if name in known)


_LINEAR = {"coverage": "linear", "weights": "channel"}
_EVERYTHING = {"coverage": "full_no_softmax", "weights": "channel", "symmetric": True}

# docs/deployment.md has what was run in each of them
TARGETS: Mapping[str, Target] = MappingProxyType(
    {
        # ONNX Runtime on x86: integer products, zero points for nothing, sums in float
        "onnx-cpu": Target({**_LINEAR, "symmetric": False}, export={"target": "onnxruntime-cpu"}),
        # everything but what softmax returns, symmetric: what integer hardware executes
        "onnx-npu": Target(_EVERYTHING, export={"act_dtype": "int8"}),
        "openvino": Target({**_LINEAR, "symmetric": True}, export={"target": "openvino"}),
        # XNNPACK multiplies integers only where the product is rounded too, and refuses the rest
        "executorch": Target(_EVERYTHING, "torch", {"target": "executorch"}, False, bits=(8,)),
        # oneDNN's kernels by torch.compile: attention's products stay in float
        "torch": Target(
            {"coverage": "linear_inputs", "weights": "channel", "symmetric": True},
            "torch",
            {"target": "inductor"},
        ),
    }
)


def target_of(target: str | Target, bits: int = 8) -> Target:
    """Return a target by its name.

    Raises:
        ValueError: there is none of that name, or it does not take activations of so many bits.
    """
    if not isinstance(target, Target) and target not in TARGETS:
        raise ValueError(f"target must be one of {', '.join(TARGETS)}, got {target!r}")
    found = target if isinstance(target, Target) else TARGETS[target]
    if found.bits and bits not in found.bits:
        takes = " or ".join(map(str, found.bits))
        raise ValueError(f"{target} takes activations of {takes} bits, got {bits}")
    return found
