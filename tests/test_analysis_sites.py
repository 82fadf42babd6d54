"""What is read off the sites of a model, against plain hooks, numpy and matplotlib."""

import copy

import numpy as np
import pytest
import torch
from matplotlib.cbook import boxplot_stats
from models import MODELS, bert, swin, vit
from torch import nn

from quanttune import quantize
from quanttune.analysis.blocks import OUTSIDE, block_of, block_ranges, find_blocks
from quanttune.analysis.channels import channel_groups
from quanttune.analysis.probes import outputs_of, rounding_sites, sites_of, watch
from quanttune.analysis.sensitivity import relative_error, sensitivity
from quanttune.analysis.survey import describe_outliers, survey


class Scaled(nn.Module):
    """A residual sum with one channel that is huge at one token."""

    def __init__(self) -> None:
        super().__init__()
        self.inner, self.norm, self.head = nn.Linear(6, 6), nn.LayerNorm(6), nn.Linear(6, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.norm(x + self.inner(x)))


@pytest.fixture
def planted():
    """A model, two batches of three samples with five tokens, and its quantized copy."""
    torch.manual_seed(0)
    model = Scaled().eval()
    batches = [torch.randn(3, 5, 6) for _ in range(2)]
    for batch in batches:
        batch[:, 2, 4] = 100.0
    batches[1][2, 1, 3] = -300.0
    return model, batches, quantize(copy.deepcopy(model), 8, data=batches)


def test_watching_shows_the_float_tensors_and_leaves_no_trace(planted):
    model, batches, quantized = planted
    before = [quantized(batch).detach() for batch in batches]
    seen: dict[str, list[torch.Tensor]] = {}
    watch(quantized, batches, lambda site, x, _: seen.setdefault(site, []).append(x.clone()))
    assert seen.keys() == sites_of(quantized).keys()
    for site, expected in {
        "inner.input": batches,
        "head.output": [model(batch) for batch in batches],
        "norm.input": [batch + model.inner(batch) for batch in batches],
    }.items():
        for x, y in zip(seen[site], expected, strict=True):
            torch.testing.assert_close(x, y.detach(), rtol=0, atol=0)
    for batch, y in zip(batches, before, strict=True):
        assert torch.equal(quantized(batch), y)


@pytest.mark.parametrize("name", MODELS)
def test_rounding_nothing_is_the_float_model_and_rounding_all_the_quantized(name):
    example = MODELS[name]()
    model, data = example.model.eval(), [example.inputs]
    quantized = quantize(copy.deepcopy(model), 8, data=data)
    whole = outputs_of(quantized, data)[0]
    with rounding_sites(quantized, ()):
        torch.testing.assert_close(outputs_of(quantized, data)[0], example.logits(model).detach())
    with rounding_sites(quantized, sites_of(quantized), weights=True):
        assert torch.equal(outputs_of(quantized, data)[0], whole)


def test_survey_is_what_numpy_says(planted):
    model, batches, quantized = planted
    found = survey(quantized, batches)
    assert found["inner.input"].aliases == []
    assert found["add0"].aliases == ["norm.input"]
    assert found["norm.output"].aliases == ["head.input"]
    x = torch.cat([batch + model.inner(batch) for batch in batches]).detach().double().numpy()
    one = found["add0"]
    assert one.elements == x.size
    assert (one.low, one.high) == pytest.approx((x.min(), x.max()))
    assert one.absmax == pytest.approx(np.abs(x).max())
    assert one.variance == pytest.approx(x.var(), rel=1e-5)
    rows = np.sort(np.abs(x.reshape(6, -1)), 1)
    medians = rows[:, 14]  # the lower one of 30
    assert one.median == pytest.approx(medians.mean(), rel=1e-5)
    ratios = (rows[:, -1] - medians) / x.reshape(6, -1).std(1, ddof=1)
    assert one.ratio == pytest.approx(ratios.mean(), rel=1e-5)


@pytest.mark.parametrize(
    ("row", "ratio"), [([1.0, -2.0, 3.0, -10.0], 1.399708), ([0.0] * 15 + [5.0], 4.0)]
)
def test_survey_has_the_paper_s_ratio(row, ratio):
    x = torch.tensor([row])
    quantized = quantize(nn.Sequential(nn.Linear(len(row), 2)), data=[x])
    assert survey(quantized, [x])["0.input"].ratio == pytest.approx(ratio, rel=1e-6)


def test_outliers_are_found_where_they_were_planted(planted):
    _, batches, quantized = planted
    where = describe_outliers(survey(quantized, batches)["inner.input"], batches)
    assert (where["channel"], where["token"]) == (4, 2)
    assert (where["channel_share"], where["token_share"]) == pytest.approx((5 / 6, 5 / 6))
    first, second, _ = where["largest"]
    assert first == {"value": 300.0, "sample": 5, "token": 1, "channel": 3, "text": None}
    assert (second["value"], second["token"], second["channel"]) == (100.0, 2, 4)


def test_outlier_tokens_are_named():
    class Tokenizer:
        def convert_ids_to_tokens(self, index: int) -> str:
            return f"word {index}"

    example = bert()
    batches = [{"input_ids": part} for part in example.inputs.split(2)]
    quantized = quantize(example.model.eval(), data=batches)
    found = survey(quantized, batches)["bert.encoder.layer.0.output.add0"]
    for peak in describe_outliers(found, batches, Tokenizer())["largest"]:
        assert peak["text"] == f"word {example.inputs[peak['sample'], peak['token']]}"
    # heads have no channels in common
    score = survey(quantized, batches)["bert.encoder.layer.0.attention.self.attention0_score"]
    assert describe_outliers(score, batches) is None


