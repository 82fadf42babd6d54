"""Time the fake quantization of other libraries on the same tensor, beside ours.

make peers      # in an environment of its own, .venv-peers

Each peer is optional. Its answer is compared with the definition before it is timed: one int8 grid
per tensor with codes from -128 to 127, forward only.
"""

import argparse
from collections.abc import Callable
from functools import partial
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor

import quanttune
from benchmarks import eager
from benchmarks.timing import medians
from quanttune.files import write_json

SHAPE = (8, 2**20)
SCALE = torch.tensor(0.03)
SECONDS = 1.5


def _brevitas() -> Callable[[Tensor], Tensor]:
    from brevitas.core.function_wrapper import Identity, RoundSte
    from brevitas.core.quant import IntQuant

    module = IntQuant(narrow_range=False, signed=True, input_view_impl=Identity(),
                      float_to_int_impl=RoundSte())  # fmt: skip
    zero, bits = torch.tensor(0.0), torch.tensor(8.0)
    return lambda x: module(SCALE.to(x.dtype), zero.to(x.dtype), bits.to(x.dtype), x)


def _modelopt() -> Callable[[Tensor], Tensor]:
    from modelopt.torch.quantization.config import QuantizerAttributeConfig
    from modelopt.torch.quantization.nn import TensorQuantizer

    module = TensorQuantizer(QuantizerAttributeConfig(num_bits=8, axis=None))
    module.amax = 127 * SCALE
    return module


def _torchao() -> Callable[[Tensor], Tensor]:
    from torchao.quantization.quant_primitives import _fake_quantize_affine

    zero = torch.zeros((), dtype=torch.int32)
    return lambda x: _fake_quantize_affine(x, x.shape, SCALE, zero, torch.int8, -128, 127)


PEERS = {
    "brevitas": ("brevitas", _brevitas),
    "nvidia-modelopt": ("modelopt", _modelopt),
    "torchao": ("torchao", _torchao),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    rows = []
    for name, (module, build) in PEERS.items():
        if not find_spec(module):
            print(f"{name} is not installed")
            continue
        call = build()
        for dtype in eager.DTYPES:
            rows.append(
                {"peer": f"{name} {version(name)}", "dtype": dtype, **_measure(call, dtype)}
            )
    table = Table(title=f"int8 fake quantization of {SHAPE}, torch {torch.__version__}")
    for column in ("peer", "dtype", "peer, ms", "ours, ms", "ratio", "codes that differ"):
        table.add_column(column)
    for row in rows:
        times = f"{row['theirs']:.2f}", f"{row['ours']:.2f}"
        ratio = f"{row['theirs'] / row['ours']:.1f}x"
        table.add_row(row["peer"], row["dtype"], *times, ratio, f"{row['differ']:.2%}")
    Console(width=110).print(table)
    if options.json:
        write_json(options.json, rows)


@torch.no_grad()
def _measure(call: Callable[[Tensor], Tensor], dtype: str) -> dict[str, float]:
    x = eager.normal(SHAPE, eager.DTYPES[dtype])
    ours, theirs = quanttune.fake_quant(x, SCALE), call(x)
    eager.check_fake_quant(ours, x, SCALE)
    differ = (theirs.float() - ours.float()).abs() > SCALE / 2
    if dtype == "float32":  # in bfloat16 most of them round the scale, too
        eager.check_fake_quant(theirs, x, SCALE, ours=False)
    calls = {"ours": partial(quanttune.fake_quant, x, SCALE), "theirs": partial(call, x)}
    return {**medians(calls, SECONDS), "differ": differ.double().mean().item()}


if __name__ == "__main__":
    main()
