"""Compile what the launchers of quanttune.triton_kernels would launch, without a GPU, and audit it.

`python ahead_of_time.py sm_90 gfx942` prints a JSON list with an entry per kernel. TRITON_INTERPRET
must not be set.
"""

import json
import math
import re
import sys
from pathlib import Path

import torch

from quanttune import triton_kernels
from quanttune.triton_kernels import _launch

sys.path.append(str(Path(__file__).parents[2]))
from benchmarks.gpu.ahead_of_time import TARGETS, TYPES, compiled, disassembly, empty, launches
from benchmarks.gpu.instructions import KINDS
from benchmarks.gpu.machine_code import MachineCode

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


def audit(code, launch):
    """Return what the code needs, and its instructions in their order."""
    kind = KINDS[launch.kernel.__name__]
    threads = code.metadata.num_warps * code.metadata.target.warp_size
    common = {
        "threads": threads,
        # of each tensor, in the registers of a thread at once
        "elements": math.prod(launch.value(name) for name in kind.constants) / threads,
        "shared": code.metadata.shared,
    }
    if "amdgcn" in code.asm:
        text = code.asm["amdgcn"]
        return common | {
            "registers": int(re.search(r"\.vgpr_count:\s+(\d+)", text)[1]),
            "spills": int(re.search(r"\.vgpr_spill_count:\s+(\d+)", text)[1]),
            "instructions": re.findall(r"^\s+([a-z]+_\w+)", text, re.M),
        }
    machine_code = MachineCode.of(disassembly(code))
    spills, loops = machine_code.spills, machine_code.loops
    longest = max(loops, key=lambda loop: loop.last - loop.first, default=None)
    return common | {
        "registers": machine_code.registers,
        "spills": len(spills),
        "loops": len(loops),
        "loop_spills": sum(any(a <= at <= b for a, b in loops) for at in spills),
        # the shortest way: without the branches that are rarely taken
        "main_loop": machine_code.shortest(longest, "" if longest else kind.past),
        # with its type, so that predicates, labels and declarations stay out
        "instructions": re.findall(
            r"^\s*(?:@!?%p\d+\s+)?([a-z]\w*(?:\.[\w:]+)+)", code.asm["ptx"], re.M
        ),
    }


def main(targets):
    audits = []
    for target in targets:
        _launch._LANES = TARGETS[target].warp_size
        dtypes, cases = COVERAGE[target]
        for case, launcher, arguments in calls():
            if case not in cases or arguments[0].dtype not in dtypes:
                continue
            for launch in launches(launcher, arguments):
                code = compiled(launch, TARGETS[target])
                name = {"case": case, "type": TYPES[arguments[0].dtype], "target": target}
                kernel_name = launcher.__name__ + launch.kernel.__name__
                audits.append(name | {"kernel": kernel_name} | audit(code, launch))
    json.dump(audits, sys.stdout)


if __name__ == "__main__":
    main(sys.argv[1:])
