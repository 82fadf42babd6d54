"""A kept prefix: the same answers as to the prefix and the tokens in one sequence."""

import copy
import json
import math
import pickle
from contextlib import ExitStack

import onnx
import pytest
import torch
from onnx_files import run
from oracle import quiet
from torch import nn
from transformers import (
    BertConfig,
    BertModel,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    OPTConfig,
    OPTForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
    StaticCache,
    T5Config,
    T5ForConditionalGeneration,
)

import quanttune as qt
from quanttune.quantization.prefixes import choice, decoder
from quanttune.quantization.prefixes.kept_prefix import drop_prefix, prefix_of
from quanttune.quantization.saving.description import from_description
from quanttune.quantization.saving.schema import check
from quanttune.quantization.state import quantizers
from quanttune.quantization.token_mask import counting, inside

pytestmark = quiet
WORDS, PREFIX = 64, [5, 6]
SIZES = {
    "vocab_size": WORDS, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4,
    "max_position_embeddings": 128, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0,
}  # fmt: skip
GATED = {**SIZES, "intermediate_size": 48, "num_key_value_heads": 2, "initializer_range": 0.3}
PADDING = (4, 2, 0)


def llama(**options):
    return LlamaForCausalLM(LlamaConfig(**GATED, **options))


def mistral():
    return MistralForCausalLM(MistralConfig(**GATED, sliding_window=None))


def qwen():
    return Qwen3ForCausalLM(Qwen3Config(**GATED, head_dim=8))


def gpt2():
    return GPT2LMHeadModel(GPT2Config(**SIZES, initializer_range=0.3))


def opt():
    sizes = {**SIZES, "ffn_dim": 48, "word_embed_proj_dim": 32, "init_std": 0.3}
    return OPTForCausalLM(OPTConfig(**sizes))


MAKERS = {"llama": llama, "mistral": mistral, "qwen": qwen, "gpt2": gpt2, "opt": opt}


@pytest.fixture(params=MAKERS)
def made(request):
    """A decoder, and a copy of it that keeps a prefix."""
    torch.manual_seed(0)
    model = MAKERS[request.param]().eval()
    return model, qt.prefix(copy.deepcopy(model), PREFIX)


