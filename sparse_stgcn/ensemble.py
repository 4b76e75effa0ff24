"""python -m sparse_stgcn.ensemble D...: several trained networks as one: tested, described, and written to one file."""
from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import tyro

from . import comparison, plots
from .config import TrainConfig
from .errors import UserError, run, validating
from .options import OptionalInt, OptionalStr

if TYPE_CHECKING:
    from .data.archive import Archive
    from .recognizer import Ensemble, Recognizer
    from .scores import Scores

__all__ = ["EnsembleConfig", "main"]

# What makes the input of a network; the members of an ensemble share it.
_INPUT = ("data", "split", "fold", "layout", "stream", "missing", "align", "box", "sampler", "sequences", "clip_len",
          "num_person")


@dataclass
class EnsembleConfig:
    """Test trained networks of one input, such as the sparsity levels of a backbone, as one, and write them to one file.

    The answer is the mean of the members' probabilities, each the mean over the clips. Streams take another input each:
    fuse their scores with sparse_stgcn.fuse.
    """

    work_dirs: Annotated[tuple[str, ...], tyro.conf.Positional, tyro.conf.arg(metavar="D...")]
    """Work directories of finished runs."""
    out: OptionalStr = None
    """Directory to write ensemble.safetensors, scores.npz, result.json and confidence.png to. Default: the first D and
    -ensemble."""
    data: OptionalStr = None
    """Archive to test on. Default: that of the training."""
    clips: OptionalInt = None
    """Clips per sequence."""
    batch_size: OptionalInt = None
    """Clips per forward pass."""
    device: OptionalStr = None
    """cpu, cuda or cuda:N."""
    threads: OptionalInt = None
    """CPU threads."""
    workers: OptionalInt = None
    """Processes that load data."""
    average: bool = False
    """Also test the mean of the members' weights as one network, its batch norms estimated anew on the training set."""
    nested: OptionalStr = None
    """Work directory of sparse_stgcn.multilevel with the same levels, to compare with: writes comparison.md."""
    figure: bool = False
    """Draw confidence.png, the distribution of the largest probability (the paper's Figure 6). Needs matplotlib."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; see ``--help``. Errors are for ``errors.run`` to report."""
    asked = tyro.cli(EnsembleConfig, args=argv, prog="python -m sparse_stgcn.ensemble")
    if asked.figure:
        plots.require()
    configs = members(asked)
    nested = None if asked.nested is None else comparison.read_nested(asked.nested, configs)

    from .averaging import average
    from .checkpoint import load, read_metadata, save, write_atomically
    from .evaluate import check_fit
    from .recognizer import Ensemble
    from .scores import predict_all
    from .training import run as training

    out = Path(asked.out or Path(asked.work_dirs[0]).with_name(Path(asked.work_dirs[0]).name + "-ensemble"))
    if (out / "config.yaml").exists():
        raise UserError(f"Expected --out to be a directory of its own. Got {out}, which holds a run whose results it would "
                        "replace; name another.")
    archive = training.open_archive(configs[0])
    resolved = [training.resolve(config, archive) for config in configs]
    config = resolved[0]
    training.set_up_torch(config)
    with validating():
        models = [load(Path(folder) / "model.safetensors", config.device or "cpu") for folder in asked.work_dirs]
        for folder, model in zip(asked.work_dirs, models, strict=True):
            check_fit(model, archive, read_metadata(Path(folder) / "model.safetensors")["meta"].get("label_names") or ())
        ensemble = Ensemble(models).eval()
        mean = average(models) if asked.average else None
        out.mkdir(parents=True, exist_ok=True)
    dataset = training.test_set(config, archive)
    own = predict_all(models, dataset, dataset.sample_ids, config.batch_size or 32, config.workers or 0,
                      [training.protocol(c, archive) for c in resolved])
    names = names_of(resolved, asked.work_dirs)
    result, together = describe(ensemble, own, names)
    together.save(out / "scores.npz")
    result["bytes"] = save(ensemble, out / "ensemble.safetensors", label_names=list(archive.label_names),
                           members=names, protocol=dict(together.protocol), metrics=together.metrics())
    if mean is not None:
        result["average"] = describe_average(mean, config, archive)
        result["average"]["bytes"] = save(mean, out / "average.safetensors", label_names=list(archive.label_names),
                                          members=names, metrics=result["average"]["test"])
    if nested is not None:
        result["comparison"] = comparison.rows(nested, result, asked.work_dirs)
        write_atomically(out / "comparison.md", comparison.to_markdown(result["comparison"]).encode())
    write_atomically(out / "result.json", (json.dumps(result, indent=1) + "\n").encode())
    if asked.figure:
        sure = {"ensemble": result["confidence"], **{m["name"]: m["confidence"] for m in result["members"]}}
        plots.save(plots.violins({name: c["max_probability"] for name, c in sure.items()}), out / "confidence.png")
    print("\n".join([*lines(result), f"files     {out}"]))
    return 0


