"""What a model is called with, of tuples, mappings, dataclasses: by its forward's arguments."""

import warnings
from collections import OrderedDict
from dataclasses import dataclass
from typing import NamedTuple

import pytest
import torch
from torch import Tensor, nn

from quanttune import quantize
from quanttune.analysis.probes import sites_of
from quanttune.batches import arguments_of

A, B, LABELS = torch.randn(3, 4), torch.randn(3, 4), torch.arange(3)


class One(nn.Module):
    def forward(self, x): ...


class Two(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(4, 4), nn.Linear(4, 4)

    def forward(self, a: Tensor, b: Tensor) -> Tensor:
        return self.first(a) + self.second(b)


class Optional(nn.Module):
    def forward(self, input_ids, attention_mask=None, labels=None): ...


class Labelled(nn.Module):
    def forward(self, x, labels=None): ...


class Plane(nn.Module):
    def forward(self, x, y): ...


class Star(nn.Module):
    def forward(self, *inputs, **more): ...


class Packed(nn.Module):
    def forward(self, x, patch_valid=None): ...


@dataclass
class Sample:
    a: Tensor
    b: Tensor


class Named(NamedTuple):
    a: Tensor
    b: Tensor


@pytest.mark.parametrize(
    ("model", "batch", "args", "names"),
    [
        (One(), A, (A,), ""),
        (One(), (A, LABELS), (A,), ""),
        (One(), [A, B], (A,), ""),  # it can take no more: B is a target
        (One(), (A,), (A,), ""),
        (One(), ({"x": A}, LABELS), (), "x"),
        (Two(), (A, B), (A, B), ""),
        (Two(), [A, B], (A, B), ""),
        (Two(), (A, B, LABELS), (A, B), ""),
        (Two(), ((A, B), LABELS), (A, B), ""),
        (Two(), {"a": A, "b": B}, (), "ab"),
        (Two(), OrderedDict(a=A, b=B), (), "ab"),
        (Two(), Sample(A, B), (), "ab"),
        (Two(), Named(A, B), (), "ab"),
        (One(), Named(A, LABELS), (A,), ""),  # names that the forward does not know
        (Optional(), (A, LABELS), (A,), ""),
        (Plane(), (A, B), (A, B), ""),  # without y it would not run
        (Labelled(), (A, B), (A,), ""),  # one that the forward itself calls labels
    ],
)
def test_what_a_batch_is_passed_as(model, batch, args, names):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        given, named = arguments_of(batch, model)
    assert len(given) == len(args)
    assert all(x is y for x, y in zip(given, args, strict=True))
    assert "".join(named) == names


def test_a_dictionary_may_be_the_only_argument():
    batch = {"patches": A, "patch_coord": B}
    (given,), named = arguments_of(batch, Packed())
    assert given == batch
    assert not named


@pytest.mark.parametrize(
    ("model", "message"),
    [
        (Optional(), r"the first 1 \(input_ids\), and could take attention_mask too"),
        (Star(), r"the first 1 \(its first argument\), and could take more too"),
    ],
)
def test_what_may_be_either_is_said(model, message):
    with pytest.warns(UserWarning, match=message):
        assert arguments_of((A, B), model) == ((A,), {})


def test_an_empty_batch_is_refused():
    with pytest.raises(ValueError, match="must hold inputs, got an empty tuple"):
        arguments_of((), One())


def test_ranges_of_two_inputs():
    model, data = Two(), [(A, 3 * B), [2 * A, B]]
    quantized = quantize(model, data=data)
    sites = {site: q.absmax.item() for site, q in sites_of(quantized).items()}
    assert sites["first.input"] == pytest.approx(2 * A.abs().max().item())
    assert sites["second.input"] == pytest.approx(3 * B.abs().max().item())
