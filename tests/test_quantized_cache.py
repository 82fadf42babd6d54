"""A cache of integers: what attention sees in it, and what generate() does with it."""

import numpy as np
import pytest
import torch
from oracle import quiet
from test_prefixes import PREFIX, llama, padded, rows
from transformers import DynamicCache, GPT2Config, LlamaConfig, MistralConfig

import quanttune as qt
from quanttune.quantization.quantized_cache import QuantizedCache

pytestmark = quiet
HEADS, CHANNELS = 2, 8
SIZES = {"hidden_size": 32, "num_attention_heads": 4, "num_key_value_heads": HEADS}
CONFIG = LlamaConfig(num_hidden_layers=1, vocab_size=64, **SIZES)


def by_hand(x, bits, axis):
    """Round to the range of what lies along an axis, in float64."""
    x = x.double().numpy()
    low, high = x.min(axis, keepdims=True), x.max(axis, keepdims=True)
    step = np.where(high == low, 1, (high - low) / (2**bits - 1))
    return torch.from_numpy(np.rint((x - low) / step) * step + low).float()


def states(tokens, batch=2, channels=CHANNELS):
    generator = torch.Generator().manual_seed(tokens)
    x = torch.randn(2, batch, HEADS, tokens, channels, generator=generator)
    return x * torch.logspace(-1, 1, channels)


@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("channels", [8, 7])
def test_keys_are_rounded_by_channel_and_block_values_by_token(bits, channels):
    cache = QuantizedCache(CONFIG, bits, block=4)
    keys, values = states(11, channels=channels)
    keys[..., :4, 0] = 3.0  # a channel of one value
    seen = cache.update(keys, values, 0)
    assert torch.equal(seen[0], keys)  # the tokens of a call are seen as they are
    assert torch.equal(seen[1], values)
    more = states(1, channels=channels)
    seen = cache.update(*more, 0)
    blocks = [by_hand(keys[..., i : i + 4, :], bits, -2) for i in (0, 4)]
    expected = [
        torch.cat([*blocks, keys[..., 8:, :], more[0]], -2),
        torch.cat([by_hand(values[..., :8, :], bits, -1), values[..., 8:, :], more[1]], -2),
    ]
    torch.testing.assert_close(list(seen), expected, rtol=1e-5, atol=1e-6)
    assert cache.get_seq_length() == 12


def test_blocks_do_not_depend_on_how_tokens_came_and_are_rounded_once():
    keys, values = states(20)
    whole, single = (QuantizedCache(CONFIG, 4, block=4) for _ in range(2))
    whole.update(keys, values, 0)
    for token in range(20):
        single.update(keys[..., token : token + 1, :], values[..., token : token + 1, :], 0)
    more = states(1)
    for a, b in zip(whole.update(*more, 0), single.update(*more, 0), strict=True):
        assert torch.equal(a, b)


def test_sequences_are_dropped_repeated_and_reordered_and_tokens_cropped():
    keys, values = states(10, batch=3)
    cache, usual = QuantizedCache(CONFIG, 8, block=4), DynamicCache(config=CONFIG)
    one = states(1, batch=4)
    for each in (cache, usual):
        each.update(keys, values, 0)
        each.reorder_cache(torch.tensor([2, 0, 0]))
        each.batch_select_indices(torch.tensor([0, 1]))
        each.batch_repeat_interleave(2)
        each.crop(-1)
        assert each.get_seq_length() == 9
        each.crop(-4)
        assert each.get_seq_length() == 5
    for a, b in zip(cache.update(*one, 0), usual.update(*one, 0), strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=0.4)
        assert torch.equal(a[..., 5:, :], b[..., 5:, :])
    cache.crop(-6)
    assert cache.get_seq_length() == 0
    cache.reset()
    assert cache.get_seq_length() == cache.nbytes == 0
    with pytest.raises(ValueError, match="positive"):
        cache.crop(3)


@pytest.mark.parametrize(("bits", "bytes_of_codes"), [(8, 8), (4, 4)])
def test_bytes_are_those_of_codes_scales_and_the_newest_tokens(bits, bytes_of_codes):
    cache = QuantizedCache(CONFIG, bits, block=16)
    cache.update(*states(32, batch=1).bfloat16(), 0)
    codes, scales = 2 * 32 * bytes_of_codes, (2 * CHANNELS + 32) * 2 * 2
    assert cache.nbytes == HEADS * (codes + scales)
    cache.update(*states(3, batch=1).bfloat16(), 0)
    assert cache.nbytes == HEADS * (codes + scales + 2 * 3 * CHANNELS * 2)
    keys = cache.layers[0].keys
    assert keys.untyped_storage().nbytes() == keys.nbytes  # what was rounded is freed


