"""Encoder-decoders on the command line, against plain loops over the same rows."""

import json

import datasets
import pytest
import torch
from cases import CLS, PAD, SEP, VOCABULARY, run, save_tokenizer, some_words, write_csv
from torch import nn
from torch.nn import functional as F
from torchmetrics.functional.text import sacre_bleu_score, word_error_rate
from transformers import (
    AutoTokenizer,
    BartConfig,
    BartForConditionalGeneration,
    T5Config,
    T5ForConditionalGeneration,
)

import quanttune as qt
from quanttune.jobs import bench, pairs
from quanttune.jobs.encoding import IGNORED
from quanttune.jobs.metrics import measure

WORDS = len(VOCABULARY)
ENDS = {"pad_token_id": PAD, "eos_token_id": SEP, "decoder_start_token_id": CLS}


@pytest.fixture(autouse=True)
def _cache(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")


def bart():
    sizes = {f"{half}_{name}": n for half in ("encoder", "decoder")
             for name, n in (("layers", 1), ("attention_heads", 2), ("ffn_dim", 24))}  # fmt: skip
    return BartForConditionalGeneration(
        BartConfig(
            vocab_size=WORDS, d_model=16, max_position_embeddings=64, bos_token_id=CLS,
            dropout=0.0, init_std=0.7, forced_eos_token_id=None, **ENDS, **sizes,
        )
    )  # fmt: skip


def t5():
    return T5ForConditionalGeneration(
        T5Config(
            vocab_size=WORDS, d_model=16, d_kv=8, d_ff=24, num_heads=2, num_layers=1,
            dropout_rate=0.0, initializer_factor=4.0, **ENDS,
        )
    )  # fmt: skip


@torch.no_grad()
def written(model, read, most):
    """Return the likeliest token after another, without a cache; none behind the end."""
    ids = [CLS]
    while len(ids) <= most and ids[-1] != SEP:
        row = {"input_ids": torch.tensor([read]), "decoder_input_ids": torch.tensor([ids])}
        ids.append(int(model(**row).logits[0, -1].argmax()))
    return ids[1:]


@pytest.fixture(params=[t5, bart])
def made(request, tmp_path):
    """Return a model, the tokens of what it reads, and what the rows say that it should write."""
    torch.manual_seed(0)
    model = request.param().eval()
    model.save_pretrained(tmp_path / "model")
    save_tokenizer(tmp_path / "model")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "model", cls_token="[CLS]")
    tokenizer.save_pretrained(tmp_path / "model")
    texts = [some_words(2 + i) for i in range(6)]
    read = [[CLS, *map(VOCABULARY.index, text), SEP] for text in texts]
    wanted = [some_words(4 + i % 2) for i in range(6)]
    for i in (0, 3):  # two rows whose labels begin as the model does
        ids = written(model, read[i], 22)
        wanted[i] = [VOCABULARY[token] for token in ids if token > SEP] or ["w1"]
    rows = [(" ".join(a), " ".join(b)) for a, b in zip(texts, wanted, strict=True)]
    write_csv(tmp_path / "data.csv", ("source", "target"), rows)
    return model, read, wanted


def batch_of(read, wanted):
    labels = [[CLS, *map(VOCABULARY.index, text), SEP] for text in wanted]

    def padded(rows, value):
        most = max(map(len, rows))
        return torch.tensor([row + [value] * (most - len(row)) for row in rows])

    return {
        "input_ids": padded(read, PAD),
        "attention_mask": padded([[1] * len(row) for row in read], 0),
        "labels": padded(labels, IGNORED),
    }


def test_what_a_decoder_is_called_with_is_its_models_own(made, tmp_path):
    model, read, wanted = made
    batch = batch_of(read, wanted)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "model")
    rows = datasets.Dataset.from_csv(str(tmp_path / "data.csv"))
    encoded, collate = pairs.encode(rows, tokenizer, 32, model.config)
    found = collate([encoded[i] for i in range(6)])
    for name, value in batch.items():
        assert torch.equal(found[name], value), name
    ids = model.prepare_decoder_input_ids_from_labels(batch["labels"].clone())
    assert torch.equal(found["decoder_input_ids"], ids)
    lengths = [len(text) + 2 for text in wanted]
    assert found["decoder_attention_mask"].sum(1).tolist() == lengths
    torch.testing.assert_close(model(**found).loss, model(**batch).loss)


