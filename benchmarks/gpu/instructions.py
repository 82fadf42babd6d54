"""Count the instructions of every kernel per element, in machine code for a GPU that is not here.

python -m benchmarks.gpu.instructions --json benchmarks/results/sm_90/instructions.json
python -m benchmarks.gpu.instructions --target sm_80 --json FILE

Nothing runs and nothing is timed. Each launch is compiled as its launcher asks for it, and the
shortest way through the code is counted, in instructions that a thread issues per element of the
tensor: `loop` of the loop over tiles (or over candidates), `whole` of a whole program, with what
comes before and after the loop. Rare branches are left out: ties at the maximum, the last tile of a
row, the division of extreme numbers.

The budget is what memory leaves time for. A GPU issues `processors` x 4 x 32 x `clock` instructions
of threads per second, and moves `bandwidth` bytes; while it moves the bytes of one element, at
least those of each tensor read and written, it has time for

    bytes x 132 x 4 x 32 x 1.785e9 / 4.8e12 = bytes x 6.28   on an H200 (sm_90)
    bytes x 108 x 4 x 32 x 1.410e9 / 2.0e12 = bytes x 9.75   on an A100 (sm_80)

Above it a kernel waits for its instructions, however few bytes it moves. Occupancy is arithmetic
too: how many programs registers, shared memory and warps leave room for.
"""

import argparse
import math
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch

from benchmarks.gpu.ahead_of_time import (
    TARGETS,
    Launch,
    compiled,
    disassembly,
    empty,
    launches,
)
from benchmarks.gpu.machine_code import MachineCode
from benchmarks.provenance import commit
from quanttune import triton_kernels
from quanttune.environment import environment
from quanttune.files import write_json

# samples and elements of each: ViT-B (197 tokens of 768 channels), and a long row
SIZES = {"ViT-B": (8, 197 * 768), "long": (8, 1_048_576)}
DTYPES = (torch.bfloat16, torch.float32)
QMIN, QMAX, CANDIDATES = -128, 127, 100
SCHEDULERS, LANES = 4, 32


