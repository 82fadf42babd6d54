"""What a cache of integers costs a language model: perplexity behind it, and bytes per token.

python -m benchmarks.accuracy.caches --out benchmarks/results/xeon-2-cores

Rows of the demo are joined to texts of 1,024 tokens, which are read 32 at a time: what is in the
cache is seen as integers, the tokens of a call as they are. docs/results.md has the table.
"""

import math
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import DynamicCache

from benchmarks import arguments
from quanttune.demo import recipe
from quanttune.environment import environment
from quanttune.files import write_json
from quanttune.quantization.quantized_cache import QuantizedCache

TOKENS, STEP, TEXTS = 1024, 32, 8
WAYS = {
    "float": None,
    "8 bits, blocks of 64": {"bits": 8, "block": 64},
    "4 bits, blocks of 128": {"bits": 4, "block": 128},
    "4 bits, blocks of 64": {"bits": 4, "block": 64},
}


def main() -> None:
    options = arguments.of_folder(__doc__).parse_args()
    job = recipe("smollm2")(0)
    model = job.prepare(job.arms[0], lambda: None).eval()
    texts = job.rows.test.reshape(-1, TOKENS)[:TEXTS]
    rows = []
    for name, way in WAYS.items():
        found = _measured(model, texts, way)
        rows.append({"way": name, **found})
        print(rows[-1], flush=True)
        facts = {"model": "SmolLM2-135M", "texts": len(texts), "tokens": TOKENS, "step": STEP}
        results = {**facts, "environment": environment(), "rows": rows}
        write_json(options.out / "caches.json", results)


@torch.no_grad()
def _measured(model: nn.Module, texts: Tensor, way: dict[str, int] | None) -> dict[str, float]:
    """Return the perplexity of all tokens but the first, and bytes of the cache per token.

    What is in float, scales too, is float32.
    """
    config, losses, before = model.config, [], None
    cache: Any = DynamicCache(config=config) if way is None else QuantizedCache(config, **way)
    for ids in texts.split(STEP, 1):
        logits = model(input_ids=ids, cache=cache, use_cache=True).logits
        if before is not None:
            logits = torch.cat([before, logits], 1)
        wanted = ids if before is not None else ids[:, 1:]
        losses.append(F.cross_entropy(logits[:, :-1].mT, wanted, reduction="none"))
        before = logits[:, -1:]
    held = (
        sum(x.keys.nbytes + x.values.nbytes for x in cache.layers) if way is None else cache.nbytes
    )
    perplexity = math.exp(torch.cat(losses, 1).double().mean().item())
    return {"perplexity": perplexity, "bytes_per_token": held / texts.numel()}


if __name__ == "__main__":
    main()
