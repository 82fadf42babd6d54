"""DoReFa: weights go through a tanh before they are rounded."""

import torch
from torch import Tensor


def squashed(weight: Tensor, top: Tensor) -> Tensor:
    """Return tanh(weight), stretched so that its largest magnitude is `top`.

    Large values are drawn together, so that the steps between small ones become smaller. The
    gradient reaches each value by the slope of its tanh, and the largest by that of the stretching
    too.

    Args:
        weight: any shape; a layer's, of which the largest magnitude counts.
        top: float32 (). The authors' is 1; a pretrained model wants its own: `top_of`.

    Source: Zhou et al., DoReFa-Net, arXiv 1606.06160, eq. 9, but for the grid: theirs has no code
    for 0.
    """
    curved = weight.float().tanh()
    largest = curved.abs().amax().clamp_min(torch.finfo(torch.float32).tiny)
    return (curved * (top / largest)).to(weight.dtype)


def top_of(weight: Tensor) -> Tensor:
    """Return the largest magnitude of a weight, float32 ()."""
    return weight.detach().float().abs().amax()