def rows(count=3, tokens=9, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(3, WORDS, (count, tokens), generator=generator)


def padded(seed=0):
    """Return three rows of 5, 7 and 9 tokens as a batch, padded from the left."""
    ids = rows(seed=seed)
    mask = torch.ones_like(ids)
    for row, padding in enumerate(PADDING):
        ids[row, :padding], mask[row, :padding] = 0, 0
    return {"input_ids": ids, "attention_mask": mask}


def behind(ids):
    """Put the prefix before rows of tokens."""
    return torch.cat([torch.tensor(PREFIX).expand(len(ids), -1), ids], 1)


@torch.no_grad()
def test_answers_are_those_to_the_whole_sequence(made):
    model, kept = made
    ids = rows()
    whole = model(behind(ids)).logits[:, len(PREFIX) :]
    torch.testing.assert_close(kept(ids).logits, whole, rtol=0, atol=2e-5)
    assert (model(ids).logits - whole).abs().max() > 0.1  # it matters


@torch.no_grad()
def test_padded_rows_answer_as_each_alone(made):
    model, kept = made
    batch = padded()
    found = kept(**batch).logits
    for row, padding in enumerate(PADDING):
        alone = model(behind(batch["input_ids"][row : row + 1, padding:])).logits
        torch.testing.assert_close(found[row, padding:], alone[0, len(PREFIX) :], rtol=0, atol=2e-5)


@torch.no_grad()
@pytest.mark.parametrize("kind", ["dynamic", "static"])
def test_a_cache_holds_the_tokens_that_it_was_given(made, kind):
    """In two calls, as generate makes them, and nothing of the prefix stays in it."""
    _, kept = made
    ids = rows()
    whole = kept(ids, use_cache=False)
    assert whole.get("cache") is None
    given = {"cache": StaticCache(kept.config, 9)} if kind == "static" else {"use_cache": True}
    first = kept(ids[:, :6], **given)
    assert int(first.cache.get_seq_length()) == 6
    second = kept(ids[:, 6:], cache=first.cache)
    assert type(second.cache) is type(first.cache)
    assert int(second.cache.get_seq_length()) == 9
    together = torch.cat([first.logits, second.logits], 1)
    torch.testing.assert_close(together, whole.logits, rtol=0, atol=2e-5)


@torch.no_grad()
@pytest.mark.parametrize("kind", ["dynamic", "static"])
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_generated_tokens_are_those_of_the_whole_sequence(kind, attention):
    torch.manual_seed(0)
    model = llama(attn_implementation=attention).eval()
    kept, batch = qt.prefix(copy.deepcopy(model), PREFIX), padded()
    greedy = {"do_sample": False, "min_new_tokens": 16, "max_new_tokens": 16}
    found = kept.generate(**batch, **greedy, cache_implementation=kind)[:, 9:]
    for row, padding in enumerate(PADDING):
        alone = behind(batch["input_ids"][row : row + 1, padding:])
        assert torch.equal(found[row], model.generate(alone, **greedy)[0, -16:])
    beams = kept.generate(**batch, **greedy, num_beams=3)
    row = model.generate(behind(batch["input_ids"][2:]), **greedy, num_beams=3)
    assert torch.equal(beams[2, 9:], row[0, -16:])


@torch.no_grad()
def test_positions_and_positional_arguments_are_taken():
    torch.manual_seed(0)
    model = llama().eval()
    kept, ids = qt.prefix(copy.deepcopy(model), PREFIX), rows()
    positions = torch.arange(9)[None] + 20
    before = torch.cat([torch.arange(2)[None], positions + 2], 1)
    whole = model.model(behind(ids), None, before).last_hidden_state[:, 2:]
    found = kept.model(ids, None, positions)
    torch.testing.assert_close(found.last_hidden_state, whole, rtol=0, atol=2e-5)
    (tensor,) = kept.model(ids, None, positions, return_dict=False, use_cache=False)
    torch.testing.assert_close(tensor, whole, rtol=0, atol=2e-5)
    embedded = kept.model(inputs_embeds=kept.get_input_embeddings()(ids), position_ids=positions)
    torch.testing.assert_close(embedded.last_hidden_state, whole, rtol=0, atol=2e-5)


@torch.no_grad()
def test_it_is_compiled_with_the_model():
    torch.manual_seed(0)
    kept = qt.prefix(llama().eval(), PREFIX)
    compiled = torch.compile(kept, backend="eager", fullgraph=True)
    batch = padded()
    torch.testing.assert_close(compiled(**batch).logits, kept(**batch).logits)


@torch.no_grad()
def test_a_copy_keeps_it_and_dropping_leaves_nothing():
    torch.manual_seed(0)
    model = llama().eval()
    kept, ids = qt.prefix(copy.deepcopy(model), PREFIX), rows()
    expected = kept(ids).logits
    for other in (copy.deepcopy(kept), pickle.loads(pickle.dumps(kept))):
        assert torch.equal(other(ids).logits, expected)
        drop_prefix(other)
        assert torch.equal(other(ids).logits, model(ids).logits)
        assert other.state_dict().keys() == model.state_dict().keys()
    assert torch.equal(kept(ids).logits, expected)
    qt.prefix(kept)  # the token that begins texts, in its place
    assert prefix_of(kept).tokens.tolist() == [1]
    whole = model(torch.cat([torch.ones(3, 1, dtype=torch.long), ids], 1)).logits[:, 1:]
    torch.testing.assert_close(kept(ids).logits, whole, rtol=0, atol=2e-5)


def with_a_sink(model, token=1):
    """Let a token's first Linear modules answer with what no other token comes near."""
    with torch.no_grad():
        model.get_input_embeddings().weight[token, 0] = 300.0
    return model


@torch.no_grad()
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_ranges_are_taken_without_the_prefix_and_without_padding(attention):
    torch.manual_seed(0)
    model = with_a_sink(llama(attn_implementation=attention).eval())
    batch = padded()
    batch["input_ids"][batch["attention_mask"] == 0] = 1  # the sink pads, too
    kept = qt.prefix(copy.deepcopy(model), [1])
    seen = {}
    for name, module in kept.named_modules():
        if isinstance(module, nn.Linear):
            keep = lambda _, args, name=name: seen.__setitem__(name, args[0])  # noqa: E731
            module.register_forward_pre_hook(keep)
    kept(**batch)
    expected = {name: x[batch["attention_mask"] == 1].abs().max() for name, x in seen.items()}
    quantized = qt.quantize(qt.prefix(copy.deepcopy(model), [1]), data=[batch], coverage="full")
    sites = quantizers(quantized)
    for name, largest in expected.items():
        torch.testing.assert_close(sites[f"{name}.input_quantizer"].absmax, largest)
    layer = "model.layers.1.self_attn."
    name = "attention0_key" if attention == "sdpa" else "product0_right"
    keys, values = (
        torch.cat([kept.model.kept_prefix.keys[1].flatten(), own.flatten()]).abs().max()
        for own in _own_keys(kept, batch)
    )
    torch.testing.assert_close(sites[f"{layer}{name}_quantizer"].absmax, keys)
    assert values > 0


def test_keys_behind_a_prefix_are_told_from_padding():
    torch.manual_seed(0)
    kept, batch = qt.prefix(llama().eval(), PREFIX), padded()
    queries = batch["attention_mask"] == 1
    keys = torch.cat([torch.ones(3, 2, dtype=torch.bool), queries], 1)
    with counting(kept, batch):
        for x, kind, expected in (
            (torch.zeros(3, 4, 9, 8), "operand", queries[:, None, :, None]),
            (torch.zeros(3, 2, 11, 8), "operand", keys[:, None, :, None]),
            (torch.zeros(3, 2, 8, 11), "operand", keys[:, None, None]),
            (torch.zeros(3, 4, 9, 11), "score", queries[:, None, :, None] & keys[:, None, None]),
            (torch.zeros(3, 9, 32), "input", queries[..., None]),
        ):
            assert torch.equal(inside(x, kind).expand_as(x), expected.expand_as(x))


def _own_keys(kept, batch):
    """Return keys and values of the last layer for the tokens that are no padding."""
    layer = kept(**batch, use_cache=True).cache.layers[1]
    real = batch["attention_mask"] == 1
    return [x.transpose(1, 2)[real] for x in (layer.keys, layer.values)]


@pytest.fixture
def quantized():
    """A quantized Llama with a prefix, and a batch."""
    torch.manual_seed(0)
    model = qt.prefix(llama().eval(), PREFIX)
    batch = {"input_ids": rows(4), "attention_mask": torch.ones(4, 9, dtype=torch.long)}
    return qt.quantize(model, data=[batch, padded(1)]), batch


@torch.no_grad()
def test_a_quantized_model_is_saved_and_loaded_with_it(quantized, tmp_path):
    model, batch = quantized
    expected = model(**batch).logits
    qt.save(model, tmp_path / "model.safetensors")
    torch.manual_seed(1)
    other = llama().eval()
    assert torch.equal(qt.load(other, tmp_path / "model.safetensors")(**batch).logits, expected)
    assert prefix_of(other).tokens.tolist() == PREFIX
    import quanttune.quantization.pretrained  # noqa: F401

    model.save_pretrained(tmp_path / "folder")
    other = LlamaForCausalLM.from_pretrained(tmp_path / "folder").eval()
    assert torch.equal(other(**batch).logits, expected)
    assert other.config.quantization_config.prefix == {"tokens": PREFIX}


def test_what_has_none_is_described_as_before(quantized, tmp_path):
    model, _ = quantized
    plain = qt.quantize(llama().eval(), data=[padded()])
    assert "prefix" not in plain.config.quantization_config
    qt.save(plain, tmp_path / "model.safetensors")
    other = qt.load(qt.prefix(llama().eval(), PREFIX), tmp_path / "model.safetensors")
    assert prefix_of(other) is None  # the file's model has none
    for wrong in ({"tokens": []}, {"tokens": [1.0]}, {"tokens": [-1]}, {"ids": [1]}, None):
        with pytest.raises(ValueError, match="prefix"):
            check({**model.config.quantization_config, "prefix": wrong})


def test_a_longer_prefix_than_the_model_takes_is_refused(quantized, tmp_path):
    model, _ = quantized
    description = {**model.config.quantization_config, "prefix": {"tokens": [3] * 128}}
    other = qt.prefix(llama().eval())
    before, expected = other.state_dict().keys(), other(rows()).logits
    said = r"prefix\.tokens are 128, of 128 that the model takes"
    with pytest.raises(ValueError, match=said), ExitStack() as undo:
        from_description(other, description, undo)
    assert other.state_dict().keys() == before
    assert torch.equal(other(rows()).logits, expected)  # with its own prefix


@torch.no_grad()
def test_the_exported_file_holds_it_and_agrees(quantized, tmp_path):
    model, batch = quantized
    path = tmp_path / "model.onnx"
    qt.export_onnx(model, batch, path, dynamic={0: "batch", 1: "tokens"})
    metadata = {entry.key: entry.value for entry in onnx.load(path).metadata_props}
    assert json.loads(metadata["quantization_config"])["prefix"] == {"tokens": PREFIX}
    other = padded(2)
    found = run(path, {name: x.numpy() for name, x in other.items()})["logits"]
    wanted = model(**other).logits
    for row, padding in enumerate(PADDING):
        real = torch.from_numpy(found[row, padding:])
        assert (real.argmax(-1) == wanted[row, padding:].argmax(-1)).double().mean() > 0.8
    assert qt.verify(path, model, [other, batch]).problems == ()
    prefix_of(model).keys.mul_(1.5)
    assert qt.verify(path, model, [batch]).problems != ()


@torch.no_grad()
def test_methods_that_change_weights_renew_it():
    """The keys that a method divides by factors are those of the prefix, too."""
    torch.manual_seed(0)
    model = qt.prefix(llama().eval(), PREFIX)
    stale = prefix_of(model).keys.clone()
    model.model.layers[0].self_attn.k_proj.weight.mul_(2)
    qt.quantize(model, data=[padded()])
    fresh = prefix_of(model).keys
    torch.testing.assert_close(fresh[0], 2 * stale[0])


@torch.no_grad()
def test_an_error_while_it_is_renewed_leaves_the_model_as_it_was(monkeypatch):
    torch.manual_seed(0)
    model = qt.prefix(llama().eval(), PREFIX)
    expected, before = model(rows()).logits, copy.deepcopy(model.state_dict())

    def fail(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(decoder, "_keys_and_values", fail)
    with pytest.raises(KeyboardInterrupt):
        qt.quantize(model, methods=["smooth_inputs"], data=[padded()])
    assert before.keys() == model.state_dict().keys()
    torch.testing.assert_close(model(rows()).logits, expected)


def test_what_cannot_keep_one_is_refused_and_left_alone():
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 4}
    bert = BertModel(BertConfig(**sizes, intermediate_size=48, vocab_size=WORDS)).eval()
    t5 = T5ForConditionalGeneration(T5Config(d_model=32, num_layers=1, vocab_size=WORDS))
    sliding = MistralForCausalLM(MistralConfig(**GATED, sliding_window=4))
    turned = llama(rope_parameters={"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0})
    for model, said in (
        (nn.Linear(3, 3), "language models of transformers, got Linear"),
        (bert, "BertModel attends both ways"),
        (t5, "of a decoder alone: T5ForConditionalGeneration"),
        (sliding, "MistralForCausalLM do not all attend to all tokens.*DynamicSlidingWindowLayer"),
        (turned, "rope_type 'dynamic'"),
    ):
        before = model.state_dict().keys()
        with pytest.raises(ValueError, match=said):
            qt.prefix(model, [1])
        assert model.state_dict().keys() == before
    model = llama()
    for ids, said in (
        ([], "needs token_ids or data"),
        ([64], "whole numbers from 0 to 63, got 64"),
        ([1.0], "got 1.0"),
    ):
        with pytest.raises(ValueError, match=said):
            qt.prefix(model, ids)
    with pytest.raises(ValueError, match="got both"):
        qt.prefix(model, [1], data=[rows()])
    with pytest.raises(ValueError, match="is quantized already"):
        qt.prefix(qt.quantize(model.eval(), data=[rows()]), [1])


@torch.no_grad()
def test_a_model_that_answers_otherwise_is_refused(monkeypatch):
    torch.manual_seed(0)
    model = llama().eval()
    forward = type(model.model.layers[0].self_attn).forward
    without = lambda self, *args, cache=None, **kwargs: forward(self, *args, **kwargs)  # noqa: E731
    calls = iter(range(100))

    def forgetful(self, *args, cache=None, **kwargs):
        """Take the cache while the prefix is computed, and not afterwards."""
        kept = forward(self, *args, cache=cache, **kwargs) if next(calls) < 2 else None
        return kept or without(self, *args, **{**kwargs, "attention_mask": None})

    monkeypatch.setattr(type(model.model.layers[0].self_attn), "forward", forgetful)
    with pytest.raises(ValueError, match="LlamaForCausalLM does not answer behind a kept prefix"):
        qt.prefix(model, PREFIX)
    assert prefix_of(model) is None


@torch.no_grad()
def test_data_choose_tokens_while_ranges_get_narrower(monkeypatch):
    """Token 7 holds the largest values; ranges behind it, and behind 7 and 9, are the narrowest."""
    torch.manual_seed(0)
    model = llama().eval()
    model.get_input_embeddings().weight[7, 3] = 300.0
    model.get_input_embeddings().weight[9, 3] = 200.0
    ids = rows(4)
    ids[:, 4], ids[:2, 6] = 9, 7
    ranges = {(7,): 3.0, (9,): 3.5, (7, 9): 2.5, (7, 9, 1): 2.49}
    tried = []

    def range_behind(decoder, model, batch, token_ids):
        tried.append(tuple(token_ids))
        return ranges.get(tuple(token_ids), 4.0)

    monkeypatch.setattr(choice, "_range_behind", range_behind)
    assert prefix_of(qt.prefix(model, data=[ids])).tokens.tolist() == [7, 9]
    assert {(7,), (9,), (1,)} <= set(tried)  # 1 begins texts
    labelled = qt.prefix(model, data=[(ids, torch.zeros(4))])  # as `quantize` takes it
    assert prefix_of(labelled).tokens.tolist() == [7, 9]
    with pytest.raises(ValueError, match="data is empty"):
        qt.prefix(model, data=[])
    assert prefix_of(model).tokens.tolist() == [7, 9]  # an error leaves what was there
    with pytest.raises(ValueError, match="or have input_ids: got dict"):
        qt.prefix(model, data=[{"pixels": ids}])


@torch.no_grad()
def test_ranges_that_choose_are_means_of_logarithms_without_padding():
    torch.manual_seed(0)
    model, batch = with_a_sink(llama().eval()), padded()
    batch["input_ids"][batch["attention_mask"] == 0] = 1
    seen = []
    for module in model.modules():
        if isinstance(module, nn.Linear) or type(module).__name__ == "LlamaRMSNorm":
            module.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    model(**batch)
    real = batch["attention_mask"] == 1
    expected = [math.log2(x[real].abs().max().item()) for x in seen]
    assert len(expected) == 20
    found = choice._range(model, batch)
    assert found == pytest.approx(sum(expected) / len(expected), rel=1e-6)


@torch.no_grad()
def test_a_rotated_model_keeps_it():
    """The stream is turned with a prefix in it, too; values only before there is one."""
    torch.manual_seed(0)
    model, ids = llama().eval(), rows()
    data = [{"input_ids": ids}]
    whole = model(behind(ids)).logits[:, len(PREFIX) :]
    kept = qt.rotate(qt.prefix(copy.deepcopy(model), PREFIX), data)
    torch.testing.assert_close(kept(ids).logits, whole, rtol=0, atol=1e-4)
    kept = qt.prefix(qt.rotate(copy.deepcopy(model), data), PREFIX)
    torch.testing.assert_close(kept(ids).logits, whole, rtol=0, atol=1e-4)
    quantized = qt.quantize(
        qt.prefix(model, PREFIX), 16, coverage="linear", methods=["rotate"], data=data
    )
    assert (quantized(ids).logits - whole).abs().max() < 0.01
