"""`quanttune calibrate` and `quanttune evaluate` against plain loops over the same rows."""

import json
import math
import sys
from collections import Counter

import datasets
import numpy as np
import pytest
import torch
import transformers
from cases import LOADERS, bert_case, opt_case, run, save_tokenizer, some_words, vit_case
from equalized import relative
from models import MODELS
from tokenizers import Tokenizer, models, pre_tokenizers
from torch.nn import functional as F

import quanttune as qt
from quanttune.jobs.evaluate import beside
from quanttune.jobs.models import find_model
from quanttune.jobs.publication import held
from quanttune.jobs.settings import Settings


@pytest.fixture(autouse=True)
def _cache(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")


@pytest.fixture
def made(request, tmp_path):
    """Return the class of a case's model, its data's arguments, its rows and their batch."""
    data, rows, batch = request.param(tmp_path)
    arguments = ["--data", tmp_path / data, "--tokens", 5 if request.param is opt_case else 16]
    return getattr(transformers, LOADERS[request.param]), arguments, rows, batch


each_case = pytest.mark.parametrize("made", LOADERS, indirect=True)
with_bert = pytest.mark.parametrize("made", [bert_case], indirect=True)
with_vit = pytest.mark.parametrize("made", [vit_case], indirect=True)
with_opt = pytest.mark.parametrize("made", [opt_case], indirect=True)


@torch.no_grad()
def measured(model, batch):
    """The default metric by hand: accuracy in per cent, or perplexity."""
    logits = model(**batch).logits.double()
    labels = batch["labels"]
    if logits.dim() == 2:
        right = [
            row.argmax().item() == label.item() for row, label in zip(logits, labels, strict=True)
        ]
        return {"accuracy": 100 * sum(right) / len(right)}
    losses = [
        F.cross_entropy(logits[i, j - 1][None], labels[i, j][None]).item()
        for i in range(len(labels))
        for j in range(1, labels.shape[1])
    ]
    return {"perplexity": math.exp(sum(losses) / len(losses))}


@each_case
def test_a_model_is_quantized_and_measured_as_by_hand(made, tmp_path):
    loader, data, rows, batch = made
    out = tmp_path / "deep" / "quantized"
    options = ["--bits", 6, "--weight-bits", 4, "--batch-size", rows, "--no-residual"]
    options += ["--no-symmetric"]
    options += ["--override", "*0*=8", "--override", "*0.*output_quantizer=float"]
    result = run("calibrate", tmp_path / "model", *data, *options, "--out", out)
    assert f"ranges of {rows} rows" in result.output
    model = loader.from_pretrained(tmp_path / "model").eval()
    expected = [measured(model, batch)]
    overrides = {"*0*": {"bits": 8}, "*0.*output_quantizer": None}
    scheme = {"weight_bits": 4, "residual": False, "symmetric": False, "overrides": overrides}
    qt.quantize(model, 6, data=[batch], **scheme)
    expected.append(measured(model, batch))
    loaded = loader.from_pretrained(out).eval()
    assert torch.equal(loaded(**batch).logits, model(**batch).logits)
    file = tmp_path / "numbers" / "a.json"
    split = ["--split", "train"]
    result = run("evaluate", out, *data, *split, "--batch-size", rows - 1, "--json", file)
    found = json.loads(file.read_text())
    assert found["rows"] == rows
    assert found["float"] == pytest.approx(expected[0], rel=1e-5)
    assert found["quantized"] == pytest.approx(expected[1], rel=1e-5)
    assert found["quantization"]["overrides"] == overrides
    assert "W4A6, full_no_softmax" in result.output
    run("evaluate", tmp_path / "model", *data, *split, "--json", file)
    alone = json.loads(file.read_text())
    assert alone["float"] == pytest.approx(expected[0], rel=1e-5)
    assert alone["quantized"] is alone["quantization"] is None


METHODS = ["outlier_suppression", "gptq"]


@pytest.mark.parametrize("made", [bert_case, vit_case], indirect=True)
def test_methods_act_in_the_order_they_are_named(made, tmp_path):
    loader, data, rows, batch = made
    options = ["--coverage", "linear", "--weight-bits", 4, "--json", tmp_path / "a.json"]
    options += ["--method", METHODS[0], "--method", METHODS[1], "--batch-size", rows]
    result = run("calibrate", tmp_path / "model", *data, *options, "--out", tmp_path / "out")
    assert f"ranges of {rows} rows, outlier_suppression, gptq\n" in result.output
    assert json.loads((tmp_path / "a.json").read_text())["quantization"]["methods"] == METHODS
    model = loader.from_pretrained(tmp_path / "model").eval()
    scheme = {"weight_bits": 4, "coverage": "linear", "methods": METHODS}
    expected = qt.quantize(model, **scheme, data=[batch])(**batch).logits
    loaded = loader.from_pretrained(tmp_path / "out").eval()
    assert torch.equal(loaded(**batch).logits, expected)


@pytest.mark.parametrize("calibrator", ["minmax", "dynamic"])
@each_case
def test_the_float_column_of_an_equalized_model_is_the_float_model(made, calibrator, tmp_path):
    loader, data, _, batch = made
    options = ["--method", "smoothquant", "--coverage", "full", "--calibrator", calibrator]
    run("calibrate", tmp_path / "model", *data, *options, "--out", tmp_path / "out")
    expected = loader.from_pretrained(tmp_path / "model").eval()(**batch).logits
    rounded = loader.from_pretrained(tmp_path / "out").eval()(**batch).logits
    settings = Settings(model=str(tmp_path / "out"), data="")
    found = beside(find_model(settings), 0, lambda _, model: {"logits": model(**batch).logits})
    assert relative(found["float"]["logits"], expected) < 1e-5
    assert torch.equal(found["quantized"]["logits"], rounded)
    assert relative(rounded, expected) > 1e-3
    assert found["quantization"]["methods"] == ["smoothquant"]


@with_opt
def test_a_prefix_is_kept_and_measured_with(made, tmp_path):
    loader, data, rows, batch = made
    options = ["--batch-size", rows, "--json", tmp_path / "a.json"]
    with pytest.raises(ValueError, match="--prefix takes data, bos or token ids, got 'w1'"):
        run("calibrate", tmp_path / "model", *data, "--prefix", "w1", "--out", tmp_path / "out")
    result = run(
        "calibrate", tmp_path / "model", *data, *options, "--prefix", "5,6", "--out", tmp_path / "w"
    )
    assert "prefix: 5, 6 ('w1 w2')\n" in result.output
    long = ",".join(["5"] * (16 - batch["input_ids"].shape[1] + 1))  # of 16 positions
    with pytest.raises(
        ValueError, match=rf"takes \d+, and a row has {batch['input_ids'].shape[1]}"
    ):
        run("calibrate", tmp_path / "model", *data, "--prefix", long, "--out", tmp_path / "out")
    kept = qt.prefix(loader.from_pretrained(tmp_path / "model").eval(), [5, 6])
    exact = measured(kept, batch)
    expected = qt.quantize(kept, data=[batch])(**batch).logits
    assert torch.equal(loader.from_pretrained(tmp_path / "w").eval()(**batch).logits, expected)
    run("evaluate", tmp_path / "w", *data, "--split", "train", *options)
    found = json.loads((tmp_path / "a.json").read_text())
    assert found["float"] == pytest.approx(exact, rel=1e-5)
    run("calibrate", tmp_path / "model", *data, "--prefix", "data", "--out", tmp_path / "chosen")
    ids = loader.from_pretrained(tmp_path / "chosen").model.decoder.kept_prefix.tokens.tolist()
    assert 0 < len(ids) < 4


@with_opt
def test_perplexity_of_a_model_that_knows_nothing(made, tmp_path):
    """Uniform logits: the perplexity is the number of words."""
    loader, data, _, _ = made
    model = loader.from_pretrained(tmp_path / "model")
    with torch.no_grad():
        model.lm_head.weight.zero_()  # tied to the embedding
    model.save_pretrained(tmp_path / "model")
    run("evaluate", tmp_path / "model", *data, "--json", tmp_path / "a.json")
    expected = {"perplexity": pytest.approx(model.config.vocab_size, rel=1e-5)}
    assert json.loads((tmp_path / "a.json").read_text())["float"] == expected


@with_vit
def test_limits_draw_rows_by_the_seed(made, tmp_path):
    loader, data, rows, batch = made
    model = loader.from_pretrained(tmp_path / "model").eval()
    with torch.no_grad():
        right = (model(**batch).logits.argmax(-1) == batch["labels"]).float()
    drawn = datasets.Dataset.from_dict({"row": range(rows)}).shuffle(3).select(range(2))["row"]
    options = ["--split", "train", "--limit", 2, "--seed", 3, "--json", tmp_path / "a.json"]
    run("evaluate", tmp_path / "model", *data, *options)
    found = json.loads((tmp_path / "a.json").read_text())
    assert found["rows"] == 2
    assert found["float"] == {"accuracy": 100 * right[list(drawn)].mean().item()}
    options = ["--limit", 2, "--seed", 3, "--out", tmp_path / "out", "--bits", 5]
    run("calibrate", tmp_path / "model", *data, *options)
    expected = qt.quantize(model, 5, data=[batch["pixel_values"][list(drawn)]])
    sites = qt.summary(loader.from_pretrained(tmp_path / "out")).sites
    assert {s.name: s for s in sites} == {s.name: s for s in qt.summary(expected).sites}


@torch.no_grad()
def write_glue(folder, subset, texts, labels):
    """Write rows as a copy of GLUE has them, and a model that gives half of them either label."""
    (folder / "glue" / subset).mkdir(parents=True)
    names = datasets.ClassLabel(names=["unacceptable", "acceptable"])
    features = datasets.Features({"sentence": datasets.Value("string"), "label": names})
    rows = datasets.Dataset.from_dict({"sentence": texts, "label": labels}, features)
    rows.to_parquet(folder / "glue" / subset / "validation-0.parquet")
    paths = f"{{split: validation, path: {subset}/validation-*}}"
    config = f"---\nconfigs:\n- config_name: {subset}\n  data_files: [{paths}]\n---\n"
    (folder / "glue" / "README.md").write_text(config)
    config = MODELS["bert"]().model.config
    config.num_labels = 2
    model = transformers.BertForSequenceClassification(config).eval()
    save_tokenizer(folder / "model")
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder / "model")
    encoded = [tokenizer(text, return_tensors="pt") for text in texts]
    logits = torch.cat([model(**inputs).logits for inputs in encoded])
    model.classifier.bias -= logits.median(0).values
    model.save_pretrained(folder / "model")
    return [int(model(**inputs).logits.argmax()) for inputs in encoded]


