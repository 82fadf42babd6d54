"""Images that are made from a model: the entropy beside scipy's, and what they end up as."""

import copy
import math

import numpy as np
import pytest
import torch
from models import bert, deit, swin, vit
from oracle import assert_same_bits
from scipy.stats import gaussian_kde
from timm.models import VisionTransformer
from torch import nn

import quanttune as qt
from quanttune.synthesis.images import total_variation
from quanttune.synthesis.patch_similarity import (
    BANDWIDTH,
    FLOOR,
    density,
    differential_entropy,
    patch_entropy,
)

# ------------------------------------------------------------------ the entropy


def test_densities_are_those_of_scipy():
    torch.manual_seed(0)
    samples, at = 0.05 * torch.randn(3, 200), torch.linspace(-0.1, 0.1, 11)
    found = density(samples, at).double().numpy()
    for row, values in zip(found, samples.double().numpy(), strict=True):
        kernels = gaussian_kde(values, bw_method=BANDWIDTH / values.std(ddof=1))
        np.testing.assert_allclose(row, kernels(at.numpy()), rtol=1e-4)


def test_the_entropy_of_a_normal_density_is_the_formula():
    at = torch.linspace(-6, 6, 2001)
    for deviation in (0.5, 1.0):
        densities = (-((at / deviation) ** 2) / 2).exp() / (deviation * math.sqrt(2 * math.pi))
        exact = math.log(deviation * math.sqrt(2 * math.pi * math.e))
        found = differential_entropy(densities[None], at).item()
        assert found == pytest.approx(exact, abs=12 * -FLOOR * math.log(FLOOR) + 1e-3)


def test_patches_by_hand():
    """Three patches: at a right angle, and at 60 degrees to each other. In float64, by numpy."""
    patches = torch.tensor([[[1.0, 0.0], [0.0, 3.0], [0.5, math.sqrt(0.75)]]])
    cosines = np.array([0.0, 0.5, math.sqrt(0.75)])  # of 1 and 2, 1 and 3, 2 and 3
    at = np.linspace(0, math.sqrt(0.75), 10)
    kernels = np.exp(-(((at[:, None] - cosines) / BANDWIDTH) ** 2) / 2)
    raised = (kernels / (BANDWIDTH * math.sqrt(2 * math.pi))).mean(1) + FLOOR
    expected = np.trapezoid(-raised * np.log(raised), at)
    assert patch_entropy(patches).item() == pytest.approx(expected, rel=1e-3)
    assert patch_entropy(7 * patches).item() == pytest.approx(expected, rel=1e-3)
    twice = torch.cat([patches, patches])
    assert patch_entropy(twice).item() == pytest.approx(expected, rel=1e-3)


def test_the_gradient_of_the_entropy_is_that_of_differences():
    torch.manual_seed(0)
    patches = torch.randn(2, 12, 3)
    direction = torch.randn_like(patches)
    leaf = patches.clone().requires_grad_()
    patch_entropy(leaf).backward()
    step = 1e-3
    ahead, behind = (patch_entropy(patches + sign * step * direction) for sign in (1, -1))
    slope = (leaf.grad * direction).sum().item()
    # the ends of the range are constants, so the difference has a part that the slope has not
    assert slope == pytest.approx(((ahead - behind) / (2 * step)).item(), rel=0.5)


def test_variation_by_hand():
    images = torch.tensor([[[[0.0, 3.0], [4.0, 1.0]]]])
    across, down = math.hypot(3, 3), math.hypot(4, 2)
    assert total_variation(images).item() == pytest.approx(across + down + abs(4 - 3) + 1)
    assert total_variation(torch.ones(2, 3, 4, 4)).item() == 0


# ------------------------------------------------------------------ images


def entropy_of(model, images):
    """Return the entropies of all attentions, added up, of heads' means, by a hook on `proj`."""
    found = []
    handles = [
        block.attn.proj.register_forward_pre_hook(
            lambda _, args: found.append(
                patch_entropy(args[0].unflatten(-1, (2, -1)).mean(-2)[:, 1:])
            )
        )
        for block in model.blocks
    ]
    with torch.no_grad():
        model.eval()(images)
    for handle in handles:
        handle.remove()
    return torch.stack(found).sum().item()


