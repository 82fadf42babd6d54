"""What runtimes for devices multiply in integers, looked for before anything is lowered.

They take a product of integers only together with the rounding behind it. LiteRT computes others in
float; ExecuTorch by loops that dequantize the weight in each call, slower than the float model.
"""

from collections.abc import Iterator

import torch
from torch.export import ExportedProgram
from torch.fx import Node

_ops = torch.ops.quantized_decomposed


def check_products(program: ExportedProgram, target: str) -> None:
    """Refuse a program that multiplies integers without rounding what comes out.

    Raises:
        ValueError: the first of such products, and how many there are.
    """
    found = list(_unrounded(program))
    if found:
        raise ValueError(
            f"{target} multiplies integers only where the product is rounded too: {found[0]} "
            f"({len(found)} such) is not. Quantize with coverage 'full_no_softmax' or 'full'"
        )


def _unrounded(program: ExportedProgram) -> Iterator[str]:
    buffers = program.graph_signature.inputs_to_buffers
    dequantize = _ops.dequantize_per_channel.default
    for weight in program.graph.find_nodes(op="call_function", target=dequantize):
        if not all(_is_rounded(product) for product in weight.users):
            (held, *_) = weight.all_input_nodes
            while held.op != "placeholder":  # LiteRT's are rounded first
                (held, *_) = held.all_input_nodes
            yield buffers[held.name].rsplit("_quantizer", 1)[0]


def _is_rounded(product: Node) -> bool:
    return [reader.target for reader in product.users] == [_ops.quantize_per_tensor.default]
