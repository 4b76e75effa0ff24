"""The shipped recipes of the large data sets, on small pickles of the same format: the commands in their comments work."""
from __future__ import annotations

import shlex
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import test_pyskl_reader as pyskl
import test_readers_kinetics as kinetics
import tiny

from sparse_stgcn import convert
from sparse_stgcn.data import Archive
from sparse_stgcn.errors import run
from sparse_stgcn.sweeps.grid import Grid
from sparse_stgcn.training.run import prepare

GRIDS = Path(__file__).parent.parent / "experiments"


def pickle_for(name: str, folder: Path) -> None:
    """The source that the recipe's command reads, in ``folder``."""
    if name.startswith("k400"):
        kinetics.k400(folder / "k400_poses").rename(folder / "k400_hrnet.pkl")
        return
    flat = name.startswith("gym")
    content = pyskl.pickled(pyskl.annotations(12, 17 if flat else 25, flat))
    split = content["split"]
    if flat:
        content["split"] = {"train": split["xsub_train"], "val": split["xsub_val"]}
    elif name.startswith("ntu120"):
        content["split"] = {key.replace("xview", "xset"): ids for key, ids in split.items()}
    pyskl.write(folder / ("gym_hrnet.pkl" if flat else f"{name.split('_')[0]}_3danno.pkl"), content)


# Those of NTU120 differ from NTU60's in names of splits alone.
@pytest.mark.parametrize("name", ["ntu60", "ntu60_streams", "k400_streams", "gym_streams",
                                  *(pytest.param(name, marks=pytest.mark.slow) for name in ("ntu120", "ntu120_streams"))])
def test_recipe(name, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    pickle_for(name, tmp_path)
    text = (GRIDS / f"{name}.yaml").read_text()
    command = text.split("python -m sparse_stgcn.convert ")[1].splitlines()[0]
    assert run(convert.main, shlex.split(command)) == 0, capsys.readouterr().err
    runs = Grid.read(GRIDS / f"{name}.yaml").runs
    # One run of each split; the last one has another stream where there are several.
    chosen = {r.config.split: r for r in runs if r.config.sparsity == 0.95}.values()
    for recipe in chosen:
        config = replace(recipe.config, base_channels=8, epochs=2, warmup_epochs=1, batch_size=4, clip_len=8, eval_clips=2,
                         lr=0.01, work_dir=str(tmp_path / f"run-{recipe.config.split}"), threads=1, workers=0, device="cpu")
        job = prepare(config)
        job.fit()
        result = job.finish()
        assert [record["stage"] for record in result["history"]] == ["warm-up", "fine-tune"]
        assert result["config"]["stream"] == recipe.config.stream and np.isfinite(result["history"][-1]["loss"])


def test_classes_divided_by_a_field(tmp_path, capsys):
    correct = np.arange(30) // 9 % 2
    source = tiny.write_npz(tmp_path / "tiny.npz", correct=correct)
    assert run(convert.main, [str(source), str(tmp_path / "six"), "--divide", "correct"]) == 0
    before, after = Archive.open(source), Archive.open(tmp_path / "six")
    assert after.num_classes == 6 and (after.label == before.label * 2 + correct).all()
    assert after.label_names[:2] == ("one, correct 0", "one, correct 1")
    np.testing.assert_array_equal(after.keypoint, before.keypoint)
    assert run(convert.main, [str(source), str(tmp_path / "none"), "--divide", "colour"]) == 2
    assert "one of correct" in capsys.readouterr().err and not (tmp_path / "none").exists()