def test_a_model_is_measured_as_by_hand(made, tmp_path):
    model, read, wanted = made
    file, metrics = tmp_path / "a.json", ("exact_match", "bleu", "word_error_rate")
    asked = [part for name in metrics for part in ("--metric", name)]
    data = ["--data", tmp_path / "data.csv", "--tokens", 32, "--batch-size", 4]
    run("evaluate", tmp_path / "model", *data, *asked, "--json", file)
    found = json.loads(file.read_text())
    assert (found["task"], found["rows"]) == ("text2text-generation", 6)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "model")
    texts = []
    for i, row in enumerate(read):
        rows = range(4) if i < 4 else range(4, 6)  # of its batch
        most = 2 * max(len(wanted[j]) + 2 for j in rows) + 8
        texts.append(tokenizer.decode(written(model, row, most), skip_special_tokens=True))
    labels = [" ".join(text) for text in wanted]
    expected = {
        "exact_match": 0,  # none ends in time
        "bleu": 100 * sacre_bleu_score(texts, [[label] for label in labels]).item(),
        "word_error_rate": 100 * word_error_rate(texts, labels).item(),
    }
    assert found["float"] == pytest.approx(expected, rel=1e-5)
    assert found["quantized"] is None
    run("evaluate", tmp_path / "model", *data, "--json", file)
    assert list(json.loads(file.read_text())["float"]) == ["exact_match"]


class Writer(nn.Module):
    """Writes what it reads, behind a token that texts start with."""

    def generate(self, input_ids, attention_mask, max_new_tokens, do_sample, num_beams):
        assert (do_sample, num_beams, attention_mask.sum()) == (False, 1, 9)
        return F.pad(input_ids, (1, 0), value=CLS)[:, : max_new_tokens + 1]


def test_a_hand_worked_case(tmp_path):
    """Right, one word of two wrong, and one word too many: 2 errors in 5 words."""
    save_tokenizer(tmp_path)
    ids = {
        "input_ids": torch.tensor([[5, 6, SEP], [5, 7, SEP], [8, 9, SEP]]),
        "labels": torch.tensor([[5, 6, SEP], [5, 6, SEP], [8, SEP, IGNORED]]),
    }
    names = ("exact_match", "word_error_rate")
    batches = [{**ids, "attention_mask": torch.ones(3, 3)}]
    found = measure(names, Writer(), batches, AutoTokenizer.from_pretrained(tmp_path))
    assert found == pytest.approx({"exact_match": 100 / 3, "word_error_rate": 40})


def test_a_model_is_quantized_as_by_hand(made, tmp_path):
    model, read, wanted = made
    data, out = ["--data", tmp_path / "data.csv", "--tokens", 32], tmp_path / "quantized"
    run("calibrate", tmp_path / "model", *data, "--batch-size", 6, "--out", out)
    batch = batch_of(read, wanted)
    ids = model.prepare_decoder_input_ids_from_labels(batch.pop("labels"))
    mask = torch.tensor([[1] * (len(t) + 2) + [0] * (ids.shape[1] - len(t) - 2) for t in wanted])
    batch |= {"decoder_input_ids": ids, "decoder_attention_mask": mask}
    exact = model(**batch).logits
    expected = qt.quantize(model, data=[batch])(**batch).logits
    found = type(model).from_pretrained(out).eval()(**batch).logits
    assert torch.equal(found, expected)
    assert not torch.equal(found, exact)
    run("evaluate", out, *data, "--json", tmp_path / "a.json", "--metric", "word_error_rate")
    measured = json.loads((tmp_path / "a.json").read_text())
    assert measured["float"].keys() == measured["quantized"].keys() == {"word_error_rate"}


