"""Compile what the launchers of quanttune.triton_kernels would launch, where there is no GPU.

The launchers get tensors of the "meta" device; what they would have launched is recorded, and
compiled for a target by the rules after which Triton specializes a kernel to its arguments.
TRITON_INTERPRET must not be set.
"""

import subprocess
import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.runtime.jit import JITFunction

TARGETS = {
    "sm_80": GPUTarget("cuda", 80, 32),
    "sm_90": GPUTarget("cuda", 90, 32),
    "gfx942": GPUTarget("hip", "gfx942", 64),
}
TYPES = {
    torch.float64: "fp64",
    torch.float32: "fp32",
    torch.float16: "fp16",
    torch.bfloat16: "bf16",
    torch.int64: "i64",
    torch.uint8: "u8",
}
_CUOBJDUMP = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"


class Launch(NamedTuple):
    """What a launcher asks Triton for."""

    kernel: Any
    arguments: Sequence[Any]
    options: Mapping[str, Any]  # constants of the kernel among them

    def value(self, name: str) -> Any:
        """Return what an argument or an option is."""
        named = dict(zip(self.kernel.arg_names, self.arguments, strict=False))
        return self.options[name] if name in self.options else named[name]


def empty(shape: Sequence[int], dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """Return a tensor that has no memory."""
    return torch.empty(shape, dtype=dtype, device="meta")


def launches(launcher: Callable[..., Any], arguments: Sequence[Any]) -> list[Launch]:
    """Return every launch that a launcher asks for."""
    recorded = []

    def record(kernel, *arguments, grid, warmup, **options):  # type: ignore[no-untyped-def]
        recorded.append(Launch(kernel, arguments, options))

    with mock.patch.object(JITFunction, "run", record):
        launcher(*arguments)
    return recorded


def compiled(launch: Launch, target: GPUTarget) -> Any:
    """Compile what the first launch with such arguments would compile."""
    kernel, arguments, options = launch
    index = {name: position for position, name in enumerate(kernel.arg_names)}
    constants = {name: value for name, value in options.items() if name in index}
    signature: dict[str, str] = {}
    attributes = {}
    for name, value in zip(kernel.arg_names, arguments, strict=False):
        specialized = not kernel.params[index[name]].do_not_specialize
        if isinstance(value, torch.Tensor):
            signature[name] = "*" + TYPES[value.dtype]
            divisible = True  # allocations are
        elif value is None:
            constants[name] = None
            divisible = False
        elif isinstance(value, float):
            signature[name] = "fp32"
            divisible = False
        else:
            signature[name] = "i32" if -(2**31) <= value < 2**31 else "i64"
            divisible = specialized and value % 16 == 0
            if specialized and value == 1:
                constants[name] = 1
        if divisible:
            attributes[index[name],] = [["tt.divisibility", 16]]
    signature |= dict.fromkeys(constants, "constexpr")
    source = ASTSource(
        fn=kernel,
        signature={name: signature[name] for name in kernel.arg_names},
        constexprs={(index[name],): value for name, value in constants.items()},
        attrs=attributes,
    )
    rest = {name: value for name, value in options.items() if name not in index}
    return triton.compile(source, target=target, options=rest)


def disassembly(code: Any) -> str:
    """Return the machine code of a kernel for NVIDIA's GPUs, and what it needs, as text."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(code.asm["cubin"])
        file.flush()
        command = [str(_CUOBJDUMP), "-res-usage", "-sass", file.name]
        return subprocess.run(command, check=True, capture_output=True, text=True).stdout
