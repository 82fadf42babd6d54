"""Files with keys and values of earlier tokens: what they generate is what `generate` does."""

import onnx
import onnxruntime
import pytest
import torch
from test_prefixes import PREFIX, SIZES, llama, padded, rows
from transformers import (
    BertConfig,
    BertModel,
    LlamaModel,
    OPTConfig,
    OPTForCausalLM,
)

import quanttune as qt
from quanttune.deploy.past import prompt
from quanttune.deploy.products import explain
from quanttune.quantization.prefixes.kept_prefix import prefix_of

TOKENS = 64
BATCH, OWN, PAST = "batch_size", "sequence_length", "past_sequence_length"


def llama_with_a_prefix():
    model = qt.prefix(llama(attn_implementation="sdpa").eval(), PREFIX)
    return qt.quantize(model, data=[padded(1)], coverage="linear"), 2


def opt_without_one():
    sizes = {**SIZES, "num_hidden_layers": 1, "ffn_dim": 48, "word_embed_proj_dim": 32}
    model = OPTForCausalLM(OPTConfig(**sizes, init_std=0.3)).eval()
    return qt.quantize(model, data=[padded(1)], coverage="full"), 4


@pytest.fixture(scope="module", params=[llama_with_a_prefix, opt_without_one])
def exported(request, tmp_path_factory):
    """A quantized decoder, how many heads of keys it has, and its file."""
    torch.manual_seed(0)
    model, heads = request.param()
    path = tmp_path_factory.mktemp("past") / "model.onnx"
    qt.export_onnx(model, {"input_ids": rows(2, 5)}, path, with_past=True)
    return model, heads, path


@torch.no_grad()
def test_it_generates_the_tokens_of_the_simulation(exported):
    """In one file: no keys at first, then those that it returned before; alone and padded left."""
    model, heads, path = exported
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    model.generation_config.eos_token_id = None  # every row is as long
    one = {"input_ids": rows(1), "attention_mask": torch.ones(1, 9, dtype=torch.long)}
    for batch in (one, padded()):
        wanted = model.generate(**batch, do_sample=False, max_new_tokens=TOKENS)[:, 9:]
        assert len(wanted.unique()) > 10  # more than one word again and again
        ids, mask = batch["input_ids"].numpy(), batch["attention_mask"]
        places, past = (mask.cumsum(1) - 1).clamp(min=0).numpy(), {}
        for layer in range(model.config.num_hidden_layers):
            for part in ("key", "value"):
                past[f"past_key_values.{layer}.{part}"] = torch.zeros(len(ids), heads, 0, 8).numpy()
        found = []
        for _ in range(TOKENS):
            feeds = {"input_ids": ids, "attention_mask": mask.numpy(), "position_ids": places}
            logits, *presents = session.run(None, {**feeds, **past})
            past = dict(zip(past, presents, strict=True))
            ids, places = logits[:, -1:].argmax(-1), places[:, -1:] + 1
            mask = torch.cat([mask, torch.ones(len(ids), 1, dtype=torch.long)], 1)
            found.append(torch.from_numpy(ids))
        assert (torch.cat(found, 1) == wanted).double().mean() >= 0.95


def test_inputs_and_outputs_have_the_names_and_sizes_of_optimum(exported):
    model, heads, path = exported
    graph = onnx.load(path).graph
    said = {
        value.name: [size.dim_param or size.dim_value for size in value.type.tensor_type.shape.dim]
        for value in (*graph.input, *graph.output)
    }
    both = f"{PAST} + {OWN}"
    parts = [
        f"{layer}.{part}"
        for layer in range(model.config.num_hidden_layers)
        for part in ("key", "value")
    ]
    assert said == {
        "input_ids": [BATCH, OWN],
        "attention_mask": [BATCH, both],
        "position_ids": [BATCH, OWN],
        **{f"past_key_values.{part}": [BATCH, heads, PAST, 8] for part in parts},
        "logits": [BATCH, OWN, 64],
        **{f"present.{part}": [BATCH, heads, both, 8] for part in parts},
    }
    assert list(said) == ["input_ids", "attention_mask", "position_ids", *list(said)[3:]]
    assert all(product.is_integer for product in explain(path).products)


@torch.no_grad()
def test_verify_compares_it_token_by_token(exported):
    model, _, path = exported
    found = qt.verify(path, model, [padded(2), {"input_ids": rows(2, 4)}])
    assert found.passed, found.problems
    logits, keys = found.outputs
    assert (logits.name, keys.name) == ("logits", "keys and values")
    assert logits.file.argmax >= 0.95
    assert keys.magnitude > 0.1
    assert "forward" not in vars(model)  # all of it was undone
    buffer = (
        prefix_of(model).values if prefix_of(model) else model.model.decoder.embed_positions.weight
    )
    kept = buffer.clone()
    buffer.mul_(1.5)
    assert not qt.verify(path, model, [padded(2)]).passed
    buffer.copy_(kept)


def test_rows_padded_behind_are_turned():
    model = llama()
    ids = torch.tensor([[7, 8, 9, 0], [0, 7, 8, 9], [4, 5, 6, 7]])
    mask = torch.tensor([[1, 1, 1, 0], [0, 1, 1, 1], [1, 1, 1, 1]])
    found = prompt({"input_ids": ids, "attention_mask": mask}, model)
    assert found["input_ids"].tolist() == [[0, 7, 8, 9], [0, 7, 8, 9], [4, 5, 6, 7]]
    assert found["attention_mask"].tolist() == [[0, 1, 1, 1], [0, 1, 1, 1], [1, 1, 1, 1]]
    assert found["position_ids"][:, 1:].tolist() == [[0, 1, 2], [0, 1, 2], [1, 2, 3]]


def test_what_cannot_be_exported_is_refused(tmp_path):
    torch.manual_seed(0)
    path, ids = tmp_path / "model.onnx", rows(2, 5)
    sizes = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 4}
    bert = BertModel(BertConfig(**sizes, intermediate_size=48, vocab_size=64))
    headless = LlamaModel(llama().config)
    for model, data, said in (
        (bert, ids, "BertModel attends both ways"),
        (headless, ids, "for models that tell the next token: LlamaModel"),
        (torch.nn.Linear(3, 3), torch.ones(2, 3), "language models of transformers, got Q"),
    ):
        quantized = qt.quantize(model.eval(), data=[data], coverage="linear_inputs")
        with pytest.raises(ValueError, match=said):
            qt.export_onnx(quantized, data, path, with_past=True)
    model = qt.quantize(llama().eval(), data=[ids], coverage="linear_inputs")
    for example, options, said in (
        (ids, {"dynamic": {0: "batch", 1: "tokens"}}, "dynamic says nothing of a file with_past"),
        (ids[:1], {}, r"dimension 0 \(batch_size\) of example_inputs must be 2 or more, got 1"),
        (ids[:, :1], {}, r"dimension 1 \(sequence_length\) of example_inputs must be 2 or more"),
        ({"input_ids": ids, "cache": ids}, {}, "at least: got input_ids, cache"),
        ({"inputs_embeds": torch.ones(2, 5, 32)}, {}, "input_ids at least: got inputs_embeds"),
    ):
        with pytest.raises(ValueError, match=said):
            qt.export_onnx(model, example, path, with_past=True, **options)
    with pytest.raises(ValueError, match="Linear is not quantized"):
        qt.export_onnx(torch.nn.Linear(3, 3), ids, path, with_past=True)
    assert not path.exists()
    assert "forward" not in vars(model)
