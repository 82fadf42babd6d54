"""Ways of libraries that quantize graphs: ONNX Runtime, AIMET for ONNX, NNCF for OpenVINO."""

from collections import Counter
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from tempfile import mkdtemp
from typing import Any

import torch
from torch import Tensor

from benchmarks.rivals.rows import Embed, Rows, States, of_states
from benchmarks.rivals.ways import Built, Way
from quanttune.demo.minilm import load_encoder, packaged_model

STATIC, DYNAMIC = "static, per tensor", "dynamic, per tensor"
ATTENTION = "attention"  # stands for the names of attention's products, which a graph has


def ways() -> Iterator[Way]:
    yield from _onnxruntime()
    yield from _aimet()
    yield from _nncf()


@cache
def exported() -> Path:
    """Write the float encoder as ONNX, once: any batch, rows of 24 tokens, weights inside."""
    path, model = Path(mkdtemp()) / "float.onnx", load_encoder(packaged_model())
    batch = torch.export.Dim("batch")
    model.set_attn_implementation("eager")  # two products and a softmax, as a graph has them
    torch.onnx.export(
        States(model),
        (torch.ones(2, 24, dtype=torch.long),),
        path,
        input_names=["input_ids"],
        output_names=["states"],
        dynamic_shapes={"input_ids": {0: batch}},
        external_data=False,
        verbose=False,
    )
    return path


def _session(path: Any) -> Embed:
    import onnxruntime as ort

    options = ort.SessionOptions()
    options.intra_op_num_threads, options.log_severity_level = torch.get_num_threads(), 3
    session = ort.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    return of_states(lambda ids: torch.from_numpy(session.run(None, {"input_ids": ids.numpy()})[0]))


def _onnxruntime() -> Iterator[Way]:
    yield Way("onnxruntime", "float", _float, "", "", False, "", (32, 32))
    for name, options in {
        "quantize_dynamic": {},
        "quantize_dynamic, per channel, reduced range": {"per_channel": True, "reduce_range": True},
    }.items():
        weights = "per channel" if options else "per tensor"
        yield Way("onnxruntime", name, lambda m, r, o=options: _dynamic(m, o), "linear", DYNAMIC,
                  True, weights, note="tables of embeddings, too")  # fmt: skip
    for method in ("MinMax", "Entropy", "Percentile"):
        options_of = list(_static_options())
        for name, scope, options in options_of if method == "MinMax" else options_of[::5]:
            weights = "per channel" if options.get("per_channel") else "per tensor"
            yield Way(
                "onnxruntime",
                f"quantize_static, {method}{name}",
                lambda m, r, method=method, o=options: _static(m, r, method, dict(o)),
                scope,
                STATIC,
                True,
                weights,
                note="" if scope == "everything" else "sums read rounded tensors, too",
            )


def _static_options() -> Iterator[tuple[str, str, dict[str, Any]]]:
    """Yield as it comes first, then what the documentation has for processors without VNNI."""
    best = {"per_channel": True, "reduce_range": True, "activation_type": "QUInt8"}
    yield "", "everything", {}
    yield ", per channel, uint8, reduced range", "everything", best
    inputs: dict[str, Any] = {"OpTypesToExcludeOutputQuantization": ["MatMul"]}
    products = {**best, "op_types_to_quantize": ["MatMul"], "extra_options": inputs}
    yield ", MatMul inputs", "attention", products
    # not MatMulConstBOnly: findings/onnxruntime_ignored_const_only.sh
    yield ", Linear inputs", "linear", {**products, "nodes_to_exclude": ATTENTION}
    # fewer sums, then: findings/onnxruntime_rounded_readers.sh
    pairs = {**products, "extra_options": {**inputs, "DedicatedQDQPair": True}}
    yield ", MatMul inputs, DedicatedQDQPair", "attention", pairs
    alone = {**pairs, "nodes_to_exclude": ATTENTION}
    yield ", Linear inputs, DedicatedQDQPair", "linear", alone


def _float(model: Any, rows: Rows) -> Built:
    path = exported()
    return Built(_session(path), _megabytes(path))


def _dynamic(model: Any, options: dict[str, Any]) -> Built:
    from onnxruntime.quantization import quantize_dynamic

    source = _preprocessed()
    path = Path(mkdtemp()) / "dynamic.onnx"
    quantize_dynamic(source, path, **options)
    return Built(_session(path), _megabytes(path), _integer_operators(path))


def _static(model: Any, rows: Rows, method: str, options: dict[str, Any]) -> Built:
    from onnxruntime.quantization import (
        CalibrationDataReader,
        CalibrationMethod,
        QuantType,
        quantize_static,
    )

    class Reader(CalibrationDataReader):  # type: ignore[misc]
        def __init__(self) -> None:
            self._batches = iter(rows.calibration())

        def get_next(self) -> Any:
            batch = next(self._batches, None)
            return None if batch is None else {"input_ids": batch.numpy()}

    source = _preprocessed()
    if "nodes_to_exclude" in options:
        options["nodes_to_exclude"] = _products_of_activations(source)
    path = Path(mkdtemp()) / "static.onnx"
    options["activation_type"] = QuantType[options.get("activation_type", "QInt8")]
    options["calibrate_method"] = CalibrationMethod[method]
    quantize_static(source, path, Reader(), **options)
    return Built(_session(path), _megabytes(path), rounded_in(path))


@cache
def _preprocessed() -> Path:
    from onnxruntime.quantization.shape_inference import quant_pre_process

    source = exported()
    path = source.with_name("preprocessed.onnx")
    quant_pre_process(source, path)
    return path


