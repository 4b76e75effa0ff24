"""Exported networks: equal outputs in the other runtime, in a process of their own, and no file where they differ."""

from __future__ import annotations

import json
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
import tiny
import torch

from sparse_stgcn import Ensemble, checkpoint, compact, create_model, export, portable, sparsify
from sparse_stgcn.errors import UserError

META = {"label_names": ["one", "two", "three"], "protocol": {"clip_len": 12, "num_person": 2}}


def network(name: str, seed: int = 0) -> torch.nn.Module:
    torch.manual_seed(seed)
    fixed = {} if name in ("stgcn", "dgstgcn") else {"num_person": 2}
    model = create_model(name, 3, layout=tiny.SKELETON, base_channels=8, **fixed)
    model = compact(sparsify(model, 0.7, (4, 1), seed=seed))
    with torch.no_grad():
        model(torch.randn(4, 2, 8, 5, 3))  # running statistics
        model.cls_head.fc_cls.weight.mul_(100)
    return model.eval()


def keypoint(batch: int = 2, frames: int = 12) -> torch.Tensor:
    return torch.randn(batch, 2, frames, 5, 3, generator=torch.Generator().manual_seed(batch + frames))


def written(model: torch.nn.Module, folder: Path, *options: str) -> Path:
    """The one file that the command adds to ``folder``."""
    source = folder / "model.safetensors"
    checkpoint.save(model, source, **META)
    assert export.main([str(folder), *options]) == 0
    found, = set(folder.iterdir()) - {source}
    return found


def test_live_blocks_run_in_another_process(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = network("stgcn")
    path = written(model, tmp_path, "--to", "pt2")
    assert "keypoint N x 2 x T x 5 x 3, T at least 8; output logits" in capsys.readouterr().out
    torch.save(keypoint(3, 21), tmp_path / "x.pt")
    subprocess.run([sys.executable, "-c", f"""
import torch, sparse_stgcn.kernels
program = torch.export.load({str(path)!r})
assert any(str(node.target).startswith("sparse_stgcn.") for node in program.graph.nodes)
torch.save(program.module()(torch.load({str(tmp_path / 'x.pt')!r})).detach(), {str(tmp_path / 'y.pt')!r})
"""], check=True)
    with torch.no_grad():
        assert torch.equal(torch.load(tmp_path / "y.pt"), model(keypoint(3, 21)))
    with zipfile.ZipFile(path) as archive:
        name, = (n for n in archive.namelist() if n.endswith(portable.METADATA))
        metadata = json.loads(archive.read(name))
    assert metadata["meta"] == META and metadata["joints"] == list(tiny.SKELETON.joints)


def test_dense_program_needs_torch_alone(tmp_path: Path) -> None:
    model = network("stgcn")
    path = written(model, tmp_path, "--to", "pt2-dense")
    program = torch.export.load(path)
    assert not [node for node in program.graph.nodes if "sparse_stgcn" in str(node.target)]
    weights = dict(program.named_parameters())
    assert sum(int((w == 0).sum()) for w in weights.values()) > 0.5 * sum(w.numel() for w in weights.values() if w.dim() == 4)
    with torch.no_grad():
        torch.testing.assert_close(program.module()(keypoint(1, 30)), model(keypoint(1, 30)), rtol=1e-4, atol=1e-5)
    code = f"import sys, torch; torch.export.load({str(path)!r}).module(); sys.exit('sparse_stgcn' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True, cwd=tmp_path)


def test_onnx(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    onnxruntime = pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    model = network("stgcn")
    path = written(model, tmp_path, "--to", "onnx")
    assert "not faster than a dense network" in capsys.readouterr().out
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    assert [i.name for i in session.get_inputs()] == ["keypoint"] and [o.name for o in session.get_outputs()] == ["logits"]
    assert json.loads(session.get_modelmeta().custom_metadata_map["sparse_stgcn"])["meta"] == META
    for shape in ((1, 9), (5, 40)):
        with torch.no_grad():
            expected = model(keypoint(*shape))
        found = torch.from_numpy(session.run(None, {"keypoint": keypoint(*shape).numpy()})[0])
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("target", ["pt2", "onnx"])
@pytest.mark.parametrize("name", ["aagcn", "ctrgcn", "dgstgcn"])
def test_other_backbones_take_any_number_of_frames(name: str, target: str, tmp_path: Path,
                                                   capsys: pytest.CaptureFixture[str]) -> None:
    if target == "onnx":
        pytest.importorskip("onnxruntime")
        pytest.importorskip("onnxscript")
    written(network(name), tmp_path, "--to", target)
    assert "N x 2 x T x 5 x 3, T at least 8" in capsys.readouterr().out


@pytest.mark.slow
def test_ensemble(tmp_path: Path) -> None:
    ensemble = Ensemble([network("stgcn", 0), network("stgcn", 1)]).eval()
    program = torch.export.load(written(ensemble, tmp_path, "--to", "pt2"))
    with torch.no_grad():
        assert torch.equal(program.module()(keypoint()), ensemble(keypoint()))


def test_own_file_in_half_precision(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = network("stgcn")
    path = written(model, tmp_path, "--to", "safetensors", "--dtype", "float16", "--coding", "index")
    description = checkpoint.read_metadata(path)
    assert (description["dtype"], description["coding"], description["meta"]) == ("float16", "index", META)
    assert "x smaller than dense float32" in capsys.readouterr().out


@pytest.mark.parametrize("wrong", [lambda y: y * 1.001, lambda y: y * float("nan")], ids=["close", "nan"])
def test_a_program_that_differs_is_not_written(wrong, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(portable, "trace", lambda model, example, plain: (None, True))
    monkeypatch.setattr(portable, "pt2_bytes", lambda program, metadata: b"")
    model = network("stgcn")
    monkeypatch.setattr(portable, "run_pt2", lambda content: lambda x: wrong(model(x)))
    with pytest.raises(ValueError, match="no file was written"):
        written(model, tmp_path, "--to", "pt2")
    assert [path.name for path in tmp_path.iterdir()] == ["model.safetensors"]


@pytest.mark.parametrize(("options", "message"), [
    (["--to", "tflite"], "--to to be one of"),
    (["--to", "pt2", "--dtype", "float16"], "--to safetensors alone"),
    (["--to", "pt2", "--frames", "3"], "--frames of at least 8"),
    (["--to", "pt2", "--out", "nowhere/m.pt2"], "--out in a directory that exists"),
    (["--to", "safetensors", "--dtype", "int8"], "dtype"),
], ids=lambda value: str(value) if isinstance(value, str) else " ".join(value))
def test_bad_arguments(options: list[str], message: str, tmp_path: Path) -> None:
    checkpoint.save(network("stgcn"), tmp_path / "model.safetensors", **META)
    with pytest.raises(UserError, match=message):
        export.main([str(tmp_path), *options])
    assert [path.name for path in tmp_path.iterdir()] == ["model.safetensors"]


def test_missing_packages_are_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(portable.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"sparse-stgcn\[export\]"):
        export.main([str(tmp_path), "--to", "onnx"])