def test_bfloat16_stays_within_a_step():
    keys, values = (states(16) + 20).bfloat16()
    cache = QuantizedCache(CONFIG, 4, block=16)
    cache.update(keys, values, 0)
    seen, _ = cache.update(*states(1).bfloat16(), 0)
    assert seen.dtype == torch.bfloat16
    span = keys.float().amax(-2, keepdim=True) - keys.float().amin(-2, keepdim=True)
    assert ((seen[..., :16, :].float() - keys.float()).abs() <= 0.6 * span / 15 + 0.13).all()


@torch.no_grad()
@pytest.mark.parametrize("keeps_prefix", [False, True])
def test_generate_writes_nearly_what_it_does_with_floats(keeps_prefix):
    torch.manual_seed(0)
    model = llama().eval()
    if keeps_prefix:
        qt.prefix(model, PREFIX)
    greedy = {"do_sample": False, "min_new_tokens": 24, "max_new_tokens": 24}
    answer = {"output_logits": True, "return_dict_in_generate": True}
    for batch in (padded(), {"input_ids": rows(2, 12)}):
        wanted = model.generate(**batch, **greedy, **answer)
        cache = QuantizedCache(model.config, 8, block=8)
        found = model.generate(**batch, **greedy, **answer, cache=cache)
        scale = torch.stack(wanted.logits).std()
        same = (found.sequences == wanted.sequences).all(1)
        assert same.float().mean() >= 0.5
        off = [(a - b)[same].abs().max() for a, b in zip(found.logits, wanted.logits, strict=True)]
        assert 0 < max(off) < 0.1 * scale
        assert off[0] == 0  # the prompt is one call
        assert cache.nbytes < 0.6 * _bytes(wanted.past_key_values)


def _bytes(cache):
    return sum(layer.keys.nbytes + layer.values.nbytes for layer in cache.layers)


@torch.no_grad()
def test_a_sequence_that_is_padded_on_the_left_is_seen_as_alone():
    """Only scales of the block that padding is in may differ."""
    torch.manual_seed(0)
    model = llama().eval()
    batch = padded()
    short = int(batch["attention_mask"].sum(1).argmin())
    mask = batch["attention_mask"][short].bool()
    alone = {"input_ids": batch["input_ids"][short : short + 1, mask]}
    greedy = {"do_sample": False, "min_new_tokens": 16, "max_new_tokens": 16}
    answer = {"output_logits": True, "return_dict_in_generate": True}
    found = [
        model.generate(
            **given, **greedy, **answer, cache=QuantizedCache(model.config, 8, block=4)
        ).logits
        for given in (batch, alone)
    ]
    row = torch.stack(found[0])[:, short]
    assert (row - torch.stack(found[1])[:, 0]).abs().max() < 0.1 * row.std()


def test_a_quantized_model_takes_it():
    torch.manual_seed(0)
    model = qt.quantize(llama().eval(), data=[padded(1)], coverage="linear")
    cache = QuantizedCache(model.config, 8, block=4)
    ids = model.generate(**padded(), max_new_tokens=8, cache=cache)
    assert ids.shape[1] == padded()["input_ids"].shape[1] + 8
    assert cache.get_seq_length() == ids.shape[1] - 1


def test_layers_with_windows_stay_float():
    config = MistralConfig(num_hidden_layers=2, vocab_size=64, sliding_window=4, **SIZES)
    with pytest.raises(ValueError, match="MistralConfig are DynamicSlidingWindowLayer"):
        QuantizedCache(config)
    assert len(QuantizedCache(GPT2Config(n_layer=3, n_head=2, n_embd=16)).layers) == 3


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"bits": 3}, "bits must be one of 8, 4, got 3"),
        ({"block": 0}, "number of tokens, .* got 0"),
    ],
)
def test_what_it_cannot_be_is_refused(options, message):
    with pytest.raises(ValueError, match=message):
        QuantizedCache(CONFIG, **options)
