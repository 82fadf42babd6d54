"""Massive activations and attention sinks, against numpy in float64."""

import copy
import json
import math

import numpy as np
import pytest
import torch
from oracle import quiet
from torch import nn

from quanttune import quantize
from quanttune.analysis.analysis import analyze
from quanttune.analysis.massive import Massive
from quanttune.analysis.sinks import sinks_in
from quanttune.analysis.subject import Request, Subject
from quanttune.analysis.survey import ids_of, survey
from quanttune.report.report import build
from quanttune.report.words import percent

pytestmark = quiet


class Sum(nn.Module):
    """A residual sum, whose values the data decide."""

    def __init__(self) -> None:
        super().__init__()
        self.words = nn.Embedding(16, 8)
        self.inner, self.norm, self.head = nn.Linear(8, 8), nn.LayerNorm(8), nn.Linear(8, 3)

    def forward(self, input_ids, attention_mask=None):
        x = self.words(input_ids)
        return self.head(self.norm(x + self.inner(x)))


@pytest.fixture
def planted():
    """A model, batches of ids in which 7 and 9 are massive and 5 is large; 7 is padding once."""
    torch.manual_seed(0)
    model = Sum().eval()
    with torch.no_grad():
        model.inner.weight.zero_()
        model.inner.bias.zero_()
        model.words.weight[7, 3], model.words.weight[9, 6] = -400.0, 900.0
        model.words.weight[5, 2] = 20.0
    ids = torch.randint(10, 16, (5, 12), generator=torch.Generator().manual_seed(1))
    ids[:, 0], ids[2, 4], ids[4, 3] = 7, 9, 5
    ids[1, -2:] = 7
    mask = torch.ones_like(ids)
    mask[1, -2:] = 0
    batches = [
        {"input_ids": ids[:2], "attention_mask": mask[:2]},
        {"input_ids": ids[2:], "attention_mask": mask[2:]},
    ]
    return model, batches


