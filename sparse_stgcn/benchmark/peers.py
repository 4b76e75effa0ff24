"""The dense engines that a sparse network has to beat: torch eager, channels_last, torch.compile, ONNX Runtime, OpenVINO."""
from __future__ import annotations

import io
import warnings
from collections.abc import Callable, Iterator

import torch
from torch import Tensor, nn

from ..kernels.dispatch import forced_backend
from .measure import Candidate


def candidate(name: str, run: Callable[[], Tensor]) -> Candidate:
    """A candidate whose run returns its output."""
    return Candidate(name, run, run)


def dense_engines(model: nn.Module, example: Tensor, threads: int, compile: bool = True) -> Iterator[Candidate]:
    """Every dense engine that is installed, running ``model`` (eval mode) on ``example``; the missing ones are skipped.

    torch runs under inference_mode with float32 matrix products; ONNX Runtime and OpenVINO get ``threads`` threads and
    the same ONNX graph, in which they fold the batch norms themselves. None of them uses a kernel of this package.
    """
    model = model.eval()

    def inference(module: Callable[[Tensor], Tensor]) -> Callable[[], Tensor]:
        def run() -> Tensor:
            with torch.inference_mode(), forced_backend("reference"):
                return module(example)

        return run

    yield candidate("torch", inference(model))
    import copy

    last = copy.deepcopy(model).to(memory_format=torch.channels_last)
    yield candidate("torch channels_last", inference(last))
    if compile:
        yield candidate("torch.compile", inference(torch.compile(copy.deepcopy(model))))
    graph = onnx_graph(model, example)
    if graph is None:
        return
    yield from _onnxruntime(graph, example, threads)
    yield from _openvino(graph, example, threads)


def onnx_graph(model: nn.Module, example: Tensor) -> bytes | None:
    """The model as ONNX with a fixed input shape, or None where the onnx package is missing."""
    try:
        import onnx  # noqa: F401
    except ImportError:
        return None
    buffer = io.BytesIO()
    with warnings.catch_warnings(), torch.no_grad(), forced_backend("reference"):
        warnings.simplefilter("ignore")
        torch.onnx.export(model, (example,), buffer, opset_version=17, input_names=["keypoint"], output_names=["logits"],
                          dynamo=False)
    return buffer.getvalue()


def _onnxruntime(graph: bytes, example: Tensor, threads: int) -> Iterator[Candidate]:
    try:
        import onnxruntime
    except ImportError:
        return
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads, options.inter_op_num_threads = threads, 1
    options.log_severity_level = 3
    session = onnxruntime.InferenceSession(graph, options, providers=["CPUExecutionProvider"])
    feed = {"keypoint": example.numpy()}
    yield candidate("ONNX Runtime", lambda: torch.from_numpy(session.run(None, feed)[0]))


def _openvino(graph: bytes, example: Tensor, threads: int) -> Iterator[Candidate]:
    try:
        import openvino
    except ImportError:
        return
    compiled = openvino.Core().compile_model(openvino.Core().read_model(graph), "CPU", {
        "INFERENCE_NUM_THREADS": threads, "PERFORMANCE_HINT": "LATENCY", "INFERENCE_PRECISION_HINT": "f32"})
    request, array = compiled.create_infer_request(), example.numpy()
    yield candidate("OpenVINO", lambda: torch.from_numpy(request.infer([array])[compiled.output(0)].copy()))
