"""`quanttune bench`: what is timed answers right, and what is said of the times is right."""

import copy
import json
import shutil
from dataclasses import asdict
from types import SimpleNamespace

import numpy as np
import onnx
import onnx_files
import pytest
import torch
import transformers
from cases import LOADERS, bert_case, run, save_tokenizer
from models import MODELS, gpt2

import quanttune as qt
from quanttune.deploy import latency
from quanttune.deploy.float_export import export_float
from quanttune.deploy.onnx_model import OnnxModel
from quanttune.deploy.tracing import outputs_by_name
from quanttune.deploy.verification.answers import check_answers
from quanttune.jobs import bench

TOKENS = 16  # the most that the model takes
SCALE = "classifier.weight_quantizer.scale"


@pytest.fixture(scope="module")
def calibrated(tmp_path_factory):
    """Return a folder with a float model, a calibrated one, its file, and both models."""
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("bench")
    *_, batch = bert_case(folder)
    loader = getattr(transformers, LOADERS[bert_case])
    model, floating = (loader.from_pretrained(folder / "model").eval() for _ in range(2))
    (folder / "model").rename(folder / "float")
    inputs = {name: x for name, x in batch.items() if name != "labels"}
    qt.quantize(model, 8, coverage="full", data=[inputs])
    model.save_pretrained(folder / "w8a8")
    for file in (folder / "float").glob("tokenizer*"):
        (folder / "w8a8" / file.name).write_bytes(file.read_bytes())
    dynamic = {0: "batch", 1: "tokens"}
    qt.export_onnx(model, inputs, folder / "integer.onnx", dynamic=dynamic)
    export_float(floating, inputs, folder / "float.onnx", dynamic=dynamic)
    return SimpleNamespace(folder=folder, model=model, floating=floating, inputs=inputs)


def test_quartiles_and_the_speed_of_a_round():
    # float takes 2, 4, 2 and 3 times as long as integer in the same round
    samples = {"float": [2.0, 4.0, 8.0, 6.0], "integer": [1.0, 1.0, 4.0, 2.0]}
    found = latency.summarize(samples)
    assert found["float"] == latency.Timing(5000, (3500, 6500), 1)
    assert found["integer"] == latency.Timing(1500, (1000, 2500), 2.5)


def test_calls_take_turns(monkeypatch):
    calls = []
    clock = iter(range(1000))
    monkeypatch.setattr(latency, "perf_counter", lambda: next(clock))
    turns = {name: lambda name=name: calls.append(name) for name in "ab"}
    samples = latency.in_turns(turns, seconds=0)
    assert "".join(calls) == "aabb" + "ab" * latency.LEAST
    assert samples == {name: [1] * latency.LEAST for name in "ab"}


def test_a_short_call_is_repeated_within_its_turn(monkeypatch):
    calls = []
    now = [0.0]
    monkeypatch.setattr(latency, "perf_counter", lambda: now[0])

    def call():
        calls.append(1)
        now[0] += 0.015625

    (samples,) = latency.in_turns({"a": call}, seconds=0, shortest=0.0625).values()
    assert samples == [0.015625] * latency.LEAST
    assert len(calls) == 2 + 4 * latency.LEAST


@pytest.mark.parametrize(("name", "rows"), [("vit", slice(3)), ("opt", (slice(3), slice(5)))])
def test_the_float_file_is_what_torch_makes_of_the_model(name, rows, tmp_path):
    torch.manual_seed(0)
    example = MODELS[name]()
    model = example.model.eval()
    dynamic = {0: "batch", 1: "tokens"} if name == "opt" else {0: "batch"}
    export_float(model, example.inputs, tmp_path / "float.onnx", dynamic=dynamic)
    with torch.no_grad():
        expected = outputs_by_name(model(example.inputs[rows]))
    actual = OnnxModel(tmp_path / "float.onnx")(example.inputs[rows])
    assert actual.keys() == expected.keys()
    torch.testing.assert_close(*actual.values(), *expected.values(), rtol=1e-4, atol=1e-5)
    plain = torch.onnx.export(model, (example.inputs,), opset_version=20, verbose=False)
    plain.save(tmp_path / "plain.onnx")
    counts, others = (onnx_files.operators(tmp_path / f"{n}.onnx") for n in ("float", "plain"))
    for operator in ("MatMul", "Gemm", "Softmax", "LayerNormalization", "Gelu", "Relu"):
        assert counts[operator] == others[operator]


def test_right_answers_pass(calibrated):
    folder = calibrated.folder
    check_answers(
        folder / "float.onnx",
        folder / "integer.onnx",
        calibrated.floating,
        calibrated.model,
        calibrated.inputs,
    )


