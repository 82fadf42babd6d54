"""Encoders and decoders as two files: what they generate is what `generate` does."""

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from transformers import (
    BartConfig,
    BartForConditionalGeneration,
    BartModel,
    MarianConfig,
    MarianMTModel,
    T5Config,
    T5ForConditionalGeneration,
    WhisperConfig,
    WhisperForConditionalGeneration,
)

import quanttune as qt
from quanttune.deploy.encoder_decoder import CROSS, OWN
from quanttune.deploy.generation import computed_by
from quanttune.deploy.past import PRESENT
from quanttune.deploy.products import explain
from quanttune.deploy.verification import steps
from quanttune.quantization.prefixes.kept_prefix import KeptPrefix
from quanttune.quantization.state import quantizers

WORDS, START, PAD, NEW, STATES = 64, 1, 0, 20, 10
ENDS = {"pad_token_id": PAD, "eos_token_id": 2, "decoder_start_token_id": START}
FILES = ("encoder_model.onnx", "decoder_model_merged.onnx")
STATE, MASK, PAST = "encoder_hidden_states", "encoder_attention_mask", "past_key_values."


def sizes(**more):
    halves = {f"{half}_{name}": n for half in ("encoder", "decoder")
              for name, n in (("layers", 1), ("attention_heads", 4), ("ffn_dim", 48))}  # fmt: skip
    return {"vocab_size": WORDS, "d_model": 32, "init_std": 0.8, **ENDS, **halves, **more}


def t5():
    """Of two decoder layers, behind one of the encoder; more channels than the model has."""
    return T5ForConditionalGeneration(
        T5Config(
            vocab_size=WORDS, d_model=32, d_kv=16, d_ff=48, num_heads=4, num_layers=2,
            num_decoder_layers=1, relative_attention_num_buckets=8,
            relative_attention_max_distance=16, dropout_rate=0.0,
            initializer_factor=4.0, **ENDS,
        )
    )  # fmt: skip


def bart(kind=BartForConditionalGeneration):
    return kind(BartConfig(max_position_embeddings=48, bos_token_id=START, **sizes()))


def marian():
    return MarianMTModel(MarianConfig(max_position_embeddings=48, **sizes()))


def whisper():
    return WhisperForConditionalGeneration(
        WhisperConfig(
            num_mel_bins=8, max_source_positions=STATES, max_target_positions=48,
            bos_token_id=START, suppress_tokens=None, begin_suppress_tokens=None,
            **sizes(decoder_layers=2),
        )
    )  # fmt: skip


def batch_of(model, seed, rows=3, tokens=STATES):
    """Return rows of unequal lengths, and five tokens that the decoder is given."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(3, WORDS, (rows, 5), generator=generator)
    ids[:, 0] = START
    if model.main_input_name == "input_features":
        heard = torch.randn(rows, 8, 2 * STATES, generator=generator)
        return {"input_features": heard, "decoder_input_ids": ids}
    read = torch.randint(3, WORDS, (rows, tokens), generator=generator)
    lengths = tokens - 3 * torch.arange(rows)[:, None]
    mask = (torch.arange(tokens) < lengths).long()
    read = read.where(mask.bool(), torch.tensor(PAD))
    return {"input_ids": read, "attention_mask": mask, "decoder_input_ids": ids}


@pytest.fixture(scope="module", params=[t5, bart, marian, whisper])
def exported(request, tmp_path_factory):
    """A quantized model, and the folder of its files."""
    torch.manual_seed(0)
    model = request.param().eval()
    qt.quantize(model, data=[batch_of(model, 1)], coverage="linear")
    model.generation_config.update(eos_token_id=None, forced_eos_token_id=None)
    folder = tmp_path_factory.mktemp("parts") / "out"
    qt.export_onnx(model, batch_of(model, 2, rows=2), folder, with_past=True)
    return model, folder


class Files:
    """Runs both files as a user would."""

    def __init__(self, folder):
        sessions = (
            onnxruntime.InferenceSession(folder / name, providers=["CPUExecutionProvider"])
            for name in FILES
        )
        self.encoder, self.decoder = sessions
        shapes = {value.name: value.shape for value in self.decoder.get_inputs()}
        self.pasts = {name: x for name, x in shapes.items() if name.startswith(PAST)}

    def read(self, batch):
        """Return what the decoder is told of what is read; it has no keys yet."""
        names = [value.name for value in self.encoder.get_inputs()]
        (states,) = self.encoder.run(None, {name: batch[name].numpy() for name in names})
        told = {STATE: states}
        if "attention_mask" in names:
            told[MASK] = batch["attention_mask"].numpy()
        for name, (_, heads, _, channels) in self.pasts.items():
            told[name] = np.zeros((len(states), heads, 0, channels), np.float32)
        return told

    def step(self, ids, told):
        """Return the logits, and what the decoder is told next."""
        logits, *presents = self.decoder.run(None, {"input_ids": ids, **told})
        return logits, {**told, **dict(zip(self.pasts, presents, strict=True))}


@torch.no_grad()
def test_they_generate_the_tokens_of_the_simulation(exported):
    """Of rows of other lengths and numbers than the example's, one by one and by beams."""
    model, folder = exported
    files, seen = Files(folder), set()
    for rows, tokens in ((3, STATES), (1, 4)):
        batch = batch_of(model, 3, rows, tokens)
        del batch["decoder_input_ids"]
        options = {"do_sample": False, "max_new_tokens": NEW, "num_beams": 1}
        wanted = model.generate(**batch, **options)[:, -NEW:]
        ids, told, found = np.full((rows, 1), START), files.read(batch), []
        for _ in range(NEW):
            logits, told = files.step(ids, told)
            ids = logits[:, -1:].argmax(-1)
            found.append(ids)
        assert (torch.from_numpy(np.concatenate(found, 1)) == wanted).double().mean() >= 0.95
        seen.update(wanted.unique().tolist())
        options["num_beams"] = 2
        wanted = model.generate(**batch, **options)
        with computed_by(folder, model):
            found = model.generate(**batch, **options)
        assert torch.equal(found, wanted)
    assert len(seen) > 2
    assert "forward" not in vars(model)


