"""What is fuzzed: valid files of every kind that the package reads, and how it reads them, to the last array."""
from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import test_archive
import test_pyskl_reader
import test_readers_ctrgcn
import test_readers_kinetics
import test_readers_ntu
import tiny
import torch
import yaml

import sparse_stgcn
from sparse_stgcn import checkpoint, checkpoint_pyskl
from sparse_stgcn.config import TrainConfig
from sparse_stgcn.data import Archive
from sparse_stgcn.data.arrays import ArraysSource
from sparse_stgcn.data.ctrgcn import CtrgcnSource
from sparse_stgcn.data.kinetics import K400Source, KineticsSource
from sparse_stgcn.data.ntu_raw import NtuRawSource
from sparse_stgcn.data.pyskl import PysklSource
from sparse_stgcn.data.source import Record, Source
from sparse_stgcn.kernels import pattern
from sparse_stgcn.masks import Layer, predefined
from sparse_stgcn.scores import Scores
from sparse_stgcn.skeleton import Skeleton
from sparse_stgcn.sparsity import compact, maskable_convs
from sparse_stgcn.sweeps import collect
from sparse_stgcn.sweeps.grid import Grid
from sparse_stgcn.training.checkpoint import load_model, load_state, save_state

__all__ = ["TARGETS", "Target"]


@dataclass(frozen=True)
class Target:
    """A kind of file.

    Args:
        make: writes valid files below a folder and returns those to damage.
        read: reads what ``make`` wrote; gets the folder and the damaged file.
    """

    make: Callable[[Path], list[Path]]
    read: Callable[[Path, Path], Any]


# ---- data sets -------------------------------------------------------------------------------------------------

def records(source: Source) -> None:
    """Everything that a conversion asks a reader for."""
    source.fingerprint()
    found = [source.record(i) for i in range(len(source))]
    kept = [record for record in found if isinstance(record, Record)]
    fields = {key: np.array([record.fields[key] for record in kept]) for key in (kept[0].fields if kept else ())}
    source.splits(np.array([record.sample for record in kept]), fields)


def archive(path: Path) -> None:
    found = Archive.open(path)
    found.check_finite()
    for index in range(len(found)):
        found.read(index)
    found.with_split()


def archive_directory(folder: Path) -> list[Path]:
    tiny.archive().save(folder / "archive")
    return sorted((folder / "archive").iterdir())


def arrays(folder: Path) -> list[Path]:
    rng = np.random.default_rng(0)
    np.save(folder / "a.npy", rng.normal(size=(5, 2, 4, 3)).astype(np.float32))
    (folder / "b.json").write_text(json.dumps(rng.normal(size=(6, 4, 3)).tolist()))
    layout = {"joints": ["root", "head", "left_hand", "right_hand"], "edges": [[1, 0], [2, 0], [3, 0]], "root": 0}
    (folder / "set.json").write_text(json.dumps({"layout": layout, "label_names": ["bow", "wave"], "sequences": [
        {"file": "a.npy", "label": "wave", "split": "train"}, {"file": "b.json", "label": 0, "split": "val", "sample": "bee"},
        {"keypoint": rng.normal(size=(3, 4, 3)).tolist(), "label": 1, "split": "train"}]}))
    return [folder / name for name in ("set.json", "a.npy", "b.json")]


def pyskl(folder: Path) -> list[Path]:
    content = test_pyskl_reader.pickled(test_pyskl_reader.annotations(count=9, joints=25))
    return [test_pyskl_reader.write(folder / f"protocol{p}.pkl", content, p) for p in (2, 4)]


def kinetics(folder: Path) -> list[Path]:
    return sorted(test_readers_kinetics.folder(folder / "kinetics").rglob("*.json"))


def k400(folder: Path) -> list[Path]:
    return sorted(test_readers_kinetics.k400(folder / "k400").parent.iterdir())


def ntu(folder: Path) -> list[Path]:
    return sorted(test_readers_ntu.dataset(folder / "ntu").iterdir())[:2]


# ---- networks --------------------------------------------------------------------------------------------------

def network(sparsity: float = 0.8) -> Any:
    return compact(tiny.model(sparsity)).eval()


def checkpoints(folder: Path) -> list[Path]:
    sparse_stgcn.save(network(), folder / "sparse.safetensors", label_names=["one", "two", "three"])
    sparse_stgcn.save(tiny.model(), folder / "dense.safetensors")
    sparse_stgcn.save(sparse_stgcn.Ensemble([network(), network(0.5)]), folder / "ensemble.safetensors")
    return sorted(folder.glob("*.safetensors"))


