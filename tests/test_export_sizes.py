"""Files run at every pair of lengths that the model does, and return no caches."""

import copy

import numpy as np
import onnx
import onnx_files
import pytest
import torch
import transformers as tf
from torch import nn

import quanttune as qt
from quanttune.deploy.float_export import export_float
from quanttune.deploy.onnx_model import OnnxModel
from quanttune.deploy.verification.answers import check_answers

TEXT = {0: "batch", 1: "tokens"}
SIZES = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1}
_WORDS = {**SIZES, "vocab_size": 64, "num_attention_heads": 4}
_IMAGES = {**SIZES, "num_attention_heads": 2, "image_size": 8, "patch_size": 4}
_BART = {
    "vocab_size": 64, "d_model": 16, "encoder_layers": 1, "decoder_layers": 1,
    "encoder_attention_heads": 2, "decoder_attention_heads": 2, "encoder_ffn_dim": 32,
    "decoder_ffn_dim": 32, "max_position_embeddings": 32, "pad_token_id": 1, "bos_token_id": 0,
    "eos_token_id": 2, "decoder_start_token_id": 2,
}  # fmt: skip
_T5 = {
    "vocab_size": 64, "d_model": 16, "d_kv": 8, "d_ff": 32, "num_layers": 1, "num_heads": 2,
    "decoder_start_token_id": 0,
}  # fmt: skip


class Two(nn.Module):
    """Two inputs whose lengths have nothing to do with each other, but for a product of both."""

    def __init__(self):
        super().__init__()
        self.first, self.second, self.head = (nn.Linear(8, 8) for _ in range(3))

    def forward(self, a, b):
        places = torch.arange(b.shape[1])[None, :, None] * 0.01
        return self.head((self.second(b) + places) @ self.first(a).mT @ a)


class Tables(nn.Module):
    """Queries and passages, as many as there are of each, all of one length."""

    def __init__(self):
        super().__init__()
        self.encode = nn.Linear(8, 8)

    def forward(self, queries, passages):
        queries, passages = (self.encode(x.mean(1)) for x in (queries, passages))
        return queries.tanh() @ passages.sigmoid().mT


def words(*shape):
    return torch.randint(5, 60, shape)


def pair(rows, source, target):
    return {
        "input_ids": words(rows, source),
        "attention_mask": torch.ones(rows, source, dtype=torch.long),
        "decoder_input_ids": words(rows, target),
    }


def two(rows, source, target):
    return {"a": torch.randn(rows, source, 8), "b": torch.randn(rows, target, 8)}


def tables(rows, _, others):
    return {"queries": torch.randn(rows, 4, 8), "passages": torch.randn(others, 4, 8)}


def captions(rows, _, target):
    return {"pixel_values": torch.randn(rows, 3, 8, 8), "decoder_input_ids": words(rows, target)}


def bart():
    return tf.BartForConditionalGeneration(tf.BartConfig(**_BART))


def t5():
    return tf.T5ForConditionalGeneration(tf.T5Config(**_T5))


def captioner():
    decoder = tf.BertConfig(**_WORDS, is_decoder=True, add_cross_attention=True)
    encoder = tf.ViTModel(tf.ViTConfig(**_IMAGES), add_pooling_layer=False)
    return tf.VisionEncoderDecoderModel(encoder=encoder, decoder=tf.BertLMHeadModel(decoder))


# what makes a model and a batch of it, the free dimensions, and their names by input
MODELS = {
    "two": (Two, two, TEXT, ["batch tokens 8", "batch b_tokens 8"]),
    "tables": (Tables, tables, {0: "rows"}, ["rows 4 8", "passages_rows 4 8"]),
    "bart": (bart, pair, TEXT,
             ["batch tokens", "attention_mask_batch tokens", "batch decoder_input_ids_tokens"]),
    "t5": (t5, pair, TEXT,
           ["batch tokens", "attention_mask_batch tokens", "batch decoder_input_ids_tokens"]),
    "captioner": (captioner, captions, TEXT, ["batch 3 8 8", "batch tokens"]),
}  # fmt: skip


def caches(model):
    """Return whether the configurations of modules ask for caches."""
    configured = [(name, m.config) for name, m in model.named_modules() if hasattr(m, "config")]
    return {name: getattr(config, "use_cache", None) for name, config in configured}


FLOAT = {"two", "bart"}  # the file without quantization is compared, too


