"""Mixed precision where nothing widens what autocast made narrower, as on a GPU; without one, on CPU tensors."""
from __future__ import annotations

import sys
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from test_sparsity import NAMES, clip, network
from torch import Tensor

from sparse_stgcn import compact, sparsify
from sparse_stgcn.kernels import BlockPattern, _native, cuda, dispatch, gpu, reference_dynamic
from sparse_stgcn.layers import SparseConv2d
from tests.kernel_cases import normal

X = (2, 4, 6, 5)
PATTERN = BlockPattern.full((8, 4, 3), (8, 1))
INDEX = (PATTERN.row_ptr, PATTERN.input, PATTERN.tap, list(PATTERN.shape), list(PATTERN.block))
VALUES = PATTERN.gather(normal(8, 4, 3, seed=1))


@pytest.fixture(params=["kernels of two ops", "no kernels"])
def as_on_a_gpu(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """No module widens, and but for temporal_conv and graph_conv all ops run on their reference."""
    for name, module in list(sys.modules.items()):
        if name.startswith("sparse_stgcn.") and hasattr(module, "widened") and name != "sparse_stgcn.runtime.choice":
            monkeypatch.setattr(module, "widened", lambda x: x)
    kernels = dispatch.GPU_OPS if request.param == "kernels of two ops" else ()
    if kernels and _native.module is None:
        pytest.skip("the native module is not built")
    choose = dispatch.choose

    def of_a_gpu(op: str, device: str, dtype: torch.dtype, **more: Any) -> dispatch.Choice:
        return choose(op, device, dtype, **more) if op in kernels else dispatch.Choice("reference", "as on a GPU")

    monkeypatch.setattr(dispatch, "choose", of_a_gpu)
    monkeypatch.setattr(dispatch, "_chosen", {})
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        yield


@pytest.mark.parametrize("name", NAMES)
def test_compact_networks_train(name: str, as_on_a_gpu: None) -> None:
    results = []
    for mixed in (False, True):
        model = compact(sparsify(network(name, torch.float32), 0.6)).train()
        with torch.autocast("cpu", torch.bfloat16, enabled=mixed):
            logits = model(clip(torch.float32)).float()
        F.cross_entropy(logits, torch.tensor([0, 1, 2])).backward()
        assert all(p.grad is None or (p.grad.dtype == p.dtype and p.grad.isfinite().all()) for p in model.parameters())
        results.append(logits.detach())
    assert (results[1] - results[0]).norm() < 0.1 * results[0].norm()


@pytest.mark.parametrize("narrow", [False, True])
@pytest.mark.parametrize("op", [reference_dynamic.ctr_aggregate, reference_dynamic.dg_aggregate], ids=lambda op: op.__name__)
def test_the_result_has_the_dtype_that_its_gradient_comes_in(op: Callable[..., Tensor], narrow: bool) -> None:
    """Activations in float32, or in bfloat16 as autocast leaves them: products in float32, gradients as their arguments."""
    one, graph = torch.ones(1), normal(5, 5, seed=5)
    if op is reference_dynamic.ctr_aggregate:
        activations = [normal(2, 3, 5, seed=0), normal(2, 3, 5, seed=1), normal(2, 4, 6, 5, seed=2)]
        parameters = [normal(4, 3, seed=3), normal(4, seed=4), one, graph]
    else:
        activations = [normal(2, 1, 4, 6, 5, seed=0), normal(2, 1, 4, 5, seed=1), normal(2, 1, 4, 5, seed=2)]
        parameters = [one, one, graph[None]]
    leaves = [*(a.bfloat16() if narrow else a for a in activations), *parameters]
    leaves = [leaf.clone().requires_grad_() for leaf in leaves]
    with torch.autocast("cpu", torch.bfloat16):
        y = op(*leaves)
    torch.testing.assert_close(y, op(*(leaf.detach().float() for leaf in leaves)), atol=1e-5, rtol=1e-5)
    gradients = torch.autograd.grad(y.sum(), leaves)
    assert [gradient.dtype for gradient in gradients] == [leaf.dtype for leaf in leaves]


@pytest.mark.parametrize("outer", [(3,), (2, 3), (2, 3, 8)], ids=["shared", "per sample", "per channel"])
def test_what_biases_add_stays_float32(outer: tuple[int, ...]) -> None:
    """The CUDA kernels read it by its address, as float32."""
    adjacency, bias = normal(*outer, 5, 5, seed=1), normal(3, 8, seed=2)
    with torch.autocast("cpu", torch.bfloat16):
        added = cuda.bias_map(adjacency, bias)
    spec = {3: "ko,kvw->ow", 4: "ko,nkvw->now", 5: "ko,nkovw->now"}[adjacency.dim()]
    assert added.dtype == torch.float32
    torch.testing.assert_close(added.double(), torch.einsum(spec, bias.double(), adjacency.double()), atol=1e-5, rtol=1e-5)
    assert cuda.bias_map(adjacency.bfloat16(), bias.bfloat16()).dtype == torch.float32


def test_a_size_without_a_kernel_on_a_gpu_gives_the_dtype_of_x(monkeypatch: pytest.MonkeyPatch) -> None:
    """The ops of gpu.py promise it to what was traced, and to their backward passes."""
    monkeypatch.setattr(gpu, "_backend", lambda *_: "reference")
    x, dy, adjacency, bias = (normal(*shape, seed=s) for s, shape in enumerate([X, (2, 8, 6, 5), (3, 5, 5), (3, 8)]))

    def results() -> list[Tensor]:
        return [gpu.temporal_conv(x, VALUES, bias[0], *INDEX, 1, 1), gpu.temporal_conv_dx(dy, VALUES, *INDEX, 1, 1, 6),
                *gpu.temporal_conv_dw(x, dy, VALUES, None, None, *INDEX, 1, 1),
                gpu.adjacency_conv(x, VALUES, adjacency, bias, bias[0], *INDEX),
                *gpu.adjacency_conv_dx(x, dy, VALUES, adjacency, bias, *INDEX, True, True),
                *gpu.adjacency_conv_dw(x, dy, VALUES, adjacency, None, None, *INDEX)]

    plain = results()
    with torch.autocast("cpu", torch.bfloat16):
        torch.testing.assert_close(results(), plain, atol=1e-4, rtol=1e-5)


@pytest.mark.skipif(_native.module is None, reason="the native module is not built")
@pytest.mark.parametrize("subsets", [1, 3])
def test_a_convolution_takes_what_autocast_made_narrower(subsets: int) -> None:
    x, adjacency = normal(*X, seed=0).bfloat16(), normal(3, 5, 5, seed=1)
    conv = SparseConv2d(4, 8, 3 if subsets == 1 else 1, subsets=subsets)
    conv.attach(BlockPattern.full(conv.shape_oik))
    conv.compact()
    run = (lambda: conv(x)) if subsets == 1 else (lambda: conv.aggregate(x, adjacency.bfloat16()))
    with torch.autocast("cpu", torch.bfloat16), dispatch.forced_backend("native"):
        assert run().dtype == torch.float32
    with pytest.raises(TypeError, match="Expected values to have the dtype of x"):
        run()  # nobody asked for mixed precision