def _products_of_activations(path: Path) -> list[str]:
    import onnx

    graph = onnx.load(path).graph
    stored = {tensor.name for tensor in graph.initializer}
    return [n.name for n in graph.node if n.op_type == "MatMul" and not stored & {*n.input}]


def rounded_in(path: Path) -> dict[str, int]:
    """Count, by operator, the inputs that a graph rounds; those that are stored are weights."""
    import onnx

    graph = onnx.load(path).graph
    stored = {tensor.name for tensor in graph.initializer}
    weight = {
        node.output[0]: node.input[0] in stored
        for node in graph.node
        if node.op_type == "DequantizeLinear"
    }
    found = Counter(
        f"{node.op_type}{' (stored)' if weight[name] else ''}"
        for node in graph.node
        for name in node.input
        if name in weight and node.op_type != "QuantizeLinear"
    )
    return dict(sorted(found.items()))


def _integer_operators(path: Path) -> dict[str, int]:
    import onnx

    found = Counter(node.op_type for node in onnx.load(path).graph.node)
    kinds = ("MatMulInteger", "DynamicQuantizeLinear", "DequantizeLinear")
    return {kind: found[kind] for kind in kinds}


def _megabytes(*paths: Path) -> float:
    return round(sum(path.stat().st_size for path in paths) / 2**20, 1)


def _aimet() -> Iterator[Way]:
    for scheme in ("min_max", "tf_enhanced"):
        for bits in ((8, 8), (8, 16), (7, 7), (6, 6)):
            for config in ("default", "htp_v81"):
                if config == "htp_v81" and bits != (8, 8):
                    continue
                yield Way(
                    "aimet-onnx",
                    f"{scheme}, {config}",
                    lambda m, r, a=(scheme, config, bits): _aimet_sim(m, r, *a),
                    "everything",
                    STATIC,
                    True,
                    "per tensor" if config == "default" else "per channel",
                    bits,
                )


def _aimet_sim(model: Any, rows: Rows, scheme: str, config: str, bits: tuple[int, int]) -> Built:
    import aimet_onnx
    import onnx
    from aimet_onnx.common.defs import QuantScheme

    path = exported()
    sim = aimet_onnx.QuantizationSimModel(
        onnx.load(path),
        param_type=aimet_onnx.qtype.int(bits[0]),
        activation_type=aimet_onnx.qtype.int(bits[1]),
        quant_scheme=QuantScheme.from_str(scheme),
        config_file=config,
    )
    sim.compute_encodings([{"input_ids": batch.numpy()} for batch in rows.calibration()])
    enabled = [q for q in sim.qc_quantize_op_dict.values() if q.enabled]
    kinds = Counter("zero point" if not q.use_symmetric_encodings else "symmetric" for q in enabled)

    def states(ids: Tensor) -> Tensor:
        return torch.from_numpy(sim.session.run(None, {"input_ids": ids.numpy()})[0])

    return Built(of_states(states), None, dict(kinds))


def _nncf() -> Iterator[Way]:
    yield Way("openvino", "float", _openvino_float, "", "", False, "", (32, 32))
    of_sums = "residual sums, inputs of LayerNorm, queries and keys, too"
    yield Way("nncf", "default", lambda m, r: _openvino(m, r, {}, 32), "linear", STATIC, False,
              note=of_sums)  # fmt: skip
    for name, options, batch in (
        ("model_type=TRANSFORMER", {}, 32),
        ("model_type=TRANSFORMER, batches of one row", {}, 1),
        ("model_type=TRANSFORMER, fast_bias_correction=False", {"fast_bias_correction": False}, 32),
    ):
        chosen = {"model_type": "TRANSFORMER", **options}
        yield Way("nncf", name, lambda m, r, a=(chosen, batch): _openvino(m, r, *a), "linear",
                  STATIC, True, note="queries and keys, too")  # fmt: skip


def _openvino_float(model: Any, rows: Rows) -> Built:
    import openvino

    return Built(
        _compiled(openvino.convert_model(States(model), example_input=rows.calibration()[0]))
    )


def _openvino(model: Any, rows: Rows, chosen: dict[str, Any], batch: int) -> Built:
    import nncf
    import openvino

    options = dict(chosen)
    if "model_type" in options:
        options["model_type"] = nncf.ModelType[options["model_type"]]
    source = openvino.convert_model(States(model), example_input=rows.calibration()[0])
    data = nncf.Dataset(rows.calibration(batch), lambda ids: ids.numpy())
    done = nncf.quantize(source, data, **options)
    path = Path(mkdtemp()) / "model.xml"
    openvino.save_model(done, path, compress_to_fp16=False)
    return Built(_compiled(done), _megabytes(path, path.with_suffix(".bin")), _fake_quantized(done))


def _fake_quantized(model: Any) -> dict[str, int]:
    found: Counter[str] = Counter()
    for node in model.get_ops():
        if node.get_type_name() == "FakeQuantize":
            for reader in node.output(0).get_target_inputs():
                found[reader.get_node().get_type_name()] += 1
    return dict(sorted(found.items()))


def _compiled(model: Any) -> Embed:
    import openvino

    options = {"INFERENCE_PRECISION_HINT": "f32", "INFERENCE_NUM_THREADS": torch.get_num_threads()}
    compiled = openvino.Core().compile_model(model, "CPU", options)
    return of_states(lambda ids: torch.from_numpy(compiled(ids.numpy())[0]))
