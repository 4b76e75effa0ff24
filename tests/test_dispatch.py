"""The choice of a backend is a pure function, so the whole table is tested without any device."""
from __future__ import annotations

import inspect
import json
import os
import subprocess
import sys
from contextlib import contextmanager
from types import SimpleNamespace

import pytest
import torch

from sparse_stgcn.kernels import BlockPattern, _native, backends, cuda, device, dispatch, gpu, preference, temporal_conv
from sparse_stgcn.kernels.dispatch import Gpu, Product, choose

F32, F64, F16, BF16 = torch.float32, torch.float64, torch.float16, torch.bfloat16
BOTH, NEITHER = Gpu(90), Gpu(90, triton="triton is not installed", cuda="not built")
TRITON, CUDA = Gpu(80, cuda="not built"), Gpu(80, triton="triton is not installed")


@pytest.mark.parametrize(("arguments", "backend", "fallback"), [
    ({"device": "cpu", "dtype": F32}, "native", False),
    ({"device": "cpu", "dtype": F64}, "native", False),
    ({"device": "cpu", "dtype": BF16}, "native", False),
    ({"device": "cpu", "dtype": torch.float16}, "reference", True),
    ({"device": "cpu", "dtype": F32, "native_available": False}, "reference", True),
    ({"device": "cpu", "dtype": F32, "adjacency_dims": 4}, "native", False),
    ({"device": "cpu", "dtype": F32, "adjacency_dims": 5}, "reference", True),
    ({"device": "cpu", "dtype": F32, "forced": "reference"}, "reference", False),
    ({"device": "cpu", "dtype": F32, "forced": "native"}, "native", False),
    ({"device": "cuda", "dtype": F32}, "reference", True),
    ({"device": "xpu", "dtype": F32}, "reference", True),
    ({"device": "meta", "dtype": F32}, "reference", False),
], ids=lambda v: "-".join(str(x) for x in v.values()) if isinstance(v, dict) else "")
def test_table(arguments, backend, fallback):
    choice = choose("graph_conv", **arguments)
    assert (choice.backend, choice.fallback) == (backend, fallback)
    assert choice.reason


@pytest.mark.parametrize("dtype", [F32, BF16, F16], ids=str)
@pytest.mark.parametrize("direction", ["forward", "dX", "dW"])
@pytest.mark.parametrize("op", dispatch.GPU_OPS)
def test_a_gpu_with_one_kernel_runs_that_one(op, direction, dtype):
    product = Product(op, direction)
    assert choose(op, "cuda", dtype, gpu=TRITON, product=product).backend == "triton"
    assert choose(op, "cuda", dtype, gpu=CUDA, product=product).backend == "cuda"
    chosen = choose(op, "cuda", dtype, gpu=NEITHER, product=product)
    assert (chosen.backend, chosen.fallback) == ("reference", True)
    assert "not installed" in chosen.reason and "not built" in chosen.reason


@pytest.mark.parametrize("block", [(8, 1), (16, 1), (1, 1), (4, 4), (16, 16), (32, 32)], ids=str)
@pytest.mark.parametrize("direction", ["forward", "dX", "dW"])
@pytest.mark.parametrize("op", dispatch.GPU_OPS)
@pytest.mark.parametrize("density", [1.0, 0.05, 0.01])
def test_of_two_kernels_the_one_predicted_faster_runs(op, direction, block, density):
    for dtype in (F32, BF16, F16):
        chosen = choose(op, "cuda", dtype, gpu=BOTH, product=Product(op, direction, block, density=density))
        assert chosen.backend == preference.faster(90, op, direction, preference.ARITHMETIC[dtype], block, density)
        assert not chosen.fallback and "predicted" in chosen.reason


@pytest.mark.parametrize(("gpu", "dtype", "product", "backend", "reason"), [
    (BOTH, F64, Product("temporal_conv"), "reference", "float64"),
    (BOTH, torch.int32, Product("temporal_conv"), "reference", "int32"),
    (Gpu(75), F32, Product("temporal_conv"), "reference", "compute capability 8.0, not 7.5"),
    (None, F32, Product("temporal_conv"), "reference", "no GPU is visible"),
    (BOTH, F32, Product("temporal_conv", vertices=500), None, ""),
    (BOTH, F32, Product("graph_conv", vertices=65), "cuda", "up to 64 vertices"),
    (BOTH, F32, Product("graph_conv", vertices=33, adjacency_dims=5), "cuda", "32 vertices with an adjacency per channel"),
    (TRITON, F32, Product("graph_conv", vertices=65), "reference", "up to 64 vertices"),
    (TRITON, BF16, Product("graph_conv", vertices=64), "triton", "not built"),
    (BOTH, F32, Product("temporal_conv", cuda="a group reads more than 16384 rows"), "triton", "16384 rows"),
    (CUDA, F32, Product("temporal_conv", cuda="a group reads more than 16384 rows"), "reference", "16384 rows"),
])
def test_what_a_kernel_refuses(gpu, dtype, product, backend, reason):
    chosen = choose(product.op, "cuda", dtype, gpu=gpu, product=product)
    assert chosen.backend == (backend or preference.faster(90, product.op, "forward", "float32", product.block))
    assert chosen.fallback == (chosen.backend == "reference")
    assert reason in chosen.reason