@pytest.mark.parametrize(
    ("subset", "names"),
    [("cola", ["matthews_correlation"]), ("mrpc", ["accuracy", "f1"]), ("sst2", ["accuracy"])],
)
def test_subsets_of_glue_have_metrics_of_their_own(subset, names, tmp_path):
    texts = [" ".join(some_words(3)) for _ in range(40)]
    labels = [1] * 25 + [0] * 15
    said = write_glue(tmp_path, subset, texts, labels)
    count = Counter(zip(said, labels, strict=True))
    true, false, missed = count[1, 1], count[1, 0], count[0, 1]
    assert min(true, false, missed, count[0, 0]) > 2
    expected = {
        "accuracy": 2.5 * (true + count[0, 0]),
        "f1": 100 * 2 * true / (2 * true + false + missed),
        "matthews_correlation": 100 * np.corrcoef(said, labels)[0, 1],
    }
    data = ["--data", tmp_path / "glue", "--subset", subset, "--json", tmp_path / "a.json"]
    result = run("evaluate", tmp_path / "model", *data)
    found = json.loads((tmp_path / "a.json").read_text())["float"]
    assert found == pytest.approx({name: expected[name] for name in names}, rel=1e-6)
    assert all(f"{name} " in result.output for name in names)
    run("evaluate", tmp_path / "model", *data, *("--metric", "f1", "--metric", "accuracy"))
    found = json.loads((tmp_path / "a.json").read_text())["float"]
    assert found == pytest.approx({name: expected[name] for name in ("f1", "accuracy")}, rel=1e-6)


