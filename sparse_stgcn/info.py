"""python -m sparse_stgcn.info: parameters and multiply-adds of a network, in all and per block."""
from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated

import tyro

from .errors import UserError, one_of, run, validating
from .options import OptionalStr

if TYPE_CHECKING:
    from .recognizer import Recognizer

__all__ = ["InfoConfig", "describe", "main"]


@dataclass
class InfoConfig:
    """Parameters (all, maskable, kept) and multiply-adds (dense, effective) per sample.

    Of the network in a work directory or a checkpoint file, or of a new one. Effective counts kept weights
    only.
    """

    source: Annotated[OptionalStr, tyro.conf.Positional, tyro.conf.arg(metavar="[D]")] = None
    """Work directory of a finished run, or a .safetensors file. Without it, new networks."""
    backbone: OptionalStr = None
    """stgcn, aagcn, ctrgcn or dgstgcn. Default: all four."""
    classes: int = 60
    """Number of classes of a new network."""
    layout: str = "nturgb+d"
    """Skeleton layout of a new network: a name or a YAML/JSON file."""
    sparsity: float = 0.0
    """Sparsity of a new network."""
    block: str = "8x1"
    """Weight block of a new network."""
    density: str = "uniform"
    """Share of each layer of a new network: uniform or erk."""
    scope: str = "layer"
    """Where the sparsity of a new network holds exactly: layer, block or global."""
    frames: int = 100
    """Frames T of a sample."""
    persons: int = 2
    """Persons M of a sample."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; see ``--help``. Errors are for ``errors.run`` to report."""
    asked = tyro.cli(InfoConfig, args=argv, prog="python -m sparse_stgcn.info")
    from .backbones import BACKBONES

    if asked.backbone is not None:
        one_of("--backbone", asked.backbone, list(BACKBONES))
    if asked.source is not None and asked.backbone is not None:
        raise UserError("Expected a trained network or --backbone, not both. Remove one of the two.")
    with validating():
        if asked.source is not None:
            models = trained(asked.source)
        else:
            models = [fresh(name, asked) for name in ([asked.backbone] if asked.backbone else BACKBONES)]
        text = "\n\n".join(describe(model, asked.frames, asked.persons) for model in models)
    print(text)
    return 0


def describe(model: Recognizer, frames: int = 100, persons: int = 2) -> str:
    """The report of one network, for one sample of ``persons`` x ``frames``.

    Raises:
        ValueError: see ``macs.count``.
    """
    from .macs import count
    from .sparsity import block_of, summary

    kept, work = summary(model), count(model, frames, persons)
    head = work.dense - sum(dense for dense, _ in work.per_block())
    lines = [
        f"{model.config['name']}  {model.num_classes} classes, {len(model.backbone.skeleton)} joints; sample "
        f"of M = {persons}, T = {frames}",
        f"  parameters     {kept.parameters:>13,}  kept {kept.kept_parameters:>13,}  "
        f"{kept.kept_parameters_fraction:7.2%}",
        f"  maskable       {kept.maskable:>13,}  kept {kept.kept:>13,}  {kept.kept_fraction:7.2%}",
        f"  multiply-adds  {work.dense:>13,}  effective {work.effective:>13,}  "
        f"{work.effective / work.dense:7.2%}",
        "  block     maskable         kept   multiply-adds       effective",
    ]
    for block, (dense, effective) in enumerate(work.per_block()):
        layers = [layer for layer in kept.layers if block_of(layer.name) == block]
        lines.append(f"  {block + 1:>5} {sum(x.total for x in layers):>12,} "
                     f"{sum(x.kept for x in layers):>12,} {dense:>15,} {effective:>15,}")
    lines.append(f"  {'head':>5} {0:>12,} {0:>12,} {head:>15,} {head:>15,}")
    return "\n".join(lines)


def fresh(name: str, asked: InfoConfig) -> Recognizer:
    """A new network as the flags describe it."""
    from .backbones import create_model
    from .sparsity import sparsify
    from .training.run import fixed_persons

    model = create_model(name, asked.classes, layout=asked.layout, **fixed_persons(name, asked.persons))
    if asked.sparsity:
        sparsify(model, asked.sparsity, asked.block, density=asked.density, scope=asked.scope)
    return model


def trained(path: str) -> list[Recognizer]:
    """The network of a work directory or of a checkpoint file; of an ensemble its members."""
    from .checkpoint import load
    from .inputs import checkpoint_file

    model = load(checkpoint_file(path))
    return list(getattr(model, "members", [model]))


if __name__ == "__main__":
    sys.exit(run(main))