@pytest.mark.parametrize("forced", ["triton", "cuda"])
def test_a_backend_can_be_forced_on_a_gpu(forced):
    assert choose("graph_conv", "cuda", BF16, gpu=BOTH, forced=forced).backend == forced
    with pytest.raises(ValueError, match=f"SPARSE_STGCN_BACKEND={forced}.*float64"):
        choose("graph_conv", "cuda", F64, gpu=BOTH, forced=forced)
    with pytest.raises(ValueError, match="not (installed|built)"):
        choose("graph_conv", "cuda", F32, gpu=NEITHER, forced=forced)
    with pytest.raises(ValueError, match="native does not run on cuda"):
        choose("graph_conv", "cuda", F32, gpu=BOTH, forced="native")
    assert choose("graph_conv", "cuda", F64, gpu=BOTH, forced="reference").backend == "reference"


def test_the_group_lasso_alone_has_no_gpu_kernel():
    chosen = choose("group_lasso", "cuda", F32, gpu=BOTH)
    assert (chosen.backend, chosen.fallback) == ("reference", True)


@pytest.mark.parametrize(("arguments", "message"), [
    ({"device": "cpu", "dtype": F32, "forced": "fast"}, "one of reference, native, triton, cuda"),
    ({"device": "cpu", "dtype": F32, "forced": "triton"}, "triton does not run on a CPU"),
    ({"device": "cpu", "dtype": torch.float16, "forced": "native"}, "not float16"),
    ({"device": "cpu", "dtype": F32, "forced": "native", "native_available": False}, "Got"),
], ids=["unknown", "triton", "dtype", "not built"])
def test_a_forced_backend_that_cannot_run_is_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        choose("temporal_conv", **arguments)


def test_every_backend_is_reported_with_a_reason():
    report = backends()
    assert set(report) == set(dispatch.BACKENDS)
    assert all(report.values())


def test_a_fallback_warns_once_and_names_its_reason(monkeypatch):
    """float64 on a GPU: what the GPU would do, on a CPU tensor."""
    monkeypatch.setattr(dispatch, "choose", lambda op, device, dtype, **more: choose(op, "cuda", dtype, **more))
    monkeypatch.setattr(dispatch, "gpu_of", lambda device: BOTH)
    monkeypatch.setattr(dispatch, "_warned", set())
    pattern = BlockPattern.full((8, 4, 1))
    x, values = torch.randn(1, 4, 3, 5, dtype=F64), torch.randn(pattern.values_shape, dtype=F64)
    with pytest.warns(UserWarning, match="dense PyTorch reference: .*float64") as caught:
        for _ in range(3):
            temporal_conv(x, values, pattern)
    assert len(caught) == 1
    assert caught[0].filename == __file__


def test_a_fallback_is_traced_without_a_warning(monkeypatch):
    """Which would break the graph; the same op still warns when it runs uncompiled."""
    monkeypatch.setattr(dispatch, "_warned", set())
    pattern = BlockPattern.full((8, 4, 1))
    x, values = torch.randn(1, 4, 3, 5).half(), torch.randn(pattern.values_shape).half()
    run = lambda x: temporal_conv(x, values, pattern)
    compiled = torch.compile(run, fullgraph=True, backend="eager")(x)
    assert not dispatch._warned
    with pytest.warns(UserWarning, match="dense PyTorch reference: .*float16"):
        assert torch.equal(compiled, run(x))


