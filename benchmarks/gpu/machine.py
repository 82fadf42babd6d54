"""Where the GPU suite runs, and how it takes time there."""

from collections.abc import Callable
from dataclasses import dataclass
from time import perf_counter
from typing import Any

import torch

DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}


@dataclass(frozen=True)
class Machine:
    """A GPU, or in a dry run the CPU with Triton's interpreter."""

    dry: bool

    @property
    def device(self) -> str:
        return "cpu" if self.dry else "cuda"

    def milliseconds(self, call: Callable[[], Any]) -> float:
        """Return the median time of a call that finds nothing of its input in the caches."""
        if self.dry:
            start = perf_counter()
            call()
            return 1e3 * (perf_counter() - start)
        from triton.testing import do_bench

        return do_bench(call, warmup=5, rep=40, return_mode="median")

    def synchronize(self) -> None:
        if not self.dry:
            torch.cuda.synchronize()

    def poison(self, size: int) -> None:
        """Leave NaN in the memory that the next tensors of up to `size` bytes are given."""
        blocks = [
            torch.full((size >> shift,), -1, dtype=torch.int8, device=self.device)
            for shift in range(0, 12, 2)
        ]
        self.synchronize()
        del blocks
