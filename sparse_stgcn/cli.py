"""The ``sparse-stgcn`` command: one verb per module, and without a verb what this installation can do."""
from __future__ import annotations

import os
import platform
import sys
from collections.abc import Sequence
from importlib import import_module

from .errors import one_of
from .errors import run as run_command

__all__ = ["VERBS", "describe_installation", "main"]

# Verb -> what it does. The module of the same name has main(argv).
VERBS = {
    "train": "train a sparse or dense network in two stages",
    "evaluate": "test a trained network and write its scores",
    "lottery": "learn masks on frozen weights, or prune by magnitude, over sparsity",
    "ensemble": "test several sparsity levels as one network and write it as one file",
    "fuse": "combine score files of several streams or networks",
    "sweep": "run an experiment of many trainings, and write its tables and figures",
    "plot": "draw a skeleton, a confusion matrix, masks, training curves, or what accuracy costs",
    "report": "write one HTML page of a run or a sweep, with playback of test sequences",
    "info": "parameters and multiply-adds of a network, per block",
    "convert": "make an archive from other formats",
    "bench": "time a network, sparse against dense engines",
}


def main(argv: Sequence[str] | None = None) -> int:
    """``sparse-stgcn VERB [options]`` or ``python -m sparse_stgcn VERB [options]``; returns the exit code."""
    return run_command(_dispatch, argv)


def _dispatch(argv: Sequence[str] | None) -> int:
    arguments = list(sys.argv[1:] if argv is None else argv)
    if not arguments or arguments[0] in ("-h", "--help"):
        print(describe_installation())
        return 0
    verb, *rest = arguments
    one_of("the command", verb, list(VERBS))
    return import_module(f".{verb}", __package__).main(rest) or 0


def describe_installation() -> str:
    """Version, backends with the reason for each missing one, instruction set, threads, and the commands."""
    import torch

    from . import __version__
    from .kernels import backends

    lines = [f"sparse_stgcn {__version__}, Python {platform.python_version()}", "", "backends"]
    found = backends()
    lines += [f"  {name:<10} {status}" for name, status in found.items()]
    devices = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    lines += ["", "machine",
              f"  {'processor':<10} {platform.machine()}, {os.cpu_count()} processors, instruction set "
              f"{_instruction_set()}",
              f"  {'threads':<10} {torch.get_num_threads()} (torch)",
              f"  {'GPU':<10} {', '.join(devices) or 'none visible to torch'}",
              f"  {'torch':<10} {torch.__version__}", f"  {'triton':<10} {_triton_version()}",
              "", "commands (python -m sparse_stgcn.COMMAND --help)"]
    return "\n".join(lines + [f"  {verb:<10} {text}" for verb, text in VERBS.items()])


def _instruction_set() -> str:
    from .kernels import _native

    return _native.isa if _native.module is not None else "none (the native module is not available)"


def _triton_version() -> str:
    try:
        import triton
    except ImportError as error:
        return f"not available ({error})"
    return triton.__version__


if __name__ == "__main__":
    sys.exit(main())