def damaged(path, kind, out, factor=0.25):
    """Write a copy of a file, with a quarter of a tensor of floats."""
    model = onnx.load(path)
    tensor = next(t for t in model.graph.initializer if kind in t.name)
    values = onnx.numpy_helper.to_array(tensor) * factor
    tensor.CopyFrom(onnx.numpy_helper.from_array(values.astype("float32"), tensor.name))
    onnx.save(model, out)
    return out


@pytest.mark.parametrize(
    ("which", "kind", "factor", "said"),
    [
        ("float", "word_embeddings", 0.25, "away from the model's"),
        ("float", "word_embeddings", np.nan, "is nan away from the model's"),
        ("integer", SCALE, 0.25, "1 of .* tensors are not those of the model: classifier.weight"),
    ],
)
def test_wrong_answers_are_named(which, kind, factor, said, calibrated, tmp_path):
    folder = calibrated.folder
    files = {name: folder / f"{name}.onnx" for name in ("float", "integer")}
    files[which] = damaged(files[which], kind, tmp_path / "damaged.onnx", factor)
    with pytest.raises(ValueError, match=f"damaged.onnx is not timed.* {said}"):
        check_answers(*files.values(), calibrated.floating, calibrated.model, calibrated.inputs)


def test_a_wrong_file_is_not_timed(calibrated, tmp_path, monkeypatch):
    monkeypatch.setattr(bench, "compare", lambda *_: pytest.fail("it was timed"))
    monkeypatch.setattr(
        bench,
        "export_float",
        lambda *args, **_: shutil.copy(calibrated.folder / "float.onnx", args[2]),
    )
    wrong = damaged(calibrated.folder / "integer.onnx", SCALE, tmp_path / "damaged.onnx")
    with pytest.raises(ValueError, match=r"damaged.onnx is not timed"):
        run("bench", calibrated.folder / "w8a8", "--onnx", wrong, "--batch-size", 8)


def test_the_command_times_both_files(calibrated, tmp_path, monkeypatch):
    seen = []

    def compare(files, batch, threads, seconds):
        seen.append({name: OnnxModel(path)(**batch) for name, path in files.items()})
        times = {"float": [0.01, 0.02, 0.03], "integer": [0.005, 0.01, 0.01]}
        return latency.summarize({name: times[name] for name in files})

    monkeypatch.setattr(bench, "compare", compare)
    file, out = calibrated.folder / "integer.onnx", tmp_path / "a.json"
    said = run(
        "bench", calibrated.folder / "w8a8", "--onnx", file, "--batch-size", 3, "--json", out
    ).output  # fmt: skip
    found = json.loads(out.read_text())
    assert found["inputs"] == {name: [3, TOKENS] for name in calibrated.inputs}
    assert list(found["latency"]) == ["1", "2"]
    for files in found["latency"].values():
        assert files == {
            "float": {**asdict(latency.Timing(20, (15, 25), 1)), "rows_per_second": 150}
            | {"quartiles": [15, 25]},
            "integer": {**asdict(latency.Timing(10, (7.5, 10), 2)), "rows_per_second": 300}
            | {"quartiles": [7.5, 10]},
        }
    sizes = found["bytes"]
    assert sizes["integer"] == file.stat().st_size
    # names in it differ
    assert sizes["float"] == pytest.approx(
        (calibrated.folder / "float.onnx").stat().st_size, rel=0.01
    )
    assert sizes["ratio"] == sizes["integer"] / sizes["float"]
    assert found["environment"]["versions"]["onnxruntime"]
    assert "vnni" in found["environment"]
    assert "2.00x" in said
    assert "7.5 to 10" in said
    # of the same rows, the files answer alike, and not the same
    for outputs in seen:
        values = {name: output["logits"] for name, output in outputs.items()}
        assert all(x.shape == (3, 5) for x in values.values())
        assert not torch.equal(values["float"], values["integer"])
        torch.testing.assert_close(values["float"], values["integer"], rtol=0, atol=0.1)


