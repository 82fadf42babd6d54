"""Padding stays out of calibration and analysis: both are those of the samples without it."""

import copy

import pytest
import torch
from models import MODELS, TOKENS
from torch import Tensor, nn
from transformers.tokenization_utils_base import BatchEncoding

from quanttune import quantize
from quanttune.analysis.blocks import block_ranges
from quanttune.analysis.probes import outputs_of, sites_of
from quanttune.analysis.survey import survey
from quanttune.analysis.sweep import Trials, site_errors
from quanttune.quantization.token_mask import counting, inside

LENGTHS = (5, TOKENS, 2, 4)
NEAR = {"rtol": 1e-5, "atol": 1e-6}  # a row of a batch, and the same alone
each_model = pytest.mark.parametrize("name", ["bert", "opt"])


def prepared(name: str, attention: str = "sdpa") -> tuple[nn.Module, dict[str, Tensor], list]:
    """Return a model, a padded batch, and its samples without padding."""
    example = MODELS[name]()
    model = example.model.eval()
    model.set_attn_implementation(attention)
    lengths = torch.tensor(LENGTHS)
    mask = (torch.arange(TOKENS) < lengths[:, None]).long()
    alone = [
        {"input_ids": ids[None, :length]}
        for ids, length in zip(example.inputs, LENGTHS, strict=True)
    ]
    return model, {"input_ids": example.inputs, "attention_mask": mask}, alone


def ranges(model: nn.Module, data: list, **options) -> dict[str, float]:
    quantized = quantize(copy.deepcopy(model), data=data, coverage="full", **options)
    return {site: q.absmax.item() for site, q in sites_of(quantized).items()}


@each_model
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_ranges_are_those_of_the_samples_alone(name, attention):
    model, padded, alone = prepared(name, attention)
    expected, actual = ranges(model, alone), ranges(model, [padded])
    assert actual == pytest.approx(expected, rel=1e-5)
    assert sum(site.endswith("probability") for site in actual) == (attention == "sdpa")
    counted_in = ranges(model, [padded], mask=None)
    assert sum(counted_in[site] > 1.01 * expected[site] for site in actual) > 2


def test_the_mask_may_be_positional_or_a_function_or_in_an_encoding():
    model, padded, alone = prepared("bert")
    expected = ranges(model, alone)
    assert ranges(model, [BatchEncoding(padded)]) == pytest.approx(expected, rel=1e-5)
    words = {"input_ids": padded["input_ids"], "token_type_ids": padded["input_ids"] * 0}
    assert ranges(model, [words], mask=lambda given: padded["attention_mask"]) != expected
    hidden = {**padded, "token_type_ids": words["token_type_ids"]}
    by_function = ranges(model, [hidden], mask=lambda given: given["attention_mask"])
    assert by_function == pytest.approx(expected, rel=1e-5)


@each_model
def test_the_survey_is_that_of_the_samples_alone(name):
    model, padded, alone = prepared(name)
    quantized = quantize(copy.deepcopy(model), data=alone, coverage="full")
    expected, actual = survey(quantized, alone), survey(quantized, [padded])
    assert actual.keys() >= expected.keys()
    for site, found in expected.items():
        if found.elements == actual[site].elements:  # not of a table of positions
            for part in ("low", "high", "median", "ratio", "variance"):
                wanted = getattr(found, part)
                assert getattr(actual[site], part) == pytest.approx(wanted, **approx()), part
            places = [(peak.sample, peak.token, peak.channel) for peak in found.peaks]
            assert [(p.sample, p.token, p.channel) for p in actual[site].peaks] == places
    same = [site for site in expected if actual[site].elements == expected[site].elements]
    assert len(same) > 0.9 * len(expected)


def approx() -> dict[str, float]:
    return {"rel": NEAR["rtol"], "abs": NEAR["atol"]}


@each_model
def test_errors_blocks_and_outputs_are_those_of_the_samples_alone(name):
    model, padded, alone = prepared(name)
    trials = Trials(model, alone, lambda m: 0.0)
    quantized = trials.minmax
    found = survey(quantized, alone)
    expected = site_errors(quantized, alone, found, [trials["percentile"]])
    actual = site_errors(quantized, [padded], found, [trials["percentile"]])
    for site, errors in expected.items():
        if errors.split[0].elements == actual[site].split[0].elements:
            saturation = errors.split[0].saturation
            assert actual[site].split[0].saturation == pytest.approx(saturation, 1e-3, 1e-6)
    blocks = block_ranges(model, [padded], 99.0)
    for block, one in block_ranges(model, alone, 100.0).items():
        assert blocks[block].high == pytest.approx(one.high, rel=1e-5)
    sequences = [y for y in outputs_of(model, alone) if y.dim() == 3]
    (logits,) = outputs_of(model, [padded])
    if sequences:
        joined = torch.cat([y.flatten() for y in sequences])
        torch.testing.assert_close(logits.flatten(), joined, **NEAR)


@pytest.mark.parametrize(
    ("kind", "shape", "expected"),
    [
        ("input", (2, 3, 4), (2, 3, 1)),
        ("input", (6, 4), (6, 1)),
        ("input", (2, 4), None),  # pooled
        ("residual", (1, 3, 4), None),  # positions
        ("operand", (2, 5, 3, 4), (2, 1, 3, 1)),
        ("operand", (2, 5, 4, 3), (2, 1, 1, 3)),  # transposed keys
        ("operand", (10, 3, 4), (10, 3, 1)),  # heads and samples in one
        ("operand", (2, 5, 3, 3), (2, 1, 3, 1)),
        ("score", (2, 5, 3, 3), (2, 1, 3, 3)),
        ("score", (2, 5, 1, 3), (2, 1, 1, 3)),  # one query
        ("operand", (3, 5, 3, 4), None),
        ("input", (), None),
    ],
)
def test_where_the_tokens_of_a_tensor_are(kind, shape, expected):
    mask = torch.tensor([[1, 1, 0], [1, 0, 0]])

    class Model(nn.Module):
        def forward(self, input_ids, attention_mask):
            return inside(torch.zeros(shape), kind)

    batch = {"input_ids": mask, "attention_mask": mask}
    model = Model()
    with counting(model, batch):
        found = model(**batch)
        assert (None if found is None else tuple(found.shape)) == expected
        if kind == "score" and shape[-2] == 3:
            assert torch.equal(found[:, 0], mask[:, :, None].bool() & mask[:, None].bool())
    assert model(**batch) is None
    with counting(model, {**batch, "attention_mask": torch.ones(2, 3)}):
        assert model(**batch) is None