def test_inputs_and_outputs_have_the_names_and_sizes_of_optimum(exported):
    model, folder = exported
    assert {path.name for path in folder.iterdir()} == {*FILES}
    (reads, returns), (takes, gives) = (
        (
            {
                value.name: [x.dim_param or x.dim_value for x in value.type.tensor_type.shape.dim]
                for value in values
            }
            for values in (graph.input, graph.output)
        )
        for graph in (onnx.load(folder / name).graph for name in FILES)
    )
    batch, read, own = "batch_size", "encoder_sequence_length", "decoder_sequence_length"
    is_whisper = model.main_input_name == "input_features"
    of_tokens = {"input_ids": [batch, read], "attention_mask": [batch, read]}
    assert reads == ({"input_features": [batch, 8, 2 * STATES]} if is_whisper else of_tokens)
    assert returns == {"last_hidden_state": [batch, STATES if is_whisper else read, 32]}
    channels = 16 if isinstance(model, T5ForConditionalGeneration) else 8
    keys = [
        f"{i}.{half}.{part}"
        for i in range(model.config.decoder_layers if is_whisper else 1)
        for half in ("decoder", "encoder")
        for part in ("key", "value")
    ]
    lengths = {"decoder": f"past_{own} + {own}", "encoder": read}
    assert takes == {
        "input_ids": [batch, own],
        STATE: [batch, read, 32],
        **({} if is_whisper else {MASK: [batch, read]}),
        **{f"{PAST}{x}": [batch, 4, f"past_{x[2:9]}_sequence_length", channels] for x in keys},
    }
    assert list(takes)[-len(keys) :] == [f"{PAST}{name}" for name in keys]
    assert gives == {
        "logits": [batch, own, WORDS],
        **{f"present.{name}": [batch, 4, lengths[name[2:9]], channels] for name in keys},
    }
    assert list(gives) == ["logits", *(f"present.{name}" for name in keys)]
    for name in FILES:
        others = {x.name for x in explain(folder / name).products if not x.is_integer}
        assert others == {x for x in others if "conv" in x}  # which the coverage leaves in float


def test_keys_of_the_encoder_are_computed_once_and_padding_is_not_looked_at(exported):
    model, folder = exported
    files, batch = Files(folder), batch_of(model, 4)
    ids, told = batch["decoder_input_ids"].numpy(), files.read(batch)
    first, later = files.step(ids[:, :2], told)
    if MASK in told:
        told = dict(told)
        told[STATE] = np.where(told[MASK][:, :, None] == 1, told[STATE], 7).astype(np.float32)
        np.testing.assert_allclose(files.step(ids[:, :2], told)[0], first, atol=1e-5)
    second, _ = files.step(ids[:, 2:], later)
    np.testing.assert_array_equal(
        files.step(ids[:, 2:], {**later, STATE: 0 * later[STATE]})[0], second
    )
    whole, _ = files.step(ids, files.read(batch))
    np.testing.assert_allclose(np.concatenate([first, second], 1), whole, atol=1e-4)


