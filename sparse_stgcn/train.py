"""python -m sparse_stgcn.train: train a network in two stages, test it, and write it to a work directory."""
from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from .config import TrainConfig, parse
from .errors import UserError, run

__all__ = ["main"]


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; see ``--help``. Errors are for ``errors.run`` to report."""
    config = continued(parse(argv, prog="python -m sparse_stgcn.train"))
    from .training.run import prepare

    job = prepare(config)
    line = job.trainer.report.line
    for text in introduction(job.config, job):
        line(text)
    try:
        job.fit()
    except KeyboardInterrupt:
        print(f"\nstopped; continue with: python -m sparse_stgcn.train --resume {job.work_dir}",
              file=sys.stderr)
        raise
    result = job.finish()
    if job.world.first:
        for text in conclusion(result):
            line(text)
        line(f"files     {job.work_dir}; test again with: python -m sparse_stgcn.evaluate {job.work_dir}")
    job.world.leave()
    return 0


def continued(config: TrainConfig) -> TrainConfig:
    """Where torchrun may start processes again (``--max-restarts``), the configuration that goes on with the run in
    ``work_dir`` if there is one; else ``config``.

    Raises:
        UserError: no ``--work-dir``, by which a process that is started again finds its run.
    """
    if config.resume is not None or not int(os.environ.get("TORCHELASTIC_MAX_RESTARTS", "0")):
        return config
    if config.work_dir is None:
        raise UserError("Expected --work-dir together with torchrun --max-restarts, so that a process that is started again "
                        "finds its run. Got none.")
    return config.resuming(config.work_dir) if (Path(config.work_dir) / "config.yaml").exists() else config


def introduction(config: TrainConfig, job: Any) -> list[str]:
    """What is about to happen, with every number that was not given."""
    archive, trainer = job.archive, job.trainer
    source = "the embedded synthetic set (no --data)" if config.data is None else config.data
    stages = (f"{config.epochs} epochs, {config.warmup_epochs} of them dense warm-up" if config.sparse
              else f"{config.epochs} epochs, dense")
    processes = "" if job.world.size == 1 else f" in each of {job.world.size} processes"
    return [
        f"data      {source}: {len(trainer.train_set)} training and {len(trainer.test_set)} test sequences, "
        f"{archive.num_classes} classes, split {archive.info.get('split')}, stream {config.stream}",
        f"network   {config.backbone}, {archive.skeleton.name} layout, "
        + ("dense" if not config.sparse else f"sparsity {config.level}{f' ({config.budget})' if config.budget else ''}, "
                                             f"block {config.block}, {config.density}"),
        f"recipe    {stages}, batch {config.batch_size}" + (f" in {config.accumulate} parts" if config.accumulate > 1 else "")
        + f", {config.clip_len} frames, seed {config.seed}",
        f"rate      {config.learning_rate:.4g} = {config.lr:g} x {config.batch_size} / "
        f"{config.lr_reference_batch}, cosine to 0; momentum {config.momentum:g}, weight decay "
        f"{config.weight_decay:g}",
        f"machine   {config.device}, {config.threads} threads{processes}; work directory {job.work_dir}",
    ]


def conclusion(result: dict[str, Any]) -> list[str]:
    """The figures at the end of a run."""
    test, weights, file = result["test"], result["weights"], result["file"]
    auto = result.get("auto")
    seconds = ", ".join(f"{name} {value:.0f} s" for name, value in result["seconds"].items())
    return [
        f"test      top-1 {test['top1']:.2%}, top-5 {test['top5']:.2%}, mean class {test['mean_class']:.2%} "
        f"({test['protocol']['clips']} clips, {test['samples']} sequences, last epoch)",
        f"kept      {weights['maskable_kept']:,} of {weights['maskable']:,} maskable weights "
        f"({weights['maskable_kept_fraction']:.2%}), {weights['all_kept']:,} of {weights['all']:,} "
        f"parameters ({weights['all_kept_fraction']:.2%})",
        f"file      {file['bytes'] / 1e3:,.0f} kB, dense {file['dense_bytes'] / 1e3:,.0f} kB "
        f"({file['times_smaller']:.1f} times smaller)",
        *([] if auto is None else [choice(auto)]),
        f"time      {seconds}",
    ]


def choice(auto: dict[str, Any]) -> str:
    """What was chosen under the budget, its latency as predicted and as measured, and by how much that misses the budget."""
    from .allocation.budget import Budget

    text = f"auto      budget {auto['budget']}: rule {auto['rule']}, sparsity {auto['sparsity']:.4g}"
    if "seconds" not in auto["measured"]:
        return text
    predicted = next(point["seconds"] for point in auto["points"] if point["chosen"])
    measured, budget = auto["measured"]["seconds"], Budget.parse(auto["budget"])
    missed = budget.kind == "seconds" and measured > budget.value
    return (f"{text}; inference {1e3 * measured:.3g} ms, predicted {1e3 * predicted:.3g} ms"
            + (f"; the budget is missed by {measured / budget.value - 1:.1%}" if missed else ""))


if __name__ == "__main__":
    sys.exit(run(main))
