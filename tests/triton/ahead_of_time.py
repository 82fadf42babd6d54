"""Compile what the launchers of quanttune.triton_kernels would launch, without a GPU, and audit it.

`python ahead_of_time.py sm_90 gfx942` prints a JSON list with an entry per kernel. The launchers
get tensors of the "meta" device; what they would have launched is compiled for the target instead,
by the rules after which Triton specializes a kernel to its arguments. TRITON_INTERPRET must not be
set.
"""

import json
import re
import subprocess
import sys
import tempfile
from pathlib import Path
from unittest import mock

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.runtime.jit import JITFunction

from quanttune import triton_kernels
from quanttune.triton_kernels import _launch

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
CUOBJDUMP = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"

SINGLE, HALF, BRAIN = torch.float32, torch.float16, torch.bfloat16
# strata of 128 and of 3 elements, a row that is its own sample, and arguments that are all 1
LONG, VISION, SHORT, ONE = (8, 2048 * 4096), (8, 197 * 768), (16, 36864), (4, 1)
ROWS = {
    "long": [(BRAIN, LONG), (SINGLE, LONG), (HALF, LONG)],
    "vision": [(BRAIN, VISION)],
    "short": [(BRAIN, SHORT)],
    "one": [(SINGLE, ONE)],
}
GRIDS = {
    "tensor": [(BRAIN, (2**24,), None), (SINGLE, (2**24,), None), (HALF, (2**24,), None)],
    "output channels": [(SINGLE, (4096, 4096), 0)],
    "last axis": [(BRAIN, (4096, 1024), 1)],
    "convolution": [(SINGLE, (64, 3, 3, 3), 0)],
    "one": [(SINGLE, (1,), None)],
}

OPTIONS = ("exact", "detached", "padded", "odd padded")
PADDED = {"padded": (BRAIN, (64, 512, 768)), "odd padded": (SINGLE, (64, 30, 100))}

# one target has everything; on the others what could differ, in one size of each
COVERAGE = {
    "sm_90": ([SINGLE, HALF, BRAIN], {*ROWS, *GRIDS, *OPTIONS}),
    "sm_80": ([BRAIN], {"long", "tensor"}),
    "gfx942": ([SINGLE, BRAIN], {"long", "one", "tensor"}),
}


def empty(shape, dtype=torch.float32):
    return torch.empty(shape, dtype=dtype, device="meta")


def calls():
    """Yield the name of a case, and a launcher with its arguments."""
    for name, rows in ROWS.items():
        for dtype, shape in rows:
            x, samples = empty(shape, dtype), shape[0]
            gradient = (x, x, empty((samples, 7)), empty(samples), False)
            yield name, triton_kernels.outlier_statistics, (x, samples, False)
            yield name, triton_kernels.outlier_statistics_backward, (*gradient, False)
    yield "exact", triton_kernels.outlier_statistics, (empty((8, 2**20), BRAIN), 8, True)
    x = empty(SHORT, BRAIN)
    gradient = (x, x, empty((16, 7)), empty(16), False)
    yield "detached", triton_kernels.outlier_statistics_backward, (*gradient, True)
    for name, (dtype, shape) in PADDED.items():
        x, samples = empty(shape, dtype), shape[0]
        ranges = empty((samples, 2), torch.int64)
        gradient = (x, x, empty((samples, 7)), empty(samples), False)
        yield name, triton_kernels.outlier_statistics, (x, samples, False, ranges)
        yield name, triton_kernels.outlier_statistics_backward, (*gradient, False, ranges)
    for name, grids in GRIDS.items():
        for dtype, shape, axis in grids:
            x, scale = empty(shape, dtype), empty(() if axis is None else shape[axis])
            arguments = (x, scale, -128, 127, axis)
            yield name, triton_kernels.fake_quant, arguments
            yield name, triton_kernels.fake_quant_backward, (x, *arguments)
            if axis is None:
                yield name, triton_kernels.quantization_errors, (x, empty(90), -128, 127)


def launches(launcher, arguments):
    """Return the (kernel, arguments, options) of every launch that a launcher asks for."""
    recorded = []

    def record(kernel, *arguments, grid, warmup, **options):
        recorded.append((kernel, arguments, options))

    with mock.patch.object(JITFunction, "run", record):
        launcher(*arguments)
    return recorded


def compile_launch(kernel, arguments, options, target):
    """Compile what the first launch with such arguments would compile."""
    index = {name: position for position, name in enumerate(kernel.arg_names)}
    constants = {name: value for name, value in options.items() if name in index}
    signature = {}
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


def audit(compiled):
    """Return what the code needs, and its instructions in their order."""
    common = {
        "threads": compiled.metadata.num_warps * compiled.metadata.target.warp_size,
        "shared": compiled.metadata.shared,
    }
    if "amdgcn" in compiled.asm:
        code = compiled.asm["amdgcn"]
        return common | {
            "registers": int(re.search(r"\.vgpr_count:\s+(\d+)", code)[1]),
            "spills": int(re.search(r"\.vgpr_spill_count:\s+(\d+)", code)[1]),
            "instructions": re.findall(r"^\s+([a-z]+_\w+)", code, re.M),
        }
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        command = [CUOBJDUMP, "-res-usage", "-sass", file.name]
        dump = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    lines = re.findall(r"^\s+/\*([0-9a-f]{4,})\*/\s+(.*?);", dump, re.M)
    machine_code = [(int(address, 16), text) for address, text in lines]
    spills = [at for at, text in machine_code if re.search(r"\b(?:LDL|STL)\b", text)]
    loops = list(find_loops(machine_code))
    return common | {
        "registers": int(re.search(r"REG:(\d+)", dump)[1]),
        "spills": len(spills),
        "loops": len(loops),
        "loop_spills": sum(any(begin <= at <= end for begin, end in loops) for at in spills),
        "main_loop": max(
            [sum(begin <= at <= end for at, _ in machine_code) for begin, end in loops],
            default=sum(not text.startswith("NOP") for _, text in machine_code),
        ),
        # with its type, so that predicates, labels and declarations stay out
        "instructions": re.findall(
            r"^\s*(?:@!?%p\d+\s+)?([a-z]\w*(?:\.[\w:]+)+)", compiled.asm["ptx"], re.M
        ),
    }


def find_loops(machine_code):
    """Yield from where to where the code is that a branch back repeats."""
    for address, text in machine_code:
        branch = re.search(r"\bBRA\b.*?(0x[0-9a-f]+)", text)
        if branch and int(branch[1], 16) < address:
            yield int(branch[1], 16), address


def main(targets):
    audits = []
    for target in targets:
        _launch._LANES = TARGETS[target].warp_size
        dtypes, cases = COVERAGE[target]
        for case, launcher, arguments in calls():
            if case not in cases or arguments[0].dtype not in dtypes:
                continue
            for kernel, values, options in launches(launcher, arguments):
                compiled = compile_launch(kernel, values, options, TARGETS[target])
                name = {"case": case, "type": TYPES[arguments[0].dtype], "target": target}
                kernel_name = launcher.__name__ + kernel.__name__
                audits.append(name | {"kernel": kernel_name} | audit(compiled))
    json.dump(audits, sys.stdout)


if __name__ == "__main__":
    main(sys.argv[1:])
