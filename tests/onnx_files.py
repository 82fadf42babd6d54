"""Reads exported files, runs them in ONNX Runtime, and cuts them where a site rounds."""

from collections import Counter

import numpy as np
import onnx
import onnxruntime
from onnx import TensorProto, helper

CODES = ".codes"
FLOAT_PRODUCTS = ("MatMul", "FusedMatMul", "Gemm", "FusedGemm")
INTEGER_PRODUCTS = ("MatMulIntegerToFloat", "QLinearMatMul", "QGemm")


def run(model, feeds, optimized=None, as_written=False):
    """Run a model, a file or a ModelProto, and return its outputs by name.

    As it is written it computes in float what lies between the roundings.
    """
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    options.log_severity_level = 3
    if as_written:
        options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    if optimized:
        options.optimized_model_filepath = str(optimized)
    model = model.SerializeToString() if isinstance(model, onnx.ModelProto) else str(model)
    session = onnxruntime.InferenceSession(model, options, providers=["CPUExecutionProvider"])
    names = [output.name for output in session.get_outputs()]
    feeds = {name: np.asarray(array) for name, array in feeds.items()}
    return dict(zip(names, session.run(None, feeds), strict=True))


def operators(path):
    """Count the operators of a file."""
    return Counter(node.op_type for node in onnx.load(path).graph.node)


def tensors(path):
    """Return the stored tensors of a file by name."""
    return {t.name: onnx.numpy_helper.to_array(t) for t in onnx.load(path).graph.initializer}


def sites(model):
    """Return the sites of a model, in order."""
    return [name.removesuffix(CODES) for node in model.graph.node for name in _codes(node)]


def roundings(path):
    """Return a model of nothing but the sites: from <site> in float to <site>.codes."""
    model = onnx.load(path)
    producers = {name: node for node in model.graph.node for name in node.output}
    inputs, nodes = [], []
    for node in model.graph.node:
        for codes in _codes(node):
            chain = [node]
            while (before := producers.get(chain[-1].input[0])) and before.op_type in _CLIPS:
                chain.append(before)
            chain[-1].input[0] = codes.removesuffix(CODES)
            inputs.append(_value(chain[-1].input[0], TensorProto.FLOAT))
            nodes += reversed(chain)
    return _rebuilt(model, nodes, inputs, [])


def layers(path):
    """Return the model cut at its sites: what follows one takes <site>.fed for <site>.codes."""
    model = onnx.load(path)
    kinds = {value.name: value.type.tensor_type.elem_type for value in model.graph.value_info}
    fed = {}
    rounded = {name for node in model.graph.node for name in _codes(node)}
    for node in model.graph.node:
        if node.input and (codes := node.input[0]) in rounded:
            node.input[0] = codes.replace(CODES, ".fed")
            fed[codes] = _value(node.input[0], kinds[codes])
    inputs = [*model.graph.input, *fed.values()]
    return _rebuilt(model, model.graph.node, inputs, model.graph.output)


_CLIPS = ("Clip", "Min", "Max")


def _codes(node):
    """Return what a node rounds; of files of int8 without the copies for further readers."""
    return [name for name in node.output if node.op_type == "QuantizeLinear" and "#" not in name]


def _value(name, kind):
    return helper.make_tensor_value_info(name, kind, None)


def _rebuilt(model, nodes, inputs, outputs):
    kinds = {value.name: value.type.tensor_type.elem_type for value in model.graph.value_info}
    codes = [_value(name, kinds[name]) for node in nodes for name in _codes(node)]
    outputs = [*codes, *outputs]
    graph = helper.make_graph(nodes, "cut", inputs, outputs, model.graph.initializer)
    rebuilt = helper.make_model(graph, opset_imports=model.opset_import)
    rebuilt.ir_version = model.ir_version
    return rebuilt