@torch.no_grad()
def test_verify_compares_both_and_names_what_is_wrong(exported, tmp_path):
    model, folder = exported
    found = qt.verify(folder, model, iter([batch_of(model, 5), batch_of(model, 6, 2)]))
    assert found.passed, found.problems
    names = ["last_hidden_state", "logits", "keys and values"]
    assert [output.name for output in found.outputs] == names
    assert found.outputs[1].file.argmax >= 0.95
    rounded = {layer.site for layer in found.layers} | {x.split(".codes")[0] for x in found.merged}
    assert rounded == set(quantizers(model))
    assert "forward" not in vars(model)
    for name in FILES:
        for other in FILES:
            (tmp_path / other).write_bytes((folder / other).read_bytes())
        file = onnx.load(folder / name)
        (tensor, values), *_ = sorted(
            ((x, onnx.numpy_helper.to_array(x)) for x in file.graph.initializer),
            key=lambda pair: pair[1].size * (pair[1].dtype == np.float32),
            reverse=True,
        )
        tensor.CopyFrom(onnx.numpy_helper.from_array(3 * values, tensor.name))
        onnx.save(file, tmp_path / name)
        problems = qt.verify(tmp_path, model, [batch_of(model, 5)]).problems
        assert (
            "not those of the model" in problems[0] or "first layer that disagrees" in problems[0]
        )
    with pytest.raises(ValueError, match="is one of two files: give their folder"):
        qt.verify(folder / FILES[1], model, [batch_of(model, 5)])
    (tmp_path / FILES[0]).unlink()
    with pytest.raises(FileNotFoundError, match=r"encoder_model\.onnx"):
        qt.verify(tmp_path, model, [batch_of(model, 5)])


def test_a_past_holds_the_first_half_of_the_encoder_s_keys():
    """A decoder computes the others from the states behind as many as there are in the past."""
    names = [f"0.{CROSS}key", f"0.{OWN}key"]
    keys = torch.arange(5.0).view(1, 1, 5, 1)

    def model(input_ids, encoder_hidden_states):
        own = keys[:, :, : input_ids.shape[1]]
        return {f"{PRESENT}{name}": x for name, x in zip(names, (keys, own), strict=True)}

    call = {"input_ids": torch.arange(7)[None], "encoder_hidden_states": torch.zeros(1, 5, 1)}
    first = next(steps._stepwise(model, [None], lambda *_: call))
    assert first["input_ids"].tolist() == [[3, 4, 5, 6]]
    assert first[f"{PAST}{names[0]}"].flatten().tolist() == [0, 1]
    assert first[f"{PAST}{names[1]}"].flatten().tolist() == [0, 1, 2]


def test_what_cannot_be_exported_is_refused(tmp_path):
    torch.manual_seed(0)
    model = marian().eval()
    batch = batch_of(model, 1, rows=2)
    headless = qt.quantize(bart(BartModel).eval(), data=[batch], coverage="linear_inputs")
    with pytest.raises(ValueError, match="for models that tell the next token: BartModel has no"):
        qt.export_onnx(headless, batch, tmp_path / "out", with_past=True)
    qt.quantize(model, data=[batch], coverage="linear_inputs")
    short = {name: x for name, x in batch.items() if name != "decoder_input_ids"}
    behind = torch.tensor([[0, 1, 1, 1, 1], [1, 1, 1, 1, 1]])
    for example, said in (
        (short, "decoder_input_ids at least: got input_ids, attention_mask"),
        ({**batch, "inputs_embeds": behind}, "at least: got .* inputs_embeds"),
        ({**batch, "decoder_attention_mask": behind}, "no padding in front: decoder_attention"),
        (
            {**batch, "attention_mask": batch["attention_mask"][:, :4]},
            r"attention_mask and input_ids must belong together, and are of .*\[2, 4\]",
        ),
    ):
        with pytest.raises(ValueError, match=said):
            qt.export_onnx(model, example, tmp_path / "out", with_past=True)
    model.model.decoder.kept_prefix = KeptPrefix(*torch.zeros(3, 1))
    with pytest.raises(ValueError, match="the decoder of MarianMTModel keeps a prefix"):
        qt.export_onnx(model, batch, tmp_path / "out", with_past=True)
    del model.model.decoder.kept_prefix
    (tmp_path / "file").write_text("")
    for name in ("file", "out.onnx"):
        with pytest.raises(NotADirectoryError, match="must be a folder, for two files, got the"):
            qt.export_onnx(model, batch, tmp_path / name, with_past=True)
    with pytest.raises(FileNotFoundError, match="there is no folder"):
        qt.export_onnx(model, batch, tmp_path / "none" / "out", with_past=True)
    assert not (tmp_path / "out").exists()
    assert "forward" not in vars(model)
