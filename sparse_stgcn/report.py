"""python -m sparse_stgcn.report SOURCE: one self-contained HTML page of a run or a sweep, with playback of test sequences."""
from __future__ import annotations

import math
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro

from . import plots
from .errors import UserError, run, validating
from .options import OptionalStr

__all__ = ["ReportConfig", "main"]


@dataclass
class ReportConfig:
    """Write one HTML page of a run or a sweep. It needs no other file and no network.

    Of a run: headline numbers, training curves, confusion, classes, mask, configuration, environment, and the test sequences
    that were most confused or least sure, to play and turn. Of a sweep: accuracy over sparsity and size, training curves,
    sureness, and a table of the runs.
    """

    source: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="SOURCE")]
    """Work directory of a finished run, or the results of a sweep (NAME.json)."""
    out: OptionalStr = None
    """File to write. Default: report.html in the work directory, or NAME.html beside the results."""
    runs: OptionalStr = None
    """Of a sweep: directory of its work directories, to play the sequences that most runs get wrong. Default: none are."""
    samples: int = 16
    """Test sequences to play; of a run half of them are mistakes. 0: none; the archive is not read then."""
    megabytes: float = 4.0
    """Largest size of the sequences together; what does not fit is left out."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; see ``--help``. Errors are for ``errors.run`` to report."""
    asked = tyro.cli(ReportConfig, args=argv, prog="python -m sparse_stgcn.report")
    if asked.samples < 0:
        raise UserError(f"Expected --samples >= 0. Got {asked.samples}.")
    if not 0 < asked.megabytes < math.inf:
        raise UserError(f"Expected --megabytes to be a finite number > 0. Got {asked.megabytes:g}.")
    source = Path(asked.source)
    out = Path(asked.out) if asked.out else source / "report.html" if source.is_dir() else source.with_suffix(".html")
    if not out.parent.is_dir():
        raise UserError(f"Expected --out to be in a directory that exists. Got {out}; create {out.parent}.")
    if asked.runs is not None and source.is_dir():
        raise UserError(f"Expected --runs with the results of a sweep. Got the work directory {source}; leave it out.")
    runs = None if asked.runs is None else Path(asked.runs)
    plots.require()
    from .checkpoint import write_atomically
    from .reports import run as of_run
    from .reports import sweep as of_sweep
    from .reports.page import render

    with validating():
        page = (of_run.build(source, asked.samples, asked.megabytes) if source.is_dir() else
                of_sweep.build(source, runs, asked.samples, asked.megabytes))
        size = write_atomically(out, render(page).encode())
    print(f"report    {out}, {size / 1e3:,.0f} kB; open it in a browser")
    return 0


if __name__ == "__main__":
    sys.exit(run(main))