def run_checkpoint(folder: Path, file: Path) -> None:
    checkpoint.read_metadata(file)
    model = sparse_stgcn.load(file).eval()
    first = model.members[0] if isinstance(model, sparse_stgcn.Ensemble) else model
    # What was accepted must be safe to run: live blocks index the memory of the native kernels.
    if sum(p.numel() for p in model.parameters()) < 10**6:
        joints, channels = len(first.config["layout"]["joints"]), first.config["in_channels"]
        sparse_stgcn.optimize(model)(torch.zeros(1, 1, 8, joints, channels))


def resume_file(folder: Path) -> list[Path]:
    model = network()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    model(torch.randn(2, 1, 8, 5, 3)).sum().backward()
    optimizer.step()
    save_state(folder / "resume.safetensors", model, optimizer, 3, [{"epoch": 2, "loss": 1.0}])
    return [folder / "resume.safetensors"]


def resume(folder: Path, file: Path) -> None:
    model = tiny.model()
    load_model(file, model)
    load_state(file, model, torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9))


def state_dict(folder: Path) -> list[Path]:
    torch.save(checkpoint_pyskl.to_pyskl(tiny.model()), folder / "pyskl.pth")
    return [folder / "pyskl.pth"]


def masks(folder: Path) -> list[Path]:
    convs = maskable_convs(network())
    np.savez(folder / "masks.npz", **{name: conv.pattern.mask().numpy() for name, conv in convs.items()})
    return [folder / "masks.npz"]


def read_masks(folder: Path, file: Path) -> None:
    layers = [Layer(name, conv.shape_oik, (4, 1)) for name, conv in maskable_convs(tiny.model()).items()]
    for layer, live in zip(layers, predefined.read(file, layers), strict=True):
        pattern.BlockPattern.from_blocks(torch.from_numpy(live.copy()), layer.shape, layer.block)


def scores(folder: Path) -> list[Path]:
    rng = np.random.default_rng(0)
    p = rng.dirichlet(np.ones(3), 6).astype(np.float32)
    Scores(np.array(list("abcdef")), np.arange(6) % 3, p, np.log(p), {"data": "tiny"}).save(folder / "scores.npz")
    return [folder / "scores.npz"]


# ---- text ------------------------------------------------------------------------------------------------------

def text(name: str, content: Any) -> Callable[[Path], list[Path]]:
    def make(folder: Path) -> list[Path]:
        (folder / f"{name}.json").write_text(json.dumps(content))
        (folder / f"{name}.yaml").write_text(yaml.safe_dump(content))
        return [folder / f"{name}.json", folder / f"{name}.yaml"]
    return make


GRID = {"train": {"epochs": 2}, "runs": [{"sparsity": [0, 0.5, 0.9], "seed": [0, 1]}],
        "combine": [{"name": "both", "over": "sparsity", "values": [0.5, 0.9], "weights": "3,1"}],
        "tables": {"t": {"rows": ["backbone"], "columns": "sparsity"}},
        "figures": {"f": {"kind": "lines", "x": "sparsity", "lines": "backbone"}}}
RESULTS = {"format": 1, "grid": "g", "entries": [{"name": "a", "config": {"sparsity": 0.5}, "test": {"top1": 0.5}}]}


TARGETS: dict[str, Target] = {
    "archive_npz": Target(lambda f: [test_archive.npz(f / "a.npz"), test_archive.npz(f / "b.npz", False)],
                          lambda _, file: archive(file)),
    "archive_directory": Target(archive_directory, lambda folder, _: archive(folder / "archive")),
    "pyskl": Target(pyskl, lambda _, file: records(PysklSource(file))),
    "ctrgcn": Target(lambda f: [test_readers_ctrgcn.save(f / "x.npz")], lambda _, file: records(CtrgcnSource(file))),
    "ntu": Target(ntu, lambda folder, _: records(NtuRawSource(folder / "ntu"))),
    "kinetics": Target(kinetics, lambda folder, _: records(KineticsSource(folder / "kinetics"))),
    "k400": Target(k400, lambda folder, _: records(K400Source(folder / "k400" / "k400.pkl"))),
    "arrays": Target(arrays, lambda folder, _: records(ArraysSource(folder / "set.json"))),
    "layout": Target(text("layout", tiny.SKELETON.to_dict()), lambda _, file: Skeleton.load(file).adjacency("spatial")),
    "config": Target(text("config", TrainConfig(epochs=2).to_dict()),
                     lambda _, file: TrainConfig.read(file).resolved("small")),
    "grid": Target(text("grid", GRID), lambda _, file: Grid.read(file)),
    "results": Target(lambda f: text("results", RESULTS)(f)[:1], lambda _, file: collect.read(file)),
    "checkpoint": Target(checkpoints, run_checkpoint),
    "resume": Target(resume_file, resume),
    "state_dict": Target(state_dict, lambda _, file: checkpoint_pyskl.from_pyskl(tiny.model(), file)),
    "masks": Target(masks, read_masks),
    "scores": Target(scores, lambda _, file: Scores.load(file).metrics()),
}