@pytest.mark.filterwarnings("ignore:dimension 1 .tokens. is fixed:UserWarning")
@pytest.mark.parametrize("name", MODELS)
@torch.no_grad()
def test_files_run_at_every_pair_of_lengths(name, tmp_path):
    """Close to the simulation: codes that flip move less than all roundings do."""
    torch.manual_seed(0)
    make, rows, dynamic, names = MODELS[name]
    floating = make().eval()
    before = caches(floating)
    for parameter in floating.parameters():
        if parameter.dim() > 1:
            nn.init.normal_(parameter, 0, parameter.shape[-1] ** -0.5)
    model, path = copy.deepcopy(floating), tmp_path / "model.onnx"
    # 7 bits, so that no processor's products saturate
    qt.quantize(model, 8, weight_bits=7, data=[rows(4, 9, 9)])
    example = rows(2, 6, 6)
    qt.export_onnx(model, example, path, dynamic=dynamic)
    if name in FLOAT:
        export_float(floating, example, tmp_path / "float.onnx", dynamic=dynamic)
    graph = onnx.load(path).graph
    shapes = [value.type.tensor_type.shape.dim for value in graph.input]
    assert [" ".join(str(d.dim_param or d.dim_value) for d in shape) for shape in shapes] == names
    wanted = {"logits", "encoder_last_hidden_state", "output"}
    assert {value.name for value in graph.output} <= wanted
    file = OnnxModel(path)
    for size in ((2, 6, 4), (2, 4, 6), (1, 3, 12), (3, 12, 1)):
        batch = rows(*size)
        exact, expected = floating(**batch), model(**batch)
        exact, expected = (getattr(x, "logits", x) for x in (exact, expected))
        key = "output" if name in ("two", "tables") else "logits"
        error = (file(**batch)[key] - expected).abs().mean()
        assert error < (exact - expected).abs().mean() / 2
        if name in FLOAT:
            found = OnnxModel(tmp_path / "float.onnx")(**batch)[key]
            torch.testing.assert_close(found, exact, rtol=1e-4, atol=1e-5)
    if name == "bart":  # what bench compares
        check_answers(tmp_path / "float.onnx", path, floating, model, rows(2, 6, 4))
    assert caches(model) == before


class Fixed(nn.Module):
    """Takes texts of four tokens."""

    def __init__(self):
        super().__init__()
        self.mix = nn.Linear(4, 4)

    def forward(self, words):
        return self.mix(words.mT)


def test_what_the_code_fixes_is_refused_or_said(tmp_path):
    x = torch.randn(3, 4, 8)
    model = qt.quantize(Fixed().eval(), data=[x])
    with pytest.raises(ValueError, match=r"dimension 1 \(tokens\) is fixed .* code: 4 in words"):
        qt.export_onnx(model, x, tmp_path / "model.onnx", dynamic=TEXT)
    with pytest.raises(ValueError, match=r"dimension 3 \(depth\), which no input has"):
        qt.export_onnx(model, x, tmp_path / "model.onnx", dynamic={0: "batch", 3: "depth"})
    assert not list(tmp_path.iterdir())


def test_one_dimension_that_is_fixed_beside_a_free_one_is_said(tmp_path):
    class Both(nn.Module):
        def __init__(self):
            super().__init__()
            self.embed, self.patch = nn.Embedding(60, 8), nn.Conv2d(3, 8, 4, 4)

        def forward(self, texts, images):
            return self.embed(texts).mean(1).tanh() @ self.patch(images).flatten(2).mean(-1).mT

    batch = {"texts": words(2, 6), "images": torch.randn(3, 3, 8, 8)}
    model = qt.quantize(Both().eval(), weight_bits=7, data=[batch])
    with pytest.warns(UserWarning, match=r"dimension 1 \(tokens\) is fixed .* 3 in images"):
        qt.export_onnx(model, batch, tmp_path / "model.onnx", dynamic=TEXT)
    batch = {"texts": words(5, 3), "images": torch.randn(2, 3, 8, 8)}
    found = onnx_files.run(tmp_path / "model.onnx", batch)["output"]
    with torch.no_grad():
        np.testing.assert_allclose(found, model(**batch).numpy(), atol=0.05)


def test_caches_of_any_part_are_left_out_of_programs_too():
    torch.manual_seed(0)
    batch = pair(2, 6, 4)
    model = qt.quantize(t5().eval(), data=[batch])
    program = qt.export_torch(model, batch, dynamic={})
    with torch.no_grad():
        found, expected = program.module()(**batch), model(**batch)
    assert set(found) == {"logits", "encoder_last_hidden_state"}
    assert (found.logits - expected.logits).abs().mean() < 0.1 * expected.logits.abs().mean()
    assert model.decoder.config.use_cache
