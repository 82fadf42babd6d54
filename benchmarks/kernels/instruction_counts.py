"""Count the instructions of the C++ kernels per element, in valgrind: no timing, so on any machine.

python -m benchmarks.kernels.instruction_counts --out benchmarks/results/valgrind

Needs valgrind (apt install valgrind; 3.19 was used). It has no AVX-512, so that the kernels take
their AVX2 variant: counts are for comparing one commit with another, not with a machine that has
AVX-512. One thread; the second call is counted, as tables are there then.
"""

import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch

import quanttune._C as _C
from benchmarks import arguments
from benchmarks.kernels import marked_calls
from benchmarks.provenance import commit
from quanttune.files import write_json

# rows and elements of each: ViT-B (197 tokens of 768 channels), a long row, rows without a sample
SIZES = {"ViT-B": (4, 197 * 768), "long": (1, 1_048_576), "short": (16, 36_864)}
VALGRIND = ("valgrind", "--tool=callgrind", "--dump-before=getppid")


def main() -> None:
    options = arguments.of_folder(__doc__).parse_args()
    version = subprocess.run(["valgrind", "--version"], check=True, capture_output=True, text=True)
    rows = [row for size, shape in SIZES.items() for row in counted(size, shape)]
    facts = {"valgrind": version.stdout.strip(), "variant": "AVX2", "sizes": SIZES}
    write_json(options.out / "instructions.json", {**facts, "commit": commit(), "rows": rows})


def counted(size: str, shape: tuple[int, int]) -> list[dict[str, Any]]:
    """Return a row for each kernel and type."""
    with tempfile.TemporaryDirectory() as folder:
        generator = torch.Generator().manual_seed(0)
        x = torch.randn(shape, generator=generator)
        for name in marked_calls.TYPES:
            bits = x.to(getattr(torch, name)).view(torch.uint8)
            (Path(folder) / name).write_bytes(bits.numpy().tobytes())
        script = [sys.executable, "-S", "-E", marked_calls.__file__, _C.__file__, folder]
        command = [*VALGRIND, f"--callgrind-out-file={folder}/out", *script, *map(str, shape)]
        done = subprocess.run(command, check=True, capture_output=True, text=True)
        found = []
        for index, line in enumerate(done.stdout.splitlines()):
            op, name = line.split()
            # a file of counts is begun at each mark: those between a first and a second one
            count = _total(Path(folder) / f"out.{2 * index + 2}") / x.numel()
            if op == "quantization_errors":
                op, count = f"{op}, per candidate", count / marked_calls.CANDIDATES
            found.append({"op": op, "size": size, "dtype": name, "instructions": count})
            print(found[-1], flush=True)
    return found


def _total(path: Path) -> int:
    totals = [line for line in path.read_text().splitlines() if line.startswith("totals:")]
    return int(totals[0].split()[1])


if __name__ == "__main__":
    main()