@pytest.mark.skipif(_native.module is None, reason="the native module is not built")
@pytest.mark.filterwarnings("ignore:sparse_stgcn")
def test_a_choice_is_made_anew_when_what_it_depends_on_changes(monkeypatch):
    """Choices are kept: by op, dtype, adjacency, what is forced and whether there are native kernels."""
    cpu = torch.device("cpu")
    ask = lambda op="temporal_conv", dtype=torch.float32, dims=3: dispatch.backend_for(op, cpu, dtype, dims)
    for _ in range(2):
        assert ask() == "native" and ask("norm", torch.float64) == "native"
        assert ask(dtype=torch.float16) == ask("norm", torch.bfloat16) == ask("graph_conv", dims=5) == "reference"
        with dispatch.forced_backend("reference"):
            assert ask() == "reference"
        with dispatch.forced_backend("triton"), pytest.raises(ValueError, match="triton does not run on a CPU"):
            ask()
        monkeypatch.setattr(_native, "module", None)
        assert ask() == "reference"
        monkeypatch.undo()


def test_what_is_missing_is_explained(monkeypatch):
    """Without a GPU, without triton and without the CUDA module: everything imports, and says what is not there."""
    code = ("import sys; sys.modules['triton'] = None; sys.modules['sparse_stgcn._cuda'] = None; import torch\n"
            "torch.cuda.is_available = lambda: False\n"
            "from sparse_stgcn.kernels import backends\nimport json; print(json.dumps(backends()))")
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    report = json.loads(done.stdout)
    assert "triton is not installed" in report["triton"]
    assert "not built" in report["cuda"] or "left out" in report["cuda"]
    monkeypatch.setattr(dispatch, "_gpu_at", lambda index: BOTH)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda index: "H100")
    assert backends()["triton"].startswith("available (triton") and "H100" in backends()["triton"]
    monkeypatch.setattr(dispatch, "_gpu_at", lambda index: Gpu(75))
    assert "8.0" in backends()["triton"]


def test_a_driver_that_the_cuda_module_cannot_use_is_a_reason(monkeypatch):
    """torch sees a GPU, the module's own runtime does not: Triton is left, and nothing raises."""
    class Module:
        def Device(self, index):
            raise RuntimeError(f"CUDA device {index} cannot be used: CUDA driver version is insufficient")

    monkeypatch.setattr(cuda, "module", Module())
    monkeypatch.setattr(torch.backends.cuda, "is_built", lambda: True)
    for name, value in {"is_available": True, "current_device": 1, "device_count": 2, "get_device_capability": (9, 0)}.items():
        monkeypatch.setattr(torch.cuda, name, lambda *_, value=value: value)
    cuda._device.cache_clear()
    assert cuda.missing() == "built, but CUDA device 1 cannot be used: CUDA driver version is insufficient"
    found = dispatch._gpu_at.__wrapped__(0)
    assert "driver" in found.cuda
    for op in dispatch.GPU_OPS:
        refusals = dispatch.gpu_refusals(F32, Gpu(90, None, found.cuda), Product(op))
        assert refusals == {"triton": None, "cuda": found.cuda}
        assert choose(op, "cuda", F32, gpu=Gpu(90, None, found.cuda)).backend == "triton"


@pytest.mark.parametrize("name", [f"{op}{product}" for op in dispatch.GPU_OPS for product in (
    "", "_input_gradient", "_weight_gradient")])
def test_cuda_launches_with_the_device_of_its_tensors_current(name, monkeypatch):
    """The module does not go back to another device; torch does."""
    x, current = torch.zeros(1, 4, 2, 5), []

    @contextmanager
    def device_of(tensor):
        current.append(tensor)
        yield
        current.pop()

    def prepare(*_):
        raise ValueError(f"{len(current)} device")

    monkeypatch.setattr(torch.cuda, "device_of", device_of)
    monkeypatch.setattr(cuda, "_prepare", prepare)
    function = getattr(cuda, name)
    given = {"shape": (8, 4, 1), "block": (8, 1), "stride": 1, "dilation": 1, "frames": 2}
    with pytest.raises(ValueError, match="^1 device$"):
        function(*(given.get(p.name, x) for p in inspect.signature(function).parameters.values() if p.kind != p.KEYWORD_ONLY))
    assert current == [x]


