"""Generation of quantized models: the same tokens with a cache, of either kind, as without one."""

import pytest
import torch
from oracle import quiet
from test_prefixes import PREFIX, llama, padded, rows

import quanttune as qt

pytestmark = quiet
TOKENS = 64


def made(coverage, attention, keeps_prefix):
    torch.manual_seed(0)
    model = llama(attn_implementation=attention).eval()
    if keeps_prefix:
        qt.prefix(model, PREFIX)
    return qt.quantize(model, data=[padded(1), {"input_ids": rows(4, 12)}], coverage=coverage)


@pytest.mark.parametrize(
    ("coverage", "attention", "keeps_prefix"),
    [("linear", "sdpa", False), ("full", "eager", True), ("full", "sdpa", True)],
)
def test_caches_change_no_token(coverage, attention, keeps_prefix):
    model = made(coverage, attention, keeps_prefix)
    greedy = {"do_sample": False, "min_new_tokens": TOKENS, "max_new_tokens": TOKENS}
    one = {"input_ids": rows(1), "attention_mask": torch.ones(1, 9, dtype=torch.long)}
    for batch in (one, padded()):
        wanted = model.generate(**batch, **greedy, use_cache=False)
        assert wanted.shape[1] == 9 + TOKENS
        assert len(wanted[:, 9:].unique()) > 10  # more than one word again and again
        for kind in ("dynamic", "static"):
            found = model.generate(**batch, **greedy, cache_implementation=kind)
            assert torch.equal(found, wanted), kind