@with_bert
def test_scores_are_refused(made, tmp_path):
    (tmp_path / "stsb.csv").write_text("text,other,label\nw1,w2,0.5\nw1,w3,4.25\n")
    with pytest.raises(ValueError, match="scores, such as those of stsb, are not supported"):
        run("evaluate", tmp_path / "model", "--data", tmp_path / "stsb.csv")


# ------------------------------------------------------------------ last words

LETTERS = "abcdefghijklmnopqrstuvwxyz"


def save_letters(folder):
    """Save a tokenizer of letters, and of letters that go on with a word."""
    pieces = ["[PAD]", "[UNK]", *LETTERS, *(f"##{letter}" for letter in LETTERS)]
    vocabulary = {piece: i for i, piece in enumerate(pieces)}
    tokenizer = Tokenizer(models.WordPiece(vocabulary, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="[PAD]", unk_token="[UNK]", eos_token="[PAD]"
    ).save_pretrained(folder)
    return pieces


def next_token(model, ids):
    """Return the likeliest one, and the logarithm of each one's probability."""
    logits = model(torch.tensor([ids])).logits[0, -1].double()
    return logits.argmax().item(), logits.log_softmax(-1)


def likeliest(model, ids):
    return next_token(model, ids)[0]


@torch.no_grad()
def write_last_words(folder):
    """Write texts whose last words have one token or more, some of them as the model likes it."""
    model = MODELS["opt"]().model.eval()
    model.save_pretrained(folder / "model")
    pieces = save_letters(folder / "model")
    texts = []
    for _ in range(24):
        ids = torch.randint(2, 2 + len(LETTERS), (5,)).tolist()
        ids.append(likeliest(model, ids) if len(texts) % 2 else int(torch.randint(2, 28, ())))
        if len(texts) % 3:
            ids.append(likeliest(model, ids) if len(texts) % 4 else int(torch.randint(28, 54, ())))
        texts.append(" ".join(pieces[i] if i < 54 else "a" for i in ids).replace(" ##", ""))
    lines = [json.dumps({"text": text}) for text in texts if " " in text]
    (folder / "lambada.jsonl").write_text("\n".join(lines))
    return model, [text for text in texts if " " in text]


@torch.no_grad()
def plain_last_words(model, tokenizer, texts, tokens=16):
    """Token after token: whether all of a last word is the likeliest, its last; its perplexity."""
    words, lasts, losses = [], [], []
    for text in texts:
        ids = tokenizer(text)["input_ids"]
        before = len(tokenizer(text.rpartition(" ")[0])["input_ids"])
        cut = max(len(ids) - tokens, 0)
        said = [next_token(model, ids[cut:end]) for end in range(before, len(ids))]
        right = [best == i for (best, _), i in zip(said, ids[before:], strict=True)]
        words.append(all(right))
        lasts.append(right[-1])
        losses.append(-sum(logs[i].item() for (_, logs), i in zip(said, ids[before:], strict=True)))
    shares = {"last_word": 100 * np.mean(words), "last_token": 100 * np.mean(lasts)}
    return shares, np.exp(np.mean(losses))


@pytest.fixture
def lambada(tmp_path):
    """Return a model, its quantized twin, their tokenizer, the texts, and where the twin is."""
    model, texts = write_last_words(tmp_path)
    data = ["--data", tmp_path / "lambada.jsonl", "--tokens", 7, "--bits", 5]
    run("calibrate", tmp_path / "model", *data, "--out", tmp_path / "out")
    quantized = transformers.OPTForCausalLM.from_pretrained(tmp_path / "out").eval()
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "out")
    return model, quantized, tokenizer, texts, tmp_path / "out"


