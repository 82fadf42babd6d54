"""Statistics that are merged in one launch: the bits of one tensor at a time."""

import pytest
import torch
from interpreted import DEVICE, assert_same_bits, make_rows
from models import MODELS
from oracle import assert_near, gradients, quiet

from quanttune import attach, ops, triton_kernels
from quanttune.triton_kernels import statistics_group

MERGE = statistics_group._merge_kernel


@pytest.fixture
def launches(monkeypatch):
    """The grids that the merge kernel is launched with."""
    grids = []
    launch = type(MERGE).__getitem__

    def record(kernel, grid):
        if kernel is MERGE:
            grids.append(grid)
        return launch(kernel, grid)

    monkeypatch.setattr(type(MERGE), "__getitem__", record)
    return grids


def tensors():
    """Rows that are their own sample and rows that are not, on odd addresses too."""
    rows = make_rows(["normal", "ties", "shifted"], 1700, torch.float32)
    return [
        rows,
        rows[:1, :512].contiguous(),
        rows[:2].bfloat16(),
        rows.half(),
        rows.view(-1)[1:700].view(3, 233),
        rows[:2, :300].contiguous(),
        torch.full((2, 40), torch.nan, device=DEVICE),
    ]


@pytest.mark.parametrize("most_sites", [256, 2])
def test_a_group_has_the_bits_of_one_tensor_at_a_time(
    most_sites, monkeypatch, launches, small_sample
):
    monkeypatch.setattr(statistics_group, "MOST_SITES", most_sites)
    rows = tensors()
    expected = [triton_kernels.outlier_statistics(x, len(x), False) for x in rows]
    assert launches == [(len(x), 1) for x in rows]
    launches.clear()
    group = triton_kernels.StatisticsGroup()
    actual = [triton_kernels.outlier_statistics(x, len(x), False, group=group) for x in rows]
    group.finish()
    for ours, theirs in zip(actual, expected, strict=True):
        assert_same_bits(ours, theirs)
    assert sum(sites for _, sites in launches) == len(expected)
    assert len(launches) < len(expected)
    assert max(sites for _, sites in launches) <= most_sites
    launches.clear()
    group.finish()
    assert not launches


def test_a_group_does_not_keep_much(monkeypatch, launches, small_sample):
    x = make_rows(["normal"], 1700, torch.float32)
    sample_bytes = 4 * 432  # of 425 elements, in whole 32-byte pieces of 2-byte types
    monkeypatch.setattr(statistics_group, "MOST_PENDING", 3 * sample_bytes)
    group = triton_kernels.StatisticsGroup()
    for _ in range(7):
        triton_kernels.outlier_statistics(x, 1, False, group=group)
    group.finish()
    assert launches == [(1, 3), (1, 3), (1, 1)]


@quiet
@pytest.mark.parametrize("keep", [torch.Tensor.clone, lambda x: x], ids=["copied", "as it is"])
def test_a_model_s_sites_are_merged_at_the_end_of_its_forward(keep, monkeypatch, launches):
    """A copy of what autograd saves, as activation offloading makes, comes before the merge."""
    model = MODELS["vit"]().model.to(DEVICE)
    images = torch.randn(2, 3, 16, 16, device=DEVICE)
    alone = observed_gradients(model, images, lambda x: x)
    monkeypatch.setattr(ops, "_gpu", triton_kernels)
    monkeypatch.setattr(ops, "_is_plain_gpu_tensor", lambda x: True)
    launches.clear()
    grouped = observed_gradients(model, images, keep)
    # of each of two steps: input and output of norm and block, and what is between its two layers
    assert sorted(launches) == [(2, 2), (2, 2), (2, 3), (2, 3)]
    assert_near(grouped, alone)


def observed_gradients(model, images, keep):
    tuner = attach(model, 0.5, "constant", include=["blocks.0.norm2", "blocks.0.mlp.*"])
    for _ in range(2):
        with torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x):
            loss = tuner.combine(model(images).square().mean())
        result = gradients(model, loss)
    tuner.detach()
    return result
