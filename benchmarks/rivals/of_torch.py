"""Ways of libraries that quantize PyTorch modules."""

import copy
from collections import Counter
from collections.abc import Iterator
from functools import partial
from typing import Any

import torch

from benchmarks.rivals.rows import ModelEmbedding, Rows, States, feed, of_states
from benchmarks.rivals.ways import Built, Way, linears

STATIC, TOKEN = "static, per tensor", "dynamic, per token"


def ways() -> Iterator[Way]:
    yield Way("torch", "float", lambda m, r: Built(ModelEmbedding(m)), "", "", False, "", (32, 32))
    yield Way("torch", "quantize_dynamic, per channel", _torch_dynamic, "linear",
              "dynamic, per tensor", True)  # fmt: skip
    yield from _modelopt()
    yield from _brevitas()
    yield from _quanto()
    yield from _torchao()


def _torch_dynamic(model: Any, rows: Rows) -> Built:
    from quanttune.demo import rival

    return Built(ModelEmbedding(rival.quantized(model)))


def _modelopt() -> Iterator[Way]:
    # as it comes it rounds LayerNorms' inputs, too: nn.LayerNorm is registered, and '*' means all
    for config in ("INT8_DEFAULT_CFG", "INT8_SMOOTHQUANT_CFG"):
        for norms in (True, False):
            for bits in (8,) if norms else (8, 7, 6):
                setting, note = f"{config}{'' if norms else ', Linear alone'}", ""
                if norms:
                    note = "rounds inputs of LayerNorm, too"
                build = partial(_modelopt_model, config=config, norms=norms, bits=bits)
                yield Way("nvidia-modelopt", setting, build, "linear", STATIC, False,
                          bits=(bits, bits), note=note)  # fmt: skip


def _modelopt_model(model: Any, rows: Rows, config: str, norms: bool, bits: int) -> Built:
    import modelopt.torch.quantization as mtq

    chosen = copy.deepcopy(getattr(mtq, config))
    for entry in chosen["quant_cfg"]:
        if (entry.get("cfg") or {}).get("num_bits") == 8:
            entry["cfg"]["num_bits"] = bits
    if not norms:
        of_norms = {"quantizer_name": "*input_quantizer", "parent_class": "nn.LayerNorm"}
        chosen["quant_cfg"].append({**of_norms, "enable": False})

    def forwards(model: Any) -> None:
        for batch in rows.calibration():
            feed(model, batch)

    done = mtq.quantize(model, chosen, forwards)
    found: Counter[str] = Counter()
    for name, module in done.named_modules():
        if type(module).__name__ == "TensorQuantizer" and module.is_enabled:
            parent = type(done.get_submodule(name.rpartition(".")[0])).__name__
            found[f"{parent} {name.rpartition('.')[2]}, axis {module.axis}"] += 1
    return Built(ModelEmbedding(done), None, dict(found))


def _brevitas() -> Iterator[Way]:
    for name in ("default", "per channel", "per channel, zero points"):
        for bits in (8, 7, 6) if name != "default" else (8,):
            yield Way("brevitas", f"layerwise_quantize, {name}",
                      partial(_brevitas_model, name=name, bits=bits), "linear", STATIC,
                      "zero" in name, "per tensor" if name == "default" else "per channel",
                      (bits, bits))  # fmt: skip


def _brevitas_model(model: Any, rows: Rows, name: str, bits: int) -> Built:
    import brevitas.nn as qnn
    from brevitas.graph.calibrate import bias_correction_mode, calibration_mode
    from brevitas.graph.quantize import LAYERWISE_COMPUTE_LAYER_MAP, layerwise_quantize
    from brevitas.quant import Int8WeightPerChannelFloat, ShiftedUint8ActPerTensorFloat
    from torch import nn

    kind, options = LAYERWISE_COMPUTE_LAYER_MAP[nn.Linear]
    if name != "default":
        options = {**options, "weight_quant": Int8WeightPerChannelFloat}
        options |= {"weight_bit_width": bits, "input_bit_width": bits, "bias_quant": None}
    if "zero" in name:
        options["input_quant"] = ShiftedUint8ActPerTensorFloat
    done = layerwise_quantize(model, {nn.Linear: (kind, options)})
    batches = rows.calibration()
    with torch.no_grad(), calibration_mode(done):
        for batch in batches:
            feed(done, batch)
    if name != "default":
        with torch.no_grad(), bias_correction_mode(done):
            for batch in batches:
                feed(done, batch)
    found = Counter(type(m).__name__ for m in done.modules() if isinstance(m, qnn.QuantLinear))
    return Built(ModelEmbedding(done.eval()), None, dict(found))