@pytest.mark.parametrize("tokens", [None, 5])
def test_last_words_are_those_of_a_plain_loop(tokens, lambada, tmp_path):
    model, quantized, tokenizer, texts, out = lambada
    asked = ["--data", tmp_path / "lambada.jsonl", "--metric", "last_word"]
    asked += ["--metric", "last_token", "--json", tmp_path / "a.json", "--batch-size", 7]
    asked += ["--tokens", tokens] if tokens else []
    run("evaluate", out, *asked)
    found = json.loads((tmp_path / "a.json").read_text())
    assert found["rows"] == len(texts)
    expected, _ = plain_last_words(model, tokenizer, texts, tokens or 16)
    assert 10 < expected["last_word"] < expected["last_token"] < 90
    assert found["float"] == pytest.approx(expected, rel=1e-9)
    expected, _ = plain_last_words(quantized, tokenizer, texts, tokens or 16)
    assert found["quantized"] == pytest.approx(expected, rel=1e-9)
    run("evaluate", out, *asked, "--limit", 3, "--seed", 2)
    found = json.loads((tmp_path / "a.json").read_text())
    drawn = datasets.Dataset.from_dict({"text": texts}).shuffle(2).select(range(3))["text"]
    expected, _ = plain_last_words(model, tokenizer, drawn, tokens or 16)
    assert (found["rows"], found["float"]) == (3, pytest.approx(expected, rel=1e-9))