@pytest.mark.parametrize("torch_has", ["fp32_precision", "only the older setters"])
def test_float32_multiplies_as_torch_is_told(torch_has, monkeypatch):
    """Set either way; the older setting refuses to be read once the newer one was set."""
    asked, launch = [], SimpleNamespace(reason=None)
    monkeypatch.setattr(cuda, "_launch", lambda op, product, arithmetic, *_: asked.append(arithmetic) or launch)
    x, before, matmul = torch.zeros(1, 4, 2, 5), torch.get_float32_matmul_precision(), torch.backends.cuda.matmul
    if torch_has != "fp32_precision":
        monkeypatch.setattr(torch.backends.cuda, "matmul", SimpleNamespace())

    def found():
        answers = {gpu._arithmetic(F32) == "tf32"}
        cuda._prepare("TemporalConv", "forward", x, (8, 4, 1), (8, 1), x, None, 2)
        answers.add(asked.pop() == "tf32")
        try:
            from sparse_stgcn.kernels.triton.launch import arithmetic_of
        except ImportError:
            pass
        else:
            answers.add(arithmetic_of(F32, None) == "tf32")
            assert arithmetic_of(F32, False) == "float32" and arithmetic_of(F32, True) == "tf32"
        assert answers == {device.multiplies_in_tf32()}
        return answers.pop()

    try:
        for precision, tf32 in (("high", True), ("highest", False), ("medium", True)):
            torch.set_float32_matmul_precision(precision)
            assert found() is tf32
        if torch_has == "fp32_precision":
            for precision, tf32 in (("ieee", False), ("tf32", True)):
                torch.set_float32_matmul_precision("highest")
                matmul.fp32_precision = precision
                assert found() is tf32
    finally:
        torch.set_float32_matmul_precision(before)
        matmul.fp32_precision = "none"


@pytest.mark.parametrize("name", ["temporal_conv", "temporal_conv_dx", "temporal_conv_dw", "pointwise_conv_backward",
                                  "adjacency_conv", "adjacency_conv_dx", "adjacency_conv_dw"])
def test_the_ops_are_registered_for_gpus(name):
    assert torch._C._dispatch_has_kernel_for_dispatch_key(f"sparse_stgcn::{name}", "CUDA")


def test_shapes_of_gpu_tensors_are_known_without_a_gpu(monkeypatch):
    """Fake tensors on "cuda" go through the public ops and the ops of their gradients, as under torch.compile."""
    from torch._subclasses.fake_tensor import FakeTensorMode

    from sparse_stgcn.kernels import graph_conv

    monkeypatch.setattr(dispatch, "gpu_of", lambda device: BOTH)
    ops = torch.ops.sparse_stgcn
    flat = BlockPattern.full((16, 8, 9))
    with FakeTensorMode(allow_non_fake_inputs=True):
        def fresh(*shape):
            return torch.empty(shape, device="cuda", dtype=BF16)

        there = BlockPattern(flat.shape, flat.block, *(torch.empty(t.shape, dtype=t.dtype, device="cuda") for t in (
            flat.row_ptr, flat.input, flat.tap, flat.t_ptr, flat.t_perm, flat.t_row)), num_live=flat.num_live)
        index = (there.row_ptr, there.input, there.tap, list(there.shape), list(there.block))
        x, w, b, c = fresh(2, 8, 10, 25), fresh(*flat.values_shape), fresh(16), fresh(9, 16)
        y = temporal_conv(x, w, there, b, stride=2)
        assert (y.shape, y.device.type, y.dtype) == ((2, 16, 5, 25), "cuda", BF16)
        assert ops.temporal_conv_dx(y, w, *index, 2, 1, 10).shape == x.shape
        assert [t.shape for t in ops.temporal_conv_dw(x, y, w, None, None, *index, 2, 1)] == [w.shape, b.shape]
        for outer in ((9,), (2, 9), (2, 9, 16)):
            a = fresh(*outer, 25, 25)
            y = graph_conv(x, w, there, a, c, offset=b)
            assert (y.shape, y.device.type, y.dtype) == ((2, 16, 10, 25), "cuda", BF16)
            assert [t.shape for t in ops.adjacency_conv_dx(x, y, w, a, c, *index, True, True)] == [x.shape, a.shape]
            assert [t.numel() for t in ops.adjacency_conv_dx(x, y, w, a, c, *index, False, False)] == [0, 0]
            assert [t.shape for t in ops.adjacency_conv_dw(x, y, w, a, None, None, *index)] == [w.shape, c.shape]


@pytest.mark.parametrize("env", [{"SPARSE_STGCN_BACKEND": "reference"}, {"SPARSE_STGCN_ISA": "none-such"}], ids=str)
def test_the_package_works_on_the_reference_path(env):
    """Forced, or because the native module cannot be used: a network still trains."""
    code = ("import torch, sparse_stgcn; m = sparse_stgcn.create_model('stgcn', 3, base_channels=8); "
            "sparse_stgcn.compact(sparse_stgcn.sparsify(m, 0.5)); m(torch.randn(1, 1, 8, 25, 3)).sum().backward(); "
            "print(all(p.grad is not None for p in m.parameters()))")
    done = subprocess.run([sys.executable, "-W", "ignore", "-c", code], env={**os.environ, **env}, capture_output=True,
                          text=True, timeout=120)
    assert done.stdout.strip() == "True", done.stderr