def test_models_that_methods_changed_are_timed(calibrated, tmp_path, monkeypatch):
    """Even where the weights of the folder, in float, are no longer those of the float model."""
    model, floating = copy.deepcopy(calibrated.floating), calibrated.floating
    options = {"coverage": "linear", "methods": ["smoothquant", "gptq"]}
    qt.quantize(model, 8, **options, data=[calibrated.inputs])
    shutil.copytree(calibrated.folder / "w8a8", tmp_path / "out")
    model.save_pretrained(tmp_path / "out")
    file = tmp_path / "integer.onnx"
    qt.export_onnx(model, calibrated.inputs, file, dynamic={0: "batch", 1: "tokens"})
    timed = []

    def compare(files, batch, threads, seconds):
        timed.append(OnnxModel(files["float"])(**batch)["logits"] - floating(**batch).logits)
        return latency.summarize({name: [1.0, 1.0] for name in files})

    monkeypatch.setattr(bench, "compare", compare)
    run("bench", tmp_path / "out", "--onnx", file, "--batch-size", 2, "--threads", 1)
    assert timed[0].abs().max() > 1e-3


def test_images_and_texts_without_padding_are_drawn():
    model = SimpleNamespace(get_input_embeddings=lambda: torch.nn.Embedding(9, 2))
    rows = {
        "input_ids": torch.tensor([[0, 0, 5], [5, 6, 7]]),
        "attention_mask": torch.tensor([[0, 0, 1], [1, 1, 1]]),
        "token_type_ids": torch.zeros(2, 3, dtype=torch.long),
    }
    batch = bench._batch(rows, model, 40, 11, seed=1)
    assert {name: x.shape for name, x in batch.items()} == dict.fromkeys(rows, (40, 11))
    assert all(x.dtype == torch.long for x in batch.values())
    assert batch["input_ids"].unique().tolist() == list(range(9))
    assert batch["attention_mask"].all()
    assert not batch["token_type_ids"].any()
    images = bench._batch({"pixel_values": torch.ones(2, 3, 4, 5)}, model, 7, 0, seed=1)
    assert images["pixel_values"].shape == (7, 3, 4, 5)
    assert images["pixel_values"].std() > 0.5


def test_what_does_not_fit_is_refused(calibrated):
    file = calibrated.folder / "integer.onnx"
    with pytest.raises(ValueError, match="threads must be 1 or more, got 0"):
        run("bench", calibrated.folder / "w8a8", "--onnx", file, "--threads", 1, "--threads", 0)
    with pytest.raises(ValueError, match="is not quantized: make it so by quanttune calibrate"):
        run("bench", calibrated.folder / "float", "--onnx", file)
    with pytest.raises(ValueError, match="does not say how it was quantized"):
        run("bench", calibrated.folder / "w8a8", "--onnx", calibrated.folder / "float.onnx")


def llama(folder):
    """Save a language model that caches, two queries of which share a key."""
    config = transformers.LlamaConfig(
        vocab_size=60, hidden_size=16, intermediate_size=32, num_hidden_layers=1,
        num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=16,
    )  # fmt: skip
    transformers.LlamaForCausalLM(config).save_pretrained(folder)
    save_tokenizer(folder)


def test_a_language_model_that_caches_is_timed(tmp_path, monkeypatch):
    torch.manual_seed(0)
    llama(tmp_path / "float")
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "float").eval()
    # 7 bits, so that no processor's products saturate
    qt.quantize(model, 8, weight_bits=7, data=[torch.randint(60, (4, 8))])
    assert model.config.use_cache
    model.save_pretrained(tmp_path / "w8a8")
    save_tokenizer(tmp_path / "w8a8")
    run("export", tmp_path / "w8a8", "--out", tmp_path / "model.onnx")
    monkeypatch.setattr(bench, "SECONDS", 0)
    arguments = "--onnx", tmp_path / "model.onnx", "--batch-size", 3, "--threads", 1
    result = run("bench", tmp_path / "w8a8", *arguments, "--json", tmp_path / "a.json")
    assert result.exit_code == 0, result.output
    found = json.loads((tmp_path / "a.json").read_text())
    assert found["inputs"]["input_ids"] == [3, TOKENS]


def test_answers_of_models_that_cache_are_compared(tmp_path):
    torch.manual_seed(0)
    model, batch = gpt2().model, {"input_ids": torch.randint(60, (2, 5))}
    floating, model = model.eval(), copy.deepcopy(model).eval()
    floating.config.use_cache = model.config.use_cache = True
    qt.quantize(model, 8, weight_bits=7, data=[batch])
    qt.export_onnx(model, batch, tmp_path / "integer.onnx", dynamic={})
    export_float(floating, batch, tmp_path / "float.onnx", dynamic={})
    files = [tmp_path / f"{kind}.onnx" for kind in ("float", "integer")]
    check_answers(*files, floating, model, batch)
    with torch.no_grad():
        floating.get_input_embeddings().weight.mul_(1.5)
    with pytest.raises(ValueError, match=r"float.onnx is not timed.* logits is"):
        check_answers(*files, floating, model, batch)
