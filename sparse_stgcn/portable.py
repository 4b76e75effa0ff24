"""Networks as programs of other runtimes: ``torch.export`` and ONNX, each checked against the network before it is kept."""
from __future__ import annotations

import contextlib
import importlib.util
import io
import json
import logging
import math
import warnings
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram

from .errors import UserError
from .kernels.dispatch import forced_backend
from .recognizer import Ensemble

__all__ = ["LEAST_FRAMES", "check", "difference", "onnx_bytes", "output_name", "pt2_bytes", "require_onnx", "run_onnx",
           "run_pt2", "trace"]

LEAST_FRAMES = 8  # of a program with dynamic T
TOLERANCE = 1e-4  # of the largest output: float32 sums in another order, over ten blocks
ROUGH = 0.05  # the same where weights were rounded to float16: 2^-11 each, ten blocks deep
METADATA = "sparse_stgcn.json"  # the file inside a .pt2
KEY = "sparse_stgcn"  # the entry in ONNX's metadata


def output_name(model: nn.Module) -> str:
    """What ``model`` returns: an ensemble gives probabilities, a single network logits."""
    return "probabilities" if isinstance(model, Ensemble) else "logits"


def trace(model: nn.Module, example: Tensor, plain: bool = False) -> tuple[ExportedProgram, bool]:
    """The network as a graph of ops, with dynamic N and, where the exporter can prove it, dynamic T.

    Args:
        model: in evaluation mode; with ``plain`` densified.
        example: keypoint (N, M, T, V, C), N at least 2 and T at least ``LEAST_FRAMES``.
        plain: only torch's own ops. Without it, compact networks use those of this package.

    Returns:
        (program, whether T is dynamic).

    Raises:
        torch's own error where the network cannot be exported with a fixed T either.
    """
    batch, frames = Dim("batch", min=1), Dim("frames", min=LEAST_FRAMES)
    with torch.no_grad(), forced_backend("reference") if plain else contextlib.nullcontext(), _quiet():
        model(example)  # what layers keep from call to call, such as the support of a graph, is made outside of the trace
        for sizes in ({0: batch, 2: frames}, {0: batch}):
            # Deferred: what cannot be proved for every T (T = 1 may differ) is asserted when the program runs.
            for deferred in (False, True) if 2 in sizes else (False,):
                try:
                    return torch.export.export(model, (example,), dynamic_shapes=(sizes,),
                                               prefer_deferred_runtime_asserts_over_guards=deferred), 2 in sizes
                except torch._dynamo.exc.UserError as error:  # "Constraints violated": T takes part in a comparison
                    reason = error
    raise reason


def pt2_bytes(program: ExportedProgram, metadata: Mapping[str, Any]) -> bytes:
    """The content of a ``.pt2`` file; ``metadata`` lies in it as ``sparse_stgcn.json``."""
    buffer = io.BytesIO()
    torch.export.save(program, buffer, extra_files={METADATA: json.dumps(metadata)})
    return buffer.getvalue()


def run_pt2(content: bytes) -> Callable[[Tensor], Tensor]:
    """What a ``.pt2`` file computes. Compact networks need ``import sparse_stgcn.kernels`` before it is read."""
    module = torch.export.load(io.BytesIO(content)).module()

    def run(keypoint: Tensor) -> Tensor:
        with torch.no_grad():
            return module(keypoint)

    return run


def require_onnx() -> None:
    """Check for the packages that write and run ONNX.

    Raises:
        UserError: one is missing.
    """
    missing = [name for name in ("onnx", "onnxscript", "onnxruntime") if importlib.util.find_spec(name) is None]
    if missing:
        raise UserError(f"Expected the packages that write and check ONNX. Got no {' and no '.join(missing)}; "
                        "pip install 'sparse-stgcn[export]'.")


def onnx_bytes(program: ExportedProgram, output: str, metadata: Mapping[str, Any]) -> bytes:
    """A ``plain`` program as ONNX: input ``keypoint``, ``output``, weights inside, ``metadata`` under ``sparse_stgcn``."""
    import onnx

    with _quiet():
        exported = torch.onnx.export(program, dynamo=True, input_names=["keypoint"], output_names=[output], verbose=False)
    assert exported is not None
    model = exported.model_proto
    onnx.helper.set_model_props(model, {KEY: json.dumps(metadata)})
    onnx.checker.check_model(model)
    return model.SerializeToString()


def run_onnx(content: bytes) -> Callable[[Tensor], Tensor]:
    """What an ONNX file computes in ONNX Runtime on the CPU."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    session = onnxruntime.InferenceSession(content, options, providers=["CPUExecutionProvider"])
    return lambda keypoint: torch.from_numpy(session.run(None, {"keypoint": keypoint.numpy()})[0])


def difference(run: Callable[[Tensor], Tensor], model: nn.Module, example: Tensor, dynamic_frames: bool) -> float:
    """The largest difference of ``run`` to the network, over the largest output, for the shapes that are promised.

    These are the example's own, one sample, and, with ``dynamic_frames``, others of T.
    """
    batch, persons, frames, joints, channels = example.shape
    shapes = [(batch, frames), (1, frames)] + [(3, LEAST_FRAMES), (1, 2 * frames + 1)] * dynamic_frames
    generator, worst = torch.Generator().manual_seed(0), 0.0
    for n, t in shapes:
        keypoint = torch.randn(n, persons, t, joints, channels, generator=generator)
        with torch.no_grad():
            expected, found = model(keypoint), run(keypoint)
        ratio = float((found - expected).abs().max() / expected.abs().max())
        worst = ratio if math.isnan(ratio) else max(worst, ratio)
    return worst


def check(run: Callable[[Tensor], Tensor], model: nn.Module, example: Tensor, dynamic_frames: bool, tolerance: float = TOLERANCE
          ) -> float:
    """``difference``, which has to be small.

    Raises:
        ValueError: it is above ``tolerance``, or not a number.
    """
    worst = difference(run, model, example, dynamic_frames)
    if not worst <= tolerance:
        raise ValueError(f"Expected the exported network to give the outputs of this one, within {tolerance:g} of the largest. "
                         f"Got a difference of {worst:.2g}; no file was written.")
    return worst


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Without the exporters' notes on their own future, which are not for the user."""
    loggers = [logging.getLogger(name) for name in ("torch.onnx", "onnxscript", "onnx_ir")]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)
