"""Rotations folded into parameters, in float64: nothing else of a model changes."""

from typing import Any

import torch
from torch import Tensor, nn

from ..equalizing.norms import Norm
from ..equalizing.pairs import columns_of
from .matrices import rotation
from .parts import CONVOLUTIONS
from .plan import Stream, Values


@torch.no_grad()
def rotate_stream(stream: Stream, seed: int) -> None:
    """Rotate a residual stream: x becomes x Q. Its norms keep no gain, and no bias if they can."""
    keeps_mean = any(norm.centers for norm in stream.norms)
    matrix = rotation(stream.size, seed, keeps_mean)
    for norm, readers in stream.norms.items():
        _free(norm, readers, matrix)
        for reader in readers:
            _turn_columns(reader, matrix)
    for reader in stream.readers:
        _turn_columns(reader, matrix)
    for writer in stream.writers:
        _turn_outputs(writer, matrix)


@torch.no_grad()
def rotate_values(values: Values, seed: int) -> None:
    """Rotate the values of each head by a matrix of its own."""
    writer = values.writer
    matrices = {
        head: rotation(len(head), seed + i).to(writer.weight.device)
        for i, head in enumerate(values.heads)
    }
    for head, matrix in matrices.items():
        rows = columns_of(writer)
        features = list(head)
        rows[features] = (matrix.T @ rows[features].double()).to(rows.dtype)
        if writer.bias is not None:
            writer.bias[features] = (writer.bias[features].double() @ matrix).to(rows.dtype)
    for reader, row in values.readers.items():
        columns = columns_of(reader)
        for head, matrix in matrices.items():
            size = len(head)
            for start in range(0, len(row), size):
                if tuple(row[start : start + size].tolist()) == head:
                    part = columns[:, start : start + size]
                    part.copy_(part.double() @ matrix)


def _free(norm: Norm, readers: tuple[Any, ...], matrix: Tensor) -> None:
    """Let readers multiply with the gain of a norm, and add what its bias gave."""
    gain, bias = norm.gain, norm.bias
    if bias is not None and bias.any():
        if all(reader.bias is not None for reader in readers):
            for reader in readers:
                reader.bias.add_((columns_of(reader).double() @ bias).to(reader.bias.dtype))
            norm.module.bias.zero_()
        else:
            scaled = bias if gain is None else bias / gain
            norm.module.bias.copy_(scaled @ matrix.to(scaled.device))
    if gain is not None:
        for reader in readers:
            columns = columns_of(reader)
            columns.copy_(columns.double() * gain)
        norm.module.weight.fill_(1 - norm.offset)


def _turn_columns(reader: Any, matrix: Tensor) -> None:
    columns = columns_of(reader)
    columns.copy_(columns.double() @ matrix.to(columns.device))


def _turn_outputs(writer: Any, matrix: Tensor) -> None:
    if isinstance(writer, nn.Parameter):
        writer.copy_(writer.double() @ matrix.to(writer.device))
        return
    if isinstance(writer, nn.Embedding):
        writer.weight.copy_(writer.weight.double() @ matrix.to(writer.weight.device))
        return
    weight = writer.weight if isinstance(writer, CONVOLUTIONS) else columns_of(writer)
    matrix = matrix.to(weight.device)
    weight.copy_((matrix.T @ weight.flatten(1).double()).view_as(weight))
    if writer.bias is not None:
        writer.bias.copy_(writer.bias.double() @ matrix)