def test_a_model_is_exported_verified_and_timed(made, tmp_path, monkeypatch):
    data, out = ["--data", tmp_path / "data.csv", "--tokens", 32], tmp_path / "quantized"
    run("calibrate", tmp_path / "model", *data, "--batch-size", 6, "--out", out)
    said = run("export", out, "--out", tmp_path / "onnx", "--json", tmp_path / "a.json").output
    assert "MB, from input_ids, attention_mask, decoder_input_ids" in said
    names = ("encoder_model.onnx", "decoder_model_merged.onnx")
    files = [tmp_path / "onnx" / name for name in names]
    assert json.loads((tmp_path / "a.json").read_text())["bytes"] == sum(
        file.stat().st_size for file in files
    )
    loaded = AutoTokenizer.from_pretrained(tmp_path / "onnx")
    assert loaded.get_vocab() == AutoTokenizer.from_pretrained(out).get_vocab()
    told = {path.name for path in (tmp_path / "onnx").iterdir()}
    assert told >= {*names, "config.json", "generation_config.json"}
    metrics = ["--metric", "word_error_rate", "--metric", "bleu", "--batch-size", 4]
    arguments = ["--onnx", tmp_path / "onnx"]
    result = run("verify", out, *arguments, *data, *metrics, "--json", tmp_path / "b.json")
    assert result.exit_code == 0, result.output
    found = json.loads((tmp_path / "b.json").read_text())
    run("evaluate", out, *data, *metrics, "--json", tmp_path / "c.json")
    evaluated = json.loads((tmp_path / "c.json").read_text())["quantized"]
    assert found["measured"]["simulation"] == evaluated
    assert found["measured"]["file"].keys() == evaluated.keys()
    assert run("verify", out, *arguments).exit_code == 0  # on rows of its own
    monkeypatch.setattr(bench, "SECONDS", 0)
    timed = ["--batch-size", 3, "--tokens", 8, "--threads", 1, "--json", tmp_path / "d.json"]
    said = run("bench", out, *arguments, *timed).output
    parts = json.loads((tmp_path / "d.json").read_text())["parts"]
    assert list(parts) == ["encoder", "decoder, a step"]
    sizes = [part["bytes"]["integer"] for part in parts.values()]
    assert sizes == [file.stat().st_size for file in files]
    assert parts["encoder"]["inputs"] == {"input_ids": [3, 8], "attention_mask": [3, 8]}
    step = parts["decoder, a step"]["inputs"]
    assert step["input_ids"] == [3, 1]
    assert step["encoder_attention_mask"] == [3, 8]
    for half in ("decoder", "encoder"):
        assert step[f"past_key_values.0.{half}.key"] == [3, 2, 8, 8]
    assert all(part["latency"]["1"]["integer"]["milliseconds"] > 0 for part in parts.values())
    assert "decoder, a step" in said
    with pytest.raises(ValueError, match="has an encoder and a decoder: export it as onnx"):
        run("export", out, "--out", tmp_path / "e", "--format", "compressed-tensors")


def test_a_model_is_tuned(made, tmp_path):
    model, read, wanted = made
    data = ["--data", tmp_path / "data.csv", "--tokens", 32, "--batch-size", 6]
    options = ["--steps", 2, "--learning-rate", 1e-2, "--alpha", 0.5]
    run("tune", tmp_path / "model", *data, *options, "--out", tmp_path / "run")
    logs = [json.loads(x) for x in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    batch = batch_of(read, wanted)
    logits = model(**batch).logits.double()
    loss = F.cross_entropy(logits.flatten(0, 1), batch["labels"].flatten(), ignore_index=IGNORED)
    assert logs[0]["loss_task"] == pytest.approx(loss.item(), rel=1e-4)
    assert logs[0]["loss_out"] > 1
    tuned = type(model).from_pretrained(tmp_path / "run" / "model").eval()
    assert tuned(**batch).loss.item() < loss.item()


def test_columns_are_told_or_named(made, tmp_path):
    def refused(match, *arguments):
        with pytest.raises(ValueError, match=match):
            run("evaluate", tmp_path / "model", "--data", file, *arguments)

    file = tmp_path / "data.jsonl"
    file.write_text(json.dumps({"a": "w1", "b": "w2", "c": "w3", "n": 1}))
    refused("one to read and one to write, found a, b, c among")
    refused(r"found b among .* say which with --text and --label", "--text", "b")
    refused("found b, n among", "--text", "b", "--label", "n")
    refused("a metric of text2text-generation is one of exact_match, bleu, word_error_rate, got",
            "--text", "b", "--label", "c", "--metric", "f1")  # fmt: skip
    result = run("evaluate", tmp_path / "model", "--data", file, "--text", "c", "--label", "a")
    assert "exact_match" in result.output
    config = T5Config(decoder_start_token_id=None)
    with pytest.raises(ValueError, match="decoder_start_token_id and a pad_token_id, got None"):
        pairs.encode(None, None, 9, config)
