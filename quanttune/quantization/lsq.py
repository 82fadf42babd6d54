"""Quantization-aware training with learned scales, on the modules that `quantize` made."""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

from torch import nn

from .modules import QuantizedEmbedding
from .other_grids import NoisyQuantizer, refuse_other_grids
from .saving.hf_config import update_hf_config
from .state import quantizers, state_of, weight_quantizers


def learn_scales(model: nn.Module) -> list[nn.Parameter]:
    """Learn the scales of a calibrated model with its weights, in place; return the parameters.

    They start from what the calibration, and min-max of the weights, found, so that the first step
    is that of the quantized model. Their gradient is that of LSQ; what an optimizer steps is the
    factor by which a scale differs from its start, since scales of one model differ by orders of
    magnitude and Adam moves each parameter by about its learning rate. Make the optimizer
    afterwards, without weight decay for them, and call `freeze_scales` at the end. Tables of
    embeddings keep the ranges of their rows, most of which a step does not see; zero points stay.

    Without this call a quantized model can be trained as well: then ranges of activations stay.

    Raises:
        ValueError: the model is not quantized, or has no scales since it is dynamic, or grids that
            are no scale and integers (ptq4vit, fq_vit).

    Source: Esser et al., Learned Step Size Quantization, arXiv 1902.08153.
    """
    if state_of(model).scheme.dynamic:
        raise ValueError("a dynamic model has no scales to learn: quantize it with data")
    refuse_other_grids(model, "learns no scale of it", (NoisyQuantizer,))
    with _or_as_before(model):
        learned = [q.learn() for q in quantizers(model).values() if q.calibrated]
        for module, quantizer in weight_quantizers(model).values():
            if not isinstance(module, QuantizedEmbedding):
                learned.append(quantizer.learn(module.weight))
    return learned


def freeze_scales(model: nn.Module) -> None:
    """Make learned scales constants, in place: the model is what `quantize` returns, with them.

    Raises:
        ValueError: the model is not quantized.
    """
    state_of(model)
    with _or_as_before(model):
        for quantizer in quantizers(model).values():
            quantizer.stop_learning()
        for _, weight_quantizer in weight_quantizers(model).values():
            weight_quantizer.stop_learning()


@contextmanager
def _or_as_before(model: nn.Module) -> Iterator[None]:
    """Change the scales of a model, and its configuration; all of them, or none."""
    with ExitStack() as undo:
        undo.callback(update_hf_config, model)
        weights = (quantizer for _, quantizer in weight_quantizers(model).values())
        for quantizer in (*quantizers(model).values(), *weights):
            # they are replaced, never written to
            undo.callback(quantizer._buffers.update, dict(quantizer._buffers))
            undo.callback(quantizer._parameters.update, dict(quantizer._parameters))
        yield
        update_hf_config(model)
        undo.pop_all()