# ------------------------------------------------------------------ lm_eval

TASK = """
task: lambada_local
dataset_path: json
dataset_kwargs: {{data_files: {{test: {data}}}}}
test_split: test
output_type: loglikelihood
doc_to_text: "{{{{text.rpartition(' ')[0]}}}}"
doc_to_target: "{{{{' ' + text.rpartition(' ')[2]}}}}"
metric_list:
  - {{metric: perplexity, aggregation: perplexity, higher_is_better: false}}
  - {{metric: acc, aggregation: mean, higher_is_better: true}}
"""


@pytest.fixture
def task(tmp_path):
    """Return a file that defines LAMBADA for lm_eval."""
    pytest.importorskip("lm_eval", reason="pip install lm_eval")
    (tmp_path / "task.yaml").write_text(TASK.format(data=tmp_path / "lambada.jsonl"))
    return tmp_path / "task.yaml"


def test_tasks_of_lm_eval_are_those_of_a_plain_loop(lambada, task, tmp_path):
    model, quantized, tokenizer, texts, out = lambada

    def expected(model, texts):
        shares, perplexity = plain_last_words(model, tokenizer, texts)
        found = {"perplexity": perplexity, "acc": shares["last_word"] / 100}
        return pytest.approx({f"lambada_local/{key}": x for key, x in found.items()}, rel=1e-5)

    asked = ["--lm-eval", task, "--json", tmp_path / "a.json", "--batch-size", 4]
    result = run("evaluate", out, *asked)
    found = json.loads((tmp_path / "a.json").read_text())
    assert found["rows"] == found["lm_eval"]["rows"]["lambada_local"] == len(texts)
    assert found["float"] == expected(model, texts)
    assert found["quantized"] == expected(quantized, texts)
    assert found["quantization"]["bits"] == 5
    assert "W5A5, full_no_softmax" in result.output
    run("evaluate", tmp_path / "model", *asked, "--limit", 5)
    found = json.loads((tmp_path / "a.json").read_text())
    assert found["float"] == expected(model, texts[:5])
    assert (found["rows"], found["quantized"]) == (5, None)


def test_tasks_of_lm_eval_that_do_not_fit_are_refused(lambada, task, tmp_path, monkeypatch):
    *_, out = lambada
    for arguments, message in [
        (["--limit", 3], "either --data or --lm-eval"),
        (["--lm-eval", task, "--data", tmp_path / "lambada.jsonl"], "either --data or --lm-eval"),
        (["--lm-eval", task, "--tokens", 8], "--tokens has an effect with --data only"),
        (["--lm-eval", task, "--task", "text-classification"], "got one of text-classification"),
    ]:
        with pytest.raises(ValueError, match=message):
            run("evaluate", out, *arguments)
    from quanttune.jobs import lm_eval_tasks

    def without_its_own(include_defaults):  # there are thousands
        assert include_defaults
        return manager(include_defaults=False)

    manager = lm_eval_tasks.TaskManager
    monkeypatch.setattr(lm_eval_tasks, "TaskManager", without_its_own)
    with pytest.raises(ValueError, match="lm_eval knows no task 'lambda'"):
        run("evaluate", out, "--lm-eval", "lambda")


@pytest.mark.parametrize(
    ("missing", "option", "extra"),
    [("lm_eval", "--lm-eval", "eval"), ("sklearn.metrics", "--data", "tune")],
)
def test_what_is_missing_is_named_with_its_extra(missing, option, extra, tmp_path, monkeypatch):
    for name in ("evaluate", "lm_eval_tasks", "metrics"):
        monkeypatch.delitem(sys.modules, f"quanttune.jobs.{name}", raising=False)
    monkeypatch.setitem(sys.modules, missing, None)
    with pytest.raises(ModuleNotFoundError, match=rf'pip install "quanttune\[{extra}\]"'):
        run("evaluate", tmp_path, option, "any")


@with_bert
def test_a_dry_run_writes_nothing_but_the_numbers(made, tmp_path):
    _, data, _, _ = made
    out, file = tmp_path / "out", tmp_path / "a.json"
    run("calibrate", tmp_path / "model", *data, "--out", out, "--dry-run", "--json", file)
    assert not out.exists()
    sites = json.loads(file.read_text())["summary"]["sites"]
    assert {site["bits"] for site in sites} == {8}
    assert all(site["absmax"] > 0 for site in sites)