def test_images_have_classes_and_patches_that_differ():
    torch.manual_seed(0)
    model = vit(2).model
    for parameter in model.parameters():
        if parameter.dim() > 1:
            nn.init.normal_(parameter, 0, parameter.shape[-1] ** -0.5)
    images = qt.synthesize_images(model, 16, iterations=40)
    assert images.shape == (16, 3, 16, 16)
    assert not images.requires_grad
    mean, deviation = (torch.tensor(x)[:, None, None] for x in (
        (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)))  # fmt: skip
    pixels = images * deviation + mean
    assert -1e-5 <= pixels.min() < 0.1
    assert 0.9 < pixels.max() <= 1 + 1e-5
    noise = torch.randn(16, 3, 16, 16)
    assert entropy_of(model, images) > entropy_of(model, noise) + 0.03
    generator = torch.Generator().manual_seed(0)
    torch.randn(images.shape, generator=generator)  # where they begin
    labels = torch.randint(5, (16,), generator=generator)
    costs = [nn.functional.cross_entropy(model(x), labels).item() for x in (images, noise)]
    assert costs[0] < 0.95 * costs[1]
    assert total_variation(images) < 0.9 * total_variation(noise)


@pytest.mark.parametrize("make", [vit, deit])
def test_the_model_stays_as_it_is(make):
    torch.manual_seed(0)
    model = make().model.train()
    model.head.weight.requires_grad_(False)
    before = copy.deepcopy(model.state_dict())
    images = qt.synthesize_images(model, 4, iterations=2, seed=3)
    assert images.isfinite().all()
    assert_same_bits(model.state_dict(), before)
    assert model.training
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())
    assert all(p.grad is None for p in model.parameters())
    assert [n for n, p in model.named_parameters() if not p.requires_grad] == ["head.weight"]
    torch.manual_seed(7)
    assert torch.equal(qt.synthesize_images(model, 4, iterations=2, seed=3), images)
    assert not torch.equal(qt.synthesize_images(model, 4, iterations=2, seed=4), images)


def test_they_calibrate():
    torch.manual_seed(0)
    model = vit().model.eval()
    images = qt.synthesize_images(model, 8, iterations=3)
    options = {"methods": ["erq"], "data": images.split(4), "coverage": "linear"}
    quantized = qt.quantize(copy.deepcopy(model), 8, **options)
    x = torch.randn(5, 3, 16, 16)
    error = (quantized(x) - model(x)).norm() / model(x).norm()
    assert error < 0.1


def test_models_of_other_channels_and_without_classes():
    torch.manual_seed(0)
    sizes = {"img_size": 8, "patch_size": 4, "embed_dim": 16, "depth": 1, "num_heads": 2}
    gray = VisionTransformer(
        in_chans=1, num_classes=0, class_token=False, global_pool="avg", **sizes
    )
    assert qt.synthesize_images(gray, 2, iterations=1).shape == (2, 1, 8, 8)
    shown = VisionTransformer(num_classes=3, **sizes)
    shown.pretrained_cfg = {"mean": (0.5,) * 3, "std": (0.5,) * 3, "input_size": (3, 8, 8)}
    images = qt.synthesize_images(shown, 8, iterations=3)
    assert images.min() >= -1
    assert images.max() <= 1


def test_progress_is_told():
    told = []
    qt.synthesize_images(vit().model, 2, iterations=2, progress=lambda *what: told.append(what))
    assert told == [("synthesizing images", done, 4) for done in range(5)]


@pytest.mark.parametrize("make", [bert, swin])
def test_other_models_are_refused_by_name(make):
    model = make().model
    with pytest.raises(ValueError, match=f"{type(model).__name__} is no VisionTransformer of timm"):
        qt.synthesize_images(model)


def test_mistakes_are_named():
    model = vit().model
    with pytest.raises(ValueError, match="samples and iterations must be 1 or more, got 0 and 5"):
        qt.synthesize_images(model, 0, iterations=5)
    qt.quantize(model, data=[torch.randn(2, 3, 16, 16)])
    with pytest.raises(ValueError, match="is quantized already"):
        qt.synthesize_images(model)