def _quanto() -> Iterator[Way]:
    yield Way("optimum-quanto", "qint8", _quanto_model, "linear", STATIC, False)


def _quanto_model(model: Any, rows: Rows) -> Built:
    from optimum.quanto import Calibration, freeze, qint8, quantize

    quantize(model, weights=qint8, activations=qint8)
    with torch.no_grad(), Calibration():
        for batch in rows.calibration():
            feed(model, batch)
    freeze(model)
    return Built(
        ModelEmbedding(model), None, dict(Counter(type(m).__name__ for m in model.modules()))
    )


def _torchao() -> Iterator[Way]:
    yield Way("torchao", "Int8DynamicActivationInt8WeightConfig", _torchao_dynamic, "linear", TOKEN,
              False)  # fmt: skip
    yield Way("torchao", "Int8StaticActivationInt8WeightConfig, per tensor", _torchao_static,
              "linear", STATIC, False)  # fmt: skip
    yield Way("torchao", "prepare_pt2e, X86InductorQuantizer", _pt2e, "linear", STATIC, True)


def _torchao_dynamic(model: Any, rows: Rows) -> Built:
    from torchao.quantization import Int8DynamicActivationInt8WeightConfig, quantize_

    quantize_(model, Int8DynamicActivationInt8WeightConfig())
    return Built(ModelEmbedding(model), _weights(model))


def _torchao_static(model: Any, rows: Rows) -> Built:
    """Give each Linear the range that its inputs had; the library leaves observing to its users."""
    from torchao.quantization import (
        Int8StaticActivationInt8WeightConfig,
        PerRow,
        PerTensor,
        quantize_,
    )

    largest: dict[str, torch.Tensor] = {}

    def note(module: Any, inputs: Any, name: str) -> None:
        # a scale must have as many dimensions as the input, or there is an AssertionError
        found = inputs[0].abs().max().reshape([1] * inputs[0].dim())
        largest[name] = torch.maximum(largest.get(name, found), found)

    hooks = [m.register_forward_pre_hook(partial(note, name=n)) for n, m in linears(model)]
    with torch.no_grad():
        for batch in rows.calibration():
            feed(model, batch)
    for hook in hooks:
        hook.remove()
    for name, absmax in largest.items():
        config = Int8StaticActivationInt8WeightConfig(
            act_quant_scale=absmax / 127.5,
            granularity=[PerTensor(), PerRow()],
        )
        quantize_(model, config, filter_fn=lambda m, n, name=name: n == name)
    return Built(ModelEmbedding(model), _weights(model), {"Linear": len(largest)})


def _weights(model: Any) -> float:
    """Return the megabytes of parameters, of those in parts the parts."""
    sizes = 0
    for parameter in model.parameters():
        parts = [parameter]
        if hasattr(parameter, "qdata"):
            parts = [parameter.qdata, parameter.scale]
        sizes += sum(part.numel() * part.element_size() for part in parts)
    return round(sizes / 2**20, 1)


def _pt2e(model: Any, rows: Rows) -> Built:
    from torchao.quantization.pt2e.quantize_pt2e import convert_pt2e, prepare_pt2e
    from torchao.quantization.pt2e.quantizer import x86_inductor_quantizer as x86

    batch = torch.export.Dim("batch")
    program = torch.export.export(
        States(model), (rows.calibration()[0],), dynamic_shapes={"input_ids": {0: batch}}
    )
    quantizer = x86.X86InductorQuantizer()
    quantizer.set_global(x86.get_default_x86_inductor_quantization_config())
    prepared = prepare_pt2e(program.module(), quantizer)
    with torch.no_grad():
        for ids in rows.calibration():
            prepared(ids)
    done = convert_pt2e(prepared)
    rounding = torch.ops.quantized_decomposed.dequantize_per_tensor.default
    readers = Counter(
        str(user.target)
        for node in done.graph.nodes
        if node.target is rounding
        for user in node.users
    )
    return Built(of_states(done), None, dict(readers))