def members(asked: EnsembleConfig) -> list[TrainConfig]:
    """The configuration of each member.

    Raises:
        UserError: fewer than two directories, one without a finished run, or members of different input.
    """
    from .evaluate import EvaluateConfig, merge

    if len(asked.work_dirs) < 2:
        raise UserError(f"Expected at least two work directories. Got {len(asked.work_dirs)}.")
    shared = {key: getattr(asked, key) for key in ("data", "clips", "batch_size", "device", "threads", "workers")}
    configs = [merge(EvaluateConfig(folder, **shared)) for folder in asked.work_dirs]
    for folder, config in zip(asked.work_dirs, configs, strict=True):
        for key in _INPUT:
            first, other = getattr(configs[0], key), getattr(config, key)
            if first != other:
                raise UserError(f"Expected members of the same input. Got {key} {first} in {asked.work_dirs[0]} and {other} "
                                f"in {folder}; evaluate them one by one and combine their scores with sparse_stgcn.fuse.")
    return [replace(config, eval_clips=asked.clips or configs[0].eval_clips) for config in configs]


def describe(ensemble: Ensemble, own: Sequence[Scores], names: Sequence[str]) -> tuple[dict[str, Any], Scores]:
    """The figures of the ensemble and of each member, and the ensemble's scores."""
    from . import fusion
    from .sparsity import summary
    from .sweeps.collect import confidence

    together = fusion.fuse([fusion.Member(name, s.sample, s.label, s.probability, s.logit)
                            for name, s in zip(names, own, strict=True)], protocol={**own[0].protocol, "members": list(names)})
    kept = [summary(model) for model in ensemble.members]
    weights: dict[str, float] = {"maskable": kept[0].maskable, "maskable_kept": sum(k.kept for k in kept),
               "all": kept[0].parameters, "all_kept": sum(k.kept_parameters for k in kept)}
    weights |= {f"{key}_kept_fraction": weights[f"{key}_kept"] / weights[key] for key in ("maskable", "all")}
    return {
        "test": {**together.metrics(), "samples": len(together.label), "protocol": dict(together.protocol)},
        "confidence": confidence(together), "weights": weights,
        "members": [{"name": name, "test": s.metrics(), "confidence": confidence(s), "kept": k.kept,
                     "all_kept": k.kept_parameters} for name, s, k in zip(names, own, kept, strict=True)]}, together


def describe_average(network: Recognizer, config: TrainConfig, archive: Archive) -> dict[str, Any]:
    """The figures of the mean of the members' weights, whose batch norms are estimated anew on the training set."""
    from torch.optim.swa_utils import update_bn
    from torch.utils.data import DataLoader

    from .scores import predict
    from .sparsity import summary
    from .sweeps.collect import confidence
    from .training import run as training

    batch_size, workers = config.batch_size or 32, config.workers or 0
    train_set = training.dataset(config, archive, "train", train=True)
    shuffled = DataLoader(train_set, batch_size, sampler=train_set.order().tolist(), num_workers=workers)
    update_bn(shuffled, network, next(network.parameters()).device)
    scores = predict(network, training.test_set(config, archive), None, batch_size, workers)
    kept = summary(network)
    weights = {"maskable_kept": kept.kept, "maskable_kept_fraction": kept.kept_fraction, "all_kept": kept.kept_parameters,
               "all_kept_fraction": kept.kept_parameters_fraction}
    return {"test": scores.metrics(), "confidence": confidence(scores), "weights": weights}


def lines(result: dict[str, Any]) -> list[str]:
    """The report of the command."""
    def row(name: str, part: dict[str, Any]) -> str:
        return (f"{name:<9} top-1 {part['test']['top1']:.2%}, mean class {part['test']['mean_class']:.2%}, calibration error "
                f"{part['confidence']['expected_calibration_error']:.3f}, under 0.5 {part['confidence']['under_half']:.1%}")

    weights, test = result["weights"], result["test"]
    return [
        f"protocol  {test['protocol']['data']}, {test['protocol']['clips']} clips of {test['protocol']['clip_len']} frames, "
        f"{test['samples']} sequences; probabilities averaged over clips and members",
        *(row(member["name"], member) for member in result["members"]), row("ensemble", result),
        *([row("average", result["average"])] if "average" in result else []),
        f"kept      {weights['maskable_kept_fraction']:.2f} of one network's {weights['maskable']:,} maskable weights, "
        f"{weights['all_kept_fraction']:.2f} of its {weights['all']:,} parameters, in all members together",
        f"file      {result['bytes'] / 1e3:,.0f} kB", *comparison.lines(result.get("comparison", []))]


def names_of(configs: Sequence[TrainConfig], work_dirs: Sequence[str]) -> list[str]:
    """How the members are called: by their levels of sparsity, or by their directories where two levels are equal."""
    levels = [config.level if config.sparsity else "dense" for config in configs]
    return levels if len(set(levels)) == len(levels) else list(work_dirs)


if __name__ == "__main__":
    sys.exit(run(main))
