"""Images for the calibration of a Vision Transformer, made from the model alone."""

import math
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..progress import Progress, silent
from ..quantization.running import evaluating, main_output, requiring_gradients
from ..quantization.state import refuse_quantized
from ..transaction import transaction
from .patch_similarity import patch_entropy

ROUNDS = (15 / 224, 30 / 224)  # how far images are moved at most, as a share of their width
VARIATION = (2500.0, 3000.0)  # of 32 images of 224 x 224 pixels
OF_VARIATION = 0.05  # its weight in the loss; that of all else is 1
WARM_UP = 0.2  # share of the steps of a round
BETAS = (0.5, 0.9)


def synthesize_images(
    model: nn.Module,
    samples: int = 32,
    *,
    iterations: int = 500,
    learning_rate: float = 0.2,
    seed: int = 0,
    progress: Progress = silent,
) -> Tensor:
    """Make images from a timm Vision Transformer alone, to calibrate it where there are no data.

    They begin as noise, and are changed until the model tells their patches apart (the entropy of
    the patches' similarities, in each attention), finds a class in each, drawn at random, and
    neighbouring pixels differ as much as those of photographs do. `images.split(8)` is for `data`
    of `quantize`. The model stays as it is.

    Args:
        model: a float VisionTransformer of timm, such as a DeiT.
        samples: images, made together. A forward and a backward of all of them, with the
            similarities of all pairs of patches in each block, have to fit into memory.
        iterations: steps of Adam in each of two rounds, as published. In the second one images are
            moved farther before the model sees them.
        seed: of the noise, the classes and the moves.
        progress: called with what is being done, steps done, and of how many.

    Returns:
        float32 (samples, channels, height, width), normalized as the model takes them and within
        what pixels can be (`pretrained_cfg` has both, else ImageNet's mean and deviation), on the
        model's device.

    Raises:
        ValueError: the model is no such transformer, or an argument is out of range.

    Source: Li et al., PSAQ-ViT, arXiv 2203.02250, with the constants of the authors' code.
    """
    if samples < 1 or iterations < 1:
        raise ValueError(
            f"samples and iterations must be 1 or more, got {samples} and {iterations}"
        )
    refuse_quantized(model)
    attentions = _attentions(model)
    generator = torch.Generator().manual_seed(seed)
    device = next(model.parameters()).device
    low, high = (end.to(device) for end in _ends(model))
    shape = (samples, *_image_shape(model))
    images = torch.randn(shape, generator=generator).to(device).requires_grad_(True)
    classes: int = getattr(model, "num_classes", 0)
    labels = torch.randint(max(classes, 1), (samples,), generator=generator).to(device)
    size = math.sqrt(math.prod(shape) / (32 * 3 * 224 * 224))
    wanted = size * float(torch.empty(()).uniform_(*VARIATION, generator=generator))
    optimizer = torch.optim.Adam([images], lr=learning_rate, betas=BETAS)
    with transaction(model), ExitStack() as undo:
        undo.enter_context(evaluating(model))
        undo.enter_context(requiring_gradients(model.parameters(), False))
        undo.enter_context(torch.enable_grad())
        prefix: Any = model.num_prefix_tokens
        seen = undo.enter_context(_watching(attentions, prefix))
        for step in range(len(ROUNDS) * iterations):
            progress("synthesizing images", step, len(ROUNDS) * iterations)
            farthest = round(ROUNDS[step // iterations] * shape[-1])
            optimizer.param_groups[0]["lr"] = learning_rate * _rate(step % iterations, iterations)
            seen.clear()
            moved = _moved(images, farthest, generator)
            answer = main_output(model(moved))
            loss = -torch.stack([patch_entropy(patches) for patches in seen]).sum()
            if classes:
                loss = loss + F.cross_entropy(answer.float(), labels)
            loss = loss + OF_VARIATION * (total_variation(moved) - wanted).abs()
            optimizer.zero_grad()
            loss.backward()  # type: ignore[no-untyped-call]
            optimizer.step()
            with torch.no_grad():
                images.copy_(images.clamp(low, high))
        progress("synthesizing images", len(ROUNDS) * iterations, len(ROUNDS) * iterations)
    return images.detach()


def total_variation(images: Tensor) -> Tensor:
    """Return how much neighbours differ: the norms of differences in four directions, added up.

    Args:
        images: (images, channels, height, width).
    """
    across, down = images[..., :-1] - images[..., 1:], images[..., :-1, :] - images[..., 1:, :]
    rising = images[..., 1:, :-1] - images[..., :-1, 1:]
    falling = images[..., :-1, :-1] - images[..., 1:, 1:]
    return torch.stack([x.norm() for x in (across, down, rising, falling)]).sum()


def _attentions(model: Any) -> list[Any]:
    """Return the attentions of a Vision Transformer of timm.

    Raises:
        ValueError: it is none.
    """
    from timm.layers import Attention

    found = [module for module in model.modules() if isinstance(module, Attention)]
    if not found or not hasattr(model, "num_prefix_tokens") or not hasattr(model, "patch_embed"):
        raise ValueError(
            f"{type(model).__name__} is no VisionTransformer of timm, whose patches are told apart "
            "by attention: calibrate it with data"
        )
    return found


@contextmanager
def _watching(attentions: list[Any], prefix: int) -> Iterator[list[Tensor]]:
    """Yield what each attention makes of patches, the mean of its heads, filled by a forward.

    prefix: tokens before the patches, such as that of the class.
    """
    seen: list[Tensor] = []
    with ExitStack() as undo:
        for attention in attentions:

            def keep(_: Any, args: tuple[Any, ...], attention: Any = attention) -> None:
                heads = args[0].unflatten(-1, (attention.num_heads, -1)).mean(-2)
                seen.append(heads[:, prefix:])

            undo.callback(attention.proj.register_forward_pre_hook(keep).remove)
        yield seen


def _moved(images: Tensor, farthest: int, generator: torch.Generator) -> Tensor:
    """Return images that are shifted along the diagonal, and flipped or not, all alike."""
    by = int(torch.randint(-farthest, farthest + 1, (), generator=generator))
    moved = torch.roll(images, (by, by), (2, 3))
    return moved.flip(3) if torch.rand((), generator=generator) > 0.5 else moved


def _rate(step: int, steps: int) -> float:
    """Return the share of the learning rate: it rises, then falls as a cosine."""
    warm = max(1, round(WARM_UP * steps))
    if step < warm:
        return (step + 1) / warm
    return (1 + math.cos(math.pi * (step - warm) / max(1, steps - warm))) / 2


def _image_shape(model: Any) -> tuple[int, int, int]:
    """Return channels, height and width of what a model takes."""
    return model.patch_embed.proj.in_channels, *model.patch_embed.img_size


def _ends(model: nn.Module) -> tuple[Tensor, Tensor]:
    """Return what black and white are to a model, (channels, 1, 1) or a number."""
    from timm.data import resolve_model_data_config

    config = resolve_model_data_config(model)
    mean, deviation = (torch.tensor(config[name])[:, None, None] for name in ("mean", "std"))
    if len(mean) != _image_shape(model)[0]:  # the defaults are of three channels
        mean, deviation = mean.mean(), deviation.mean()
    return -mean / deviation, (1 - mean) / deviation