@with_bert
def test_dynamic_ranges_need_no_rows(made, tmp_path):
    loader, data, _, batch = made
    options = ["--calibrator", "dynamic", "--out", tmp_path / "out"]
    assert "ranges of 0 rows" in run("calibrate", tmp_path / "model", *data, *options).output
    expected = loader.from_pretrained(tmp_path / "model").eval()
    qt.quantize(expected, calibrator="dynamic")
    loaded = loader.from_pretrained(tmp_path / "out").eval()
    assert torch.equal(loaded(**batch).logits, expected(**batch).logits)
    options = ["--calibrator", "dynamic", "--method", "gptq", "--out", tmp_path / "rounded"]
    assert "ranges of 0 rows, gptq" in run("calibrate", tmp_path / "model", *data, *options).output


@with_bert
def test_what_does_not_fit_is_refused(made, tmp_path):
    _, data, _, _ = made
    out = tmp_path / "out"
    command = ["calibrate", tmp_path / "model", *data, "--out", out]
    for arguments, message in [
        (["--bits", 1], "bits must be from 2 to 16, got 1"),
        (["--override", "head"], "--override takes PATTERN=BITS or PATTERN=float, got 'head'"),
        (["--override", "head=int8"], "got 'head=int8'"),
        (["--override", "head=4"], "override 'head' matches no quantizer"),
        (["--override", "head=4", "--calibrator", "dynamic"], "'head' matches no quantizer"),
        (["--calibrator", "best"], r"--calibrator must be one of minmax, .*dynamic, got 'best'"),
        (
            ["--calibrator", "kl", "--no-symmetric"],
            r"--calib.* minmax, .* with --no-symmetric, got",
        ),
        (
            ["--coverage", "all"],
            "--coverage must be one of weight_only, linear_inputs, .*, full, got",
        ),
        (["--weights", "row"], "--weights must be one of channel, tensor, 128, got 'row'"),
        (["--method", "awe"], "--method must be one of .*gptq, .*erq, .*got 'awe'"),
        (["--method", "gptq", "--method", "repq"], "comes before what rounds it: repq, gptq"),
    ]:
        with pytest.raises(ValueError, match=message):
            run(*command, *arguments)
        assert not out.exists()
    assert run(*command, "--limit", 0).exit_code == 2
    run(*command)
    with pytest.raises(ValueError, match=r"out is not empty: choose another --out"):
        run(*command)
    again = ["calibrate", out, *data, "--out", tmp_path / "again"]
    with pytest.raises(ValueError, match="is quantized already: give the float model"):
        run(*again)
    with held(tmp_path / ".again"), pytest.raises(ValueError, match="another process is at work"):
        run("calibrate", tmp_path / "model", *data, "--out", tmp_path / "again")
    (tmp_path / "other.csv").write_text("text,label\nw1,0\nw2,7\n")
    with pytest.raises(ValueError, match=r"labels of the data \(0, 7\) are not those"):
        run("evaluate", out, "--data", tmp_path / "other.csv")


@with_bert
def test_the_rest_of_a_killed_run_is_replaced(made, tmp_path):
    _, data, _, _ = made
    partial = tmp_path / ".out"
    partial.mkdir()
    (partial / "half.json").write_text("")
    run("calibrate", tmp_path / "model", *data, "--out", tmp_path / "out")
    names = {path.name for path in (tmp_path / "out").iterdir()}
    assert not partial.exists()
    assert names >= {"config.json", "model.safetensors", "tokenizer.json"}
    assert "half.json" not in names


@with_bert
def test_a_model_whose_weights_were_rounded_is_measured_alone(made, tmp_path):
    loader, data, rows, batch = made
    options = ["--method", "smoothquant", "--method", "gptq", "--out", tmp_path / "out"]
    run("calibrate", tmp_path / "model", *data, *options)
    asked = [*data, "--split", "train", "--json", tmp_path / "a.json"]
    result = run("evaluate", tmp_path / "out", *asked)
    found = json.loads((tmp_path / "a.json").read_text())
    expected = measured(loader.from_pretrained(tmp_path / "out").eval(), batch)
    assert found["quantized"] == pytest.approx(expected, rel=1e-5)
    assert found["float"] is None
    table = f"""{rows} rows    quantized (W8A8, full_no_softmax, smoothquant, gptq)
accuracy  {expected["accuracy"]:10.6g}
"""
    assert table in result.output