def test_channels_of_a_convolution_are_its_second_dimension():
    model = nn.Sequential(nn.Conv2d(3, 4, 2, stride=2))
    x = torch.randn(2, 3, 8, 8)
    x[:, 1, 5, 6] = 50.0
    where = describe_outliers(survey(quantize(model, data=[x]), [x])["0.input"], [x])
    assert (where["channel"], where["token"]) == (1, 5 * 8 + 6)


@pytest.mark.parametrize(
    ("make", "expected"),
    [
        (vit, ["blocks.0", "blocks.1"]),
        (swin, ["layers.0.blocks.0", "layers.0.blocks.1", "layers.1.blocks.0"]),
        (bert, ["bert.encoder.layer.0", "bert.encoder.layer.1"]),
    ],
)
def test_blocks_are_the_innermost_repeated_ones(make, expected):
    blocks = find_blocks(make(2).model)
    assert blocks == expected
    assert block_of(f"{blocks[0]}.attn.qkv.input", blocks) == blocks[0]
    assert block_of("patch_embed.proj.input", blocks) == OUTSIDE
    assert block_of("blocks.01", ["blocks.0"]) == OUTSIDE


@pytest.mark.parametrize(("make", "second"), [(vit, "norm2"), (bert, "output.LayerNorm")])
def test_block_ranges_are_those_of_plain_hooks(make, second):
    example = make(2)
    model = example.model.eval()
    batches = list(example.inputs.split(2))
    seen: list[torch.Tensor] = []
    block = find_blocks(model)[1]
    module = model.get_submodule(block)
    norm = module.get_submodule(second)
    handle = norm.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    with torch.no_grad():
        for batch in batches:
            model(batch)
    handle.remove()
    extent, whole = block_ranges(model, batches, 90.0)[block], torch.cat(seen)
    assert (extent.low, extent.high) == (whole.min().item(), whole.max().item())
    assert extent.absmax == whole.abs().max().item()
    quantiles = [np.percentile(x.abs().numpy(), 90) for x in seen]
    assert extent.quantile == pytest.approx(np.mean(quantiles), rel=1e-5)
    assert not norm._forward_pre_hooks


def test_channel_groups_have_the_sizes_and_numbers_of_a_box_plot():
    x = torch.randn(4, 9, 768)
    x[..., 99] *= 40
    groups = channel_groups([x[:2], x[2:]])
    sizes = [group.last - group.first + 1 for group in groups]
    assert sizes == [26] * 18 + [25] * 12
    for group in groups[::7]:
        values = x[..., group.first : group.last + 1].flatten().numpy()
        (box,) = boxplot_stats(values)
        assert (group.quartile_low, group.median, group.quartile_high) == pytest.approx(
            (box["q1"], box["med"], box["q3"])
        )
        assert (group.whisker_low, group.whisker_high) == pytest.approx(
            (box["whislo"], box["whishi"])
        )
        assert (group.low, group.high) == pytest.approx((values.min(), values.max()))
    widest = max(groups, key=lambda group: group.high - group.low)
    assert widest.first <= 99 <= widest.last
    assert len(channel_groups([torch.randn(5, 7)])) == 7


def test_sensitivity_is_the_error_of_a_model_with_one_rounded_tensor(planted):
    model, batches, quantized = planted
    found = survey(quantized, batches)
    kinds = {site: sites_of(quantized)[site].kind for site in found}
    result = sensitivity(quantized, batches, found, kinds)
    expected = [model(batch).detach() for batch in batches]
    with torch.no_grad():  # by hand: only the residual sum is rounded
        sums = [batch + model.inner(batch) for batch in batches]
        step = max(x.abs().max() for x in sums) / 127
        by_hand = [model.head(model.norm((x / step).round() * step)) for x in sums]
        whole = [quantized(batch) for batch in batches]
    error = np.linalg.norm(torch.cat(by_hand) - torch.cat(expected)) / np.linalg.norm(
        torch.cat(expected)
    )
    assert result.sites["add0"] == pytest.approx(error, rel=1e-4)
    assert result.sites.keys() == found.keys()
    assert result.everything == pytest.approx(relative_error(whole, expected), rel=1e-5)
    assert 0 < result.weights < result.activations
    # the planted outlier sits in the input and in the residual sum
    assert min(result.without, key=lambda kind: result.without[kind]) in ("residual", "input")
    assert result.without.keys() == set(kinds.values())
    assert all(error > 0 for error in result.sites.values())
    for kind, error in result.without.items():
        rest = [site for site, one in sites_of(quantized).items() if one.kind != kind]
        aliases = [
            name for site, one in found.items() if kinds[site] == kind for name in one.aliases
        ]
        with rounding_sites(quantized, set(rest) - set(aliases)):
            assert error == relative_error(outputs_of(quantized, batches), expected)


def test_the_kurtosis_of_a_site_is_a_mean_over_samples():
    x = torch.randn(3, 500) ** 3
    x[1, 0] = 60
    model = quantize(nn.Sequential(nn.Linear(500, 2)), 8, data=[x])
    (found,) = (one for name, one in survey(model, [x[:2], x[2:]]).items() if "input" in name)
    centred = x.double() - x.double().mean(1, keepdim=True)
    expected = (centred**4).mean(1) / (centred**2).mean(1) ** 2
    assert found.kurtosis == pytest.approx(expected.mean().item(), rel=1e-5)
    constant = survey(model, [torch.ones(2, 500)])
    assert next(one for name, one in constant.items() if "input" in name).kurtosis == 0
