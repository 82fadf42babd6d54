"""How differently a Vision Transformer answers to the patches of an image: the entropy of their
similarities.
"""

import math

import torch
from torch import Tensor

BANDWIDTH = 0.01  # of the kernel
POINTS = 10  # at which a density is estimated
FLOOR = 1e-4  # that is added to a density, whose logarithm is taken


def patch_entropy(patches: Tensor) -> Tensor:
    """Return the differential entropy of the cosine similarities of an image's patches, on average.

    Similarities are those of all pairs of different patches. An image of objects on a background
    has two kinds of pairs, so a wide density; noise has one.

    Args:
        patches: (images, patches, channels), two patches or more.

    Returns:
        float32 (), in nats, with a gradient for the patches.

    Source: Li et al., PSAQ-ViT, arXiv 2203.02250, eqs. 5 to 8.
    """
    unit = torch.nn.functional.normalize(patches.float(), dim=-1)
    one, other = torch.triu_indices(unit.shape[1], unit.shape[1], 1, device=unit.device)
    similarities = (unit @ unit.transpose(1, 2))[:, one, other]
    ends = similarities.detach().aminmax()
    at = torch.linspace(0, 1, POINTS, device=unit.device) * (ends.max - ends.min) + ends.min
    return differential_entropy(density(similarities, at), at).mean()


def density(samples: Tensor, at: Tensor) -> Tensor:
    """Estimate the density of each row of samples by Gaussian kernels, (rows, points).

    Args:
        samples: (rows, samples). at: (points,).
    """
    distances = (at[None, :, None] - samples[:, None, :]) / BANDWIDTH
    kernels = (-distances.square() / 2).exp() / (BANDWIDTH * math.sqrt(2 * math.pi))
    return kernels.mean(-1)


def differential_entropy(densities: Tensor, at: Tensor) -> Tensor:
    """Integrate -p log p by trapezia, (rows,)."""
    raised = densities + FLOOR
    return torch.trapezoid(-raised * raised.log(), at, dim=-1)
