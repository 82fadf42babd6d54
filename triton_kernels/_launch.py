"""How every kernel is launched: on the device of its data, with as many threads on any GPU."""

from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor

_LANES = 64 if torch.version.hip else 32


def on_device_of(x: Tensor) -> AbstractContextManager:
    """Make the GPU that holds x the current one: Triton launches on the current one."""
    return torch.cuda.device(x.device) if x.is_cuda else nullcontext()


def options(threads: int) -> dict[str, int | bool]:
    """Return the launch options. A fused multiply-add would round once where two are defined."""
    return {"num_warps": threads // _LANES, "enable_fp_fusion": False}
