"""Distribution-guided distillation: a student's patches are as like each other as its teacher's."""

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..quantization.running import evaluating, main_output
from ..transaction import transaction
from .attentions import attentions_of, watch


def distill(
    student: nn.Module, teacher: nn.Module, weight: float = 1.0, temperature: float = 1.0
) -> "Distiller":
    """Return what gives the loss of a student that is to answer, and to attend, as its teacher.

    The student may be quantized, with learned ranges or without, or be attached with finish_steps.
    Call `loss` with what the student returned, and what it was given; add it to the task's, or take
    it alone, since it needs no labels. `detach` when the training is over.

    Args:
        student, teacher: Vision Transformers of timm with as many attentions and heads; the
            teacher, in float, is not changed. Channels may differ.
        weight: of the attentions' term.
        temperature: of the answers' term.

    Raises:
        ValueError: one is no such model, or they do not fit.

    Source: Li et al., Q-ViT, arXiv 2210.06707, section 4.2.
    """
    both = [list(attentions_of(model).values()) for model in (student, teacher)]
    heads = [[attention.num_heads for attention in attentions] for attentions in both]
    if student is teacher:
        raise ValueError("student and teacher are one model: copy.deepcopy it before it is trained")
    if heads[0] != heads[1]:
        raise ValueError(
            f"student and teacher must have as many attentions and heads, got {heads[0]} and "
            f"{heads[1]} heads"
        )
    with transaction(student):
        return Distiller(student, teacher, weight, temperature)


class Distiller:
    """Hears what a student's attentions multiply; see `distill`."""

    def __init__(
        self, student: nn.Module, teacher: nn.Module, weight: float, temperature: float
    ) -> None:
        self.teacher, self.weight, self.temperature = teacher, weight, temperature
        self._seen: list[Tensor] = []
        self._handles = [
            student.register_forward_pre_hook(lambda *_: self._seen.clear()),
            *watch(student, self._seen.append),
        ]

    def loss(self, output: Any, *inputs: Any, **named: Any) -> Tensor:
        """Return the loss of the student's last forward.

        It is the divergence of the teacher's answer from the student's, on average over images, and
        `weight` times `attention_loss`.

        Args:
            output: what the student returned.
            inputs, named: what it was given.

        Raises:
            RuntimeError: no forward of the student was heard, or one without gradients, as behind
                activation checkpoints.
        """
        ours, self._seen[:] = list(self._seen), []
        if not ours or not all(x.requires_grad for x in ours):
            raise RuntimeError(
                "the student's queries and keys have no gradients: call loss after its forward, "
                "with gradients enabled and without activation checkpoints"
            )
        theirs: list[Tensor] = []
        handles = list(watch(self.teacher, theirs.append))
        try:
            with torch.no_grad(), evaluating(self.teacher):
                wanted = main_output(self.teacher(*inputs, **named))
        finally:
            for handle in handles:
                handle.remove()
        logs, targets = (
            F.log_softmax(x.float() / self.temperature, -1) for x in (main_output(output), wanted)
        )
        answers = F.kl_div(logs, targets, log_target=True, reduction="batchmean")
        return self.temperature**2 * answers + self.weight * attention_loss(ours, theirs)

    def detach(self) -> None:
        """Hear no more."""
        for handle in self._handles:
            handle.remove()


def attention_loss(ours: list[Tensor], theirs: list[Tensor]) -> Tensor:
    """Return how far similarities of tokens are from those of a teacher, on average.

    The similarities of a head's queries, or keys, are the products of all pairs, divided by their
    norm; the distance is the norm of the difference. The authors add up over layers and heads.

    Args:
        ours, theirs: (images, heads, tokens, channels) each.
    """
    distances = [
        torch.linalg.matrix_norm(similarities(one) - similarities(other)).mean()
        for one, other in zip(ours, theirs, strict=True)
    ]
    return torch.stack(distances).mean()


def similarities(x: Tensor) -> Tensor:
    """Return the products of all pairs of tokens, of norm 1, (images, heads, tokens, tokens)."""
    products = x.float() @ x.float().transpose(-2, -1)
    norms = torch.linalg.matrix_norm(products, keepdim=True)
    return products / norms.clamp_min(torch.finfo(torch.float32).tiny)
