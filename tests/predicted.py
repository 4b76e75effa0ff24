"""Two small trained networks for the tests of predictions."""
from __future__ import annotations

from pathlib import Path

import numpy as np
import tiny

from sparse_stgcn import Archive, evaluate
from sparse_stgcn.errors import run
from sparse_stgcn.training.run import prepare

# float32 sums of the fused runtime and of the kernels that evaluate uses, in different orders, behind a softmax.
TOLERANCE = 1e-5


def train_two(folder: Path) -> Path:
    """Two finished runs on bones of two persons, and their scores by evaluate."""
    content = tiny.arrays(persons=2)
    content["keypoint"][::5, 1] = 0
    content["keypoint"][3::7, 0, 2] = 0
    data = tiny.write_npz(folder / "tiny.npz", **content, fps=np.array(25.0))
    for name, sparsity in (("low", 0.5), ("high", 0.8)):
        job = prepare(tiny.config(data=str(data), work_dir=str(folder / name), epochs=2, warmup_epochs=1, stream="b",
                                  eval_clips=3, sparsity=sparsity))
        job.fit()
        job.finish()
    assert run(evaluate.main, [str(folder / "low")]) == 0
    return folder


def sequences(archive: Archive) -> list[np.ndarray]:
    return [archive.read(int(i))[0] for i in archive.members("test")]