def test_massive_activations_are_what_numpy_says(planted):
    model, batches = planted
    quantized = quantize(copy.deepcopy(model), data=batches)
    found = survey(quantized, batches)["inner.input"]  # the sum is the same
    table = model.words.weight.detach().double().numpy()
    largest, massive, others, medians = [], [], [], []
    for batch in batches:
        for ids, mask in zip(*(batch[k].numpy() for k in batch), strict=True):
            x = np.abs(table[ids[mask == 1]])
            values = np.sort(x.ravel())
            median = values[(len(values) - 1) // 2]  # the lower one
            tops = x.max(1)
            floor = max(100 * median, 10 * np.sort(tops)[(len(tops) - 1) // 2])
            medians.append(median)
            largest += tops.tolist()
            massive += tops[tops >= floor].tolist()
            others += tops[tops < floor].tolist()
    assert sorted(massive) == [400.0] * 5 + [900.0]
    described = found.massive.describe(found.median, ids_of(batches))
    expected = {
        "size": 900.0, "median": np.mean(medians), "channel": 3, "channel_share": 5 / 6,
        "token": 0, "token_share": 5 / 6, "id": 7, "id_share": 5 / 6,
        "tokens": 6 / 58, "below": max(others), "range_share": 1 - max(others) / 900,
    }  # fmt: skip
    assert described == pytest.approx(expected, rel=1e-6)
    assert max(others) == pytest.approx(20.0)


def test_a_tensor_without_them_names_none():
    one = Massive()
    x = torch.randn(2, 5, 8)
    x[0, 1, 2] = 9.0
    one.update(x, torch.ones(2, 5, dtype=torch.bool), [0.7, 0.7], 0)
    assert one.describe(0.7, lambda sample, token: None) is None
    assert one.below == 9.0
    one.update(x * 0, torch.ones(2, 5, dtype=torch.bool), [0.0, 0.0], 2)  # all zeros: no median
    one.update(x, torch.zeros(2, 5, dtype=torch.bool), [0.0, 0.0], 4)  # nothing but padding
    assert one.describe(0.7, lambda sample, token: None) is None
    assert one.tokens == 20
    small = torch.full((1, 5, 8), 0.01)
    small[0, :, 0] = 5.0  # every token has one that is large beside the median
    small[0, 1, 0] = 30.0
    one.update(small, torch.ones(1, 5, dtype=torch.bool), [0.01], 6)
    assert one.describe(0.7, lambda sample, token: None) is None


def test_sinks_get_their_share_and_three_times_their_due():
    alike = torch.full((8, 8), 1 / 8)
    drawn = torch.full((8, 8), 0.25 / 7)
    drawn[:, 2] = 0.75
    x = torch.stack([drawn, alike])[:, None].expand(2, 3, 8, 8)  # rows, heads, queries, keys
    (sink,) = sinks_in(x, None, 2)
    assert sink[:2] == (0, 2)
    assert sink[2:] == pytest.approx((0.75, 1 / 8))
    # the first key of a causal softmax gets more than others of all that see it alike
    scores = torch.zeros(8, 8).masked_fill(~torch.ones(8, 8).bool().tril(), -torch.inf)
    assert sinks_in(scores.softmax(-1)[None, None], None, 1) == []
    # a query and a key that are padding do not count
    counted = torch.ones(1, 1, 8, 8, dtype=torch.bool)
    counted[..., 6:] = False
    counted[..., 6:, :] = False
    padded = drawn.clone()
    padded[:6, 6:], padded[6:] = 0, torch.eye(8)[6:]
    (sink,) = sinks_in(padded[None, None], counted, 1)
    assert sink == (0, 2, pytest.approx(0.75), pytest.approx(1 / 6))


class Attending(Sum):
    """Every query looks for channel 3, where token 7 has a massive activation."""

    def __init__(self, causal: bool) -> None:
        super().__init__()
        self.causal = causal
        self.query, self.key, self.value = (nn.Linear(8, 8) for _ in range(3))

    def forward(self, input_ids, attention_mask=None):
        x = self.words(input_ids)
        mixed = nn.functional.scaled_dot_product_attention(
            self.query(x), self.key(x), self.value(x), is_causal=self.causal
        )
        return self.head(self.norm(x + self.inner(mixed)))


@pytest.mark.parametrize("causal", [False, True], ids=["encoder", "decoder"])
def test_an_analysis_names_both(causal, tmp_path):
    torch.manual_seed(0)
    model = Attending(causal).eval()
    with torch.no_grad():
        model.words.weight[7, 3] = -400.0
        model.query.weight.zero_()
        model.query.bias.copy_(-0.05 * torch.eye(8)[3])
        model.key.weight.copy_(torch.eye(8))
        model.key.bias.zero_()
        model.value.weight.zero_()  # nothing is taken from a sink
    ids = torch.randint(10, 16, (4, 20))
    ids[:, 0] = 7
    data = [{"input_ids": rows} for rows in ids.split(2)]
    subject = Subject("small", model, data, "accuracy", lambda model: 50.0, Words())
    found = analyze(subject, Request(thresholds=(99.0, 100.0), calibrators=("minmax",)))
    (sink,) = found["sinks"]
    assert sink["site"] == "attention0_probability"
    assert (sink["token"], sink["id"], sink["text"], sink["samples"]) == (0, 7, "seven", 2)
    assert sink["attention"] == pytest.approx(attention_to_the_first(model, ids[:2]), rel=1e-5)
    massive = next(site for site in found["sites"] if site["site"] == "add0")["massive"]
    assert (massive["channel"], massive["token"], massive["text"]) == (3, 0, "seven")
    assert massive["tokens"] == pytest.approx(4 / 80)
    assert massive["size"] == pytest.approx(400, abs=20)
    assert massive["range_share"] > 0.9
    page = build([json.loads(json.dumps(found))])
    assert "Massive activations and attention sinks" in page
    assert f"seven ({percent(1.0)})" in page


def attention_to_the_first(model, ids):
    """Return what token 0 gets of all queries, in float64."""
    x = model.words.weight.detach().double().numpy()[ids.numpy()]
    scores = np.broadcast_to((-0.05 * x[..., 3] / math.sqrt(8))[:, None], (2, 20, 20)).copy()
    if model.causal:
        scores[:, np.triu_indices(20, 1)[0], np.triu_indices(20, 1)[1]] = -np.inf
    shares = np.exp(scores) / np.exp(scores).sum(-1, keepdims=True)
    return shares[:, :, 0].mean()


class Words:
    """A tokenizer of one word."""

    def convert_ids_to_tokens(self, token_id):
        return {7: "seven"}.get(token_id, "other")
