"""python -m sparse_stgcn.export D: a trained network as a file of another runtime, checked before it is written."""
from __future__ import annotations

import copy
import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Annotated, Any

import tyro

from .errors import UserError, one_of, run, validating
from .options import OptionalInt, OptionalStr

if TYPE_CHECKING:
    from torch import Tensor, nn

__all__ = ["TARGETS", "ExportConfig", "main"]

# Target -> suffix of its file.
TARGETS = {"pt2": ".pt2", "pt2-dense": ".dense.pt2", "onnx": ".onnx", "safetensors": ".export.safetensors"}


@dataclass
class ExportConfig:
    """Write a trained network for another runtime, load the file again and compare; a file that differs is not written.

    pt2: torch.export of the live blocks; it runs where sparse_stgcn.kernels is imported. pt2-dense: torch.export with zeros in
    the place of dead weights, torch's own ops alone. onnx: the same for ONNX Runtime and others, which multiply the zeros
    too: it is not faster there than a dense network. safetensors: this package's own file, in float16 or without the seed.
    """

    source: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="D")]
    """Work directory of a finished run, or a .safetensors file of one network or of an ensemble."""
    to: str = "pt2"
    """pt2, pt2-dense, onnx or safetensors."""
    out: OptionalStr = None
    """File to write. Default: beside the network, with the target's suffix."""
    frames: OptionalInt = None
    """Frames T of the example. Default: those of the training, or 100. Other T are taken where the report says so."""
    persons: OptionalInt = None
    """Persons M, which are fixed in the file. Default: those of the training, or 2."""
    dtype: str = "float32"
    """Of a safetensors file: float32 or float16."""
    coding: OptionalStr = None
    """Of the masks in a safetensors file: seed, bitmask or index. Default: the smallest."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; see ``--help``. Errors are for ``errors.run`` to report."""
    asked = tyro.cli(ExportConfig, args=argv, prog="python -m sparse_stgcn.export")
    one_of("--to", asked.to, list(TARGETS))
    if asked.to != "safetensors" and (asked.dtype != "float32" or asked.coding is not None):
        raise UserError(f"Expected --dtype and --coding with --to safetensors alone. Got --to {asked.to}.")
    from . import portable
    from .checkpoint import load, read_metadata
    from .inputs import checkpoint_file

    if asked.to == "onnx":
        portable.require_onnx()
    source = checkpoint_file(asked.source)
    out = Path(asked.out) if asked.out else source.with_suffix(TARGETS[asked.to])
    with validating():
        model, meta = load(source), read_metadata(source)["meta"]
        if not out.parent.is_dir():
            raise UserError(f"Expected --out in a directory that exists. Got {out}.")
        if out.resolve() == source.resolve():
            raise UserError(f"Expected --out other than the network itself. Got {out}.")
    print("\n".join(_as_safetensors(asked, model, meta, out) if asked.to == "safetensors"
                    else _as_program(asked, model, meta, out)))
    return 0


def _as_program(asked: ExportConfig, model: nn.Module, meta: dict[str, Any], out: Path) -> list[str]:
    """Write a .pt2 or .onnx file; the lines of the report."""
    from . import portable
    from .checkpoint import write_atomically
    from .sparsity import densify

    example, plain = _example(asked, model, meta), asked.to != "pt2"
    _, persons, frames, joints, channels = example.shape
    program, dynamic = portable.trace(densify(copy.deepcopy(model), forget=True) if plain else model, example, plain)
    output, members = portable.output_name(model), list(getattr(model, "members", [model]))
    metadata = {"input": "keypoint (N, M, T, V, C) float32", "output": f"{output} (N, classes)",
                "frames": f"at least {portable.LEAST_FRAMES}" if dynamic else frames, "persons": persons,
                "joints": list(members[0].backbone.skeleton.joints), "members": [member.config for member in members],
                "meta": meta}
    if asked.to == "onnx":
        content = portable.onnx_bytes(program, output, metadata)
        rebuilt = portable.run_onnx(content)
    else:
        content = portable.pt2_bytes(program, metadata)
        rebuilt = portable.run_pt2(content)
    worst = portable.check(rebuilt, model, example, dynamic)
    size = write_atomically(out, content)
    lines = [f"input     keypoint N x {persons} x {'T' if dynamic else frames} x {joints} x {channels}"
             f"{f', T at least {portable.LEAST_FRAMES}' if dynamic else ''}; output {output}",
             f"checked   largest difference {worst:.1e} of the largest output, with the file's own bytes",
             f"file      {out}, {size / 1e3:,.0f} kB"]
    if asked.to == "onnx":
        lines.append("note      ONNX Runtime multiplies the zeros as well: not faster than a dense network. "
                     "For speed use sparse_stgcn.optimize.")
    return lines


def _example(asked: ExportConfig, model: nn.Module, meta: dict[str, Any]) -> Tensor:
    """Keypoints (2, M, T, V, C) in the shape of the training.

    Raises:
        UserError: --frames or --persons does not fit the network.
    """
    import torch

    from . import portable

    backbone, protocol = next(iter(getattr(model, "members", [model]))).backbone, meta.get("protocol") or {}
    persons = asked.persons
    if persons is None:
        persons = backbone.num_person or protocol.get("num_person") or 2
    frames = asked.frames
    if frames is None:
        frames = max(protocol.get("clip_len") or 100, portable.LEAST_FRAMES)
    if frames < portable.LEAST_FRAMES or persons < 1 or backbone.num_person not in (None, persons):
        raise UserError(f"Expected --frames of at least {portable.LEAST_FRAMES} and --persons of "
                        f"{backbone.num_person or 'at least 1'}. Got {frames} and {persons}.")
    return torch.randn(2, persons, frames, len(backbone.skeleton), backbone.in_channels,
                       generator=torch.Generator().manual_seed(1))


def _as_safetensors(asked: ExportConfig, model: nn.Module, meta: dict[str, Any], out: Path) -> list[str]:
    """Write this package's own file in another dtype or coding; the lines of the report."""
    from . import portable
    from .checkpoint import dense_bytes, load, save

    members = list(getattr(model, "members", [model]))
    example, whole = _example(asked, model, meta), asked.dtype == "float32"
    with validating(), TemporaryDirectory(dir=out.parent) as scratch:  # what was there is replaced by what was checked
        file = Path(scratch) / out.name
        size = save(model, file, dtype=asked.dtype, coding=asked.coding, **meta)  # type: ignore[arg-type]
        worst = portable.check(load(file), model, example, True, portable.TOLERANCE if whole else portable.ROUGH)
        os.replace(file, out)
    dense = sum(map(dense_bytes, members))
    return [f"checked   largest difference {worst:.1e} of the largest output, from float32 to {asked.dtype}",
            f"file      {out}, {size / 1e3:,.0f} kB, {dense / size:.1f}x smaller than dense float32"]


if __name__ == "__main__":
    sys.exit(run(main))