class Machine(NamedTuple):
    """What bounds a kernel there."""

    name: str
    processors: int
    clock: float  # per second
    bandwidth: float  # bytes per second
    shared: int  # bytes of a multiprocessor
    warps: int = 64
    programs: int = 32
    registers: int = 65536

    def budget(self, moved: float) -> float:
        """Return how many instructions of a thread there is time for while bytes are moved."""
        return moved * self.processors * SCHEDULERS * LANES * self.clock / self.bandwidth

    def occupancy(self, registers: int, threads: int, shared: int) -> float:
        """Return which share of the warps that fit a multiprocessor a kernel lets it have."""
        warps = threads // LANES
        of_a_warp = math.ceil(registers / 8) * 8 * LANES
        fits = [self.programs, self.warps // warps, self.registers // (of_a_warp * warps)]
        fits.append(self.shared // (shared + 1024))  # of which a program needs one KiB more
        return min(fits) * warps / self.warps


MACHINES = {
    "sm_90": Machine("H200", 132, 1.785e9, 4.8e12, 228 * 1024),
    "sm_80": Machine("A100", 108, 1.410e9, 2.0e12, 164 * 1024),
}


class Kind(NamedTuple):
    """How a kernel goes over a tensor."""

    what: str
    tensors: int  # that it reads or writes; 0 where memory is not the bound
    constants: tuple[str, ...]  # whose product is how many elements a program has at once
    trips: Callable[[Launch], list[float]] = lambda launch: []  # through each of its loops
    streams: bool = False  # a trip through the first one has elements, or a candidate, of its own
    begins: bool = False  # its first trip takes the rare branch
    past: str = ""  # an instruction that every way to count passes
    packed: int = 1  # elements in a register


def _tiles(launch: Launch) -> list[float]:
    return [launch.value("part_size") / (launch.value("LOADS") * launch.value("BLOCK")), 0]


def _candidates(launch: Launch) -> list[float]:
    return [len(launch.value("steps_ptr"))]


def _bisections(launch: Launch) -> list[float]:
    """15 bits of a key, then one read of the sample; float32 has two keys, and half of its rows a
    second read.
    """
    read = 2 * launch.value("HALF") / launch.value("BLOCK")
    return [15, 15, read, read] if "fp32" in str(launch.value("DTYPE")) else [15, read, 0]


KINDS = {
    "_forward_kernel": Kind("", 2, ("ROWS", "COLUMNS")),
    "_backward_kernel": Kind("", 3, ("ROWS", "COLUMNS")),
    "_partial_kernel": Kind("", 1, ("LOADS", "BLOCK"), _tiles, streams=True, begins=True),
    "_merge_kernel": Kind(
        ", finishing stage, per sampled element", 0, ("HALF",), _bisections, packed=2
    ),
    # rows without a gradient, which are copied, pass no barrier
    "_gradient_kernel": Kind("", 3, ("LOADS", "BLOCK"), past="BAR"),
    "_errors_kernel": Kind(", per candidate", 0, ("BLOCK",), _candidates, streams=True),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--target", choices=MACHINES, default="sm_90")
    parser.add_argument("--json", type=Path, required=True, help="file of the results")
    options = parser.parse_args()
    machine = MACHINES[options.target]
    rows = []
    for size, dtype, launcher, arguments in calls():
        for launch in launches(launcher, arguments):
            kind = KINDS[launch.kernel.__name__]
            rows.append(
                {
                    "op": launcher.__name__ + kind.what,
                    "size": size,
                    "dtype": str(dtype).removeprefix("torch."),
                    **count(launch, kind, options.target),
                    "budget": machine.budget(kind.tensors * dtype.itemsize) or None,
                }
            )
            print(rows[-1], flush=True)
    options.json.parent.mkdir(parents=True, exist_ok=True)
    facts = {"target": options.target, "machine": machine._asdict(), "sizes": SIZES}
    versions = environment()["versions"]
    found = {name: versions[name] for name in ("quanttune", "torch", "triton")}
    write_json(options.json, {**facts, "versions": found, "commit": commit(), "rows": rows})


def calls() -> Iterator[tuple[str, torch.dtype, Callable[..., Any], tuple[Any, ...]]]:
    """Yield a size and type, and a launcher with its arguments."""
    for size, shape in SIZES.items():
        for dtype in DTYPES:
            x, samples = empty(shape, dtype), shape[0]
            grid = (QMIN, QMAX, None)
            gradient = (x, x, empty((samples, 7)), empty((samples,)), False, False)
            yield size, dtype, triton_kernels.fake_quant, (x, empty(()), *grid)
            yield size, dtype, triton_kernels.fake_quant_backward, (x, x, empty(()), *grid)
            yield size, dtype, triton_kernels.dynamic_fake_quant, (x, *grid)
            yield size, dtype, triton_kernels.outlier_statistics, (x, samples, False)
            yield size, dtype, triton_kernels.outlier_statistics_backward, gradient
            steps = empty((CANDIDATES,))
            yield size, dtype, triton_kernels.quantization_errors, (x, steps, QMIN, QMAX)


def count(launch: Launch, kind: Kind, target: str) -> dict[str, Any]:
    """Compile a launch, and count per element what its shortest way issues."""
    code = compiled(launch, TARGETS[target])
    machine_code = MachineCode.of(disassembly(code))
    threads = code.metadata.num_warps * LANES
    elements = math.prod(launch.value(name) for name in kind.constants) * kind.packed / threads
    trips = kind.trips(launch)
    loops = [machine_code.shortest(loop) for loop in machine_code.loops]
    if len(loops) != len(trips):
        raise ValueError(f"{launch.kernel.__name__} has {len(loops)} loops instead of {len(trips)}")
    spent = [times * length for times, length in zip(trips, loops, strict=True)]
    whole = machine_code.shortest(past=kind.past) + sum(spent) - sum(loops)
    if kind.begins:
        whole += machine_code.longest(machine_code.loops[0]) - loops[0]
    if kind.streams:
        elements *= trips[0]
        spent = spent[:1]
    return {
        "loop": sum(spent) / elements if spent else None,
        "whole": whole / elements,
        "threads": threads,
        "registers": machine_code.registers,
        "spills": len(machine_code.spills),
        "shared": code.metadata.shared,
        "occupancy": MACHINES[target].occupancy(
            machine_code.registers, threads, code.metadata.shared
        ),
    }


if __name__ == "__main__":
    main()
