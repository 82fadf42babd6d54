"""OAC: GPTQ whose Hessian is that of the model's output."""

from dataclasses import dataclass

from .gptq import GPTQ


@dataclass(frozen=True)
class OAC(GPTQ):
    """Round as GPTQ does, to change the model's answer the least instead of the layer's.

    It is GPTQ(hessian="fisher") under its own name: gradients of each sample, summed over rows. The
    authors take those of a task's loss, with labels; here the answer's own, without.

    Source: Edalati et al., OAC, arXiv 2405.15025.
    """

    name = "oac"
    hessian: str = "fisher"
