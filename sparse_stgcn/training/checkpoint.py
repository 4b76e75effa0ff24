"""The resume file: everything a run needs to go on as if it had never stopped.

One safetensors file, replaced atomically: the network as ``sparse_stgcn.checkpoint`` packs it (prefix ``model.``), its average
if there is one (``ema.``), each parameter's optimizer state (``optimizer.KEY.PARAMETER``), the random state of torch on the
CPU and on each CUDA device, and in the metadata the next epoch, the history, where in the epoch the run is (``position``),
which data it is trained on (``data``, see ``same_data``) and the SHA-256 of all of that (``sha256``). Order and augmentation
are functions of (seed, epoch, index) and need no state.
"""
from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..checkpoint import DAMAGED, pack, read_metadata, read_tensors, rebuild, unpack, write_tensors
from ..recognizer import Ensemble, Recognizer

__all__ = ["load_average", "load_model", "load_network", "load_state", "read_position", "save_state", "verify"]

Position = dict[str, float]


def save_state(path: Path, model: nn.Module, optimizer: torch.optim.Optimizer, epoch: int,
               history: list[dict[str, Any]], position: Position | None = None, average: nn.Module | None = None,
               data: Mapping[str, Any] | None = None) -> int:
    """Write the state before epoch ``epoch`` (from 0), or inside it, and return the size of the file in bytes.

    Args:
        position: where in the epoch the run is, see ``loop.Totals``; None before its first step.
        average: the network of averaged weights, at the same stage.
        data: what ``same_data.describe`` says of the archive.
    """
    packed, description = pack(model)
    tensors = {f"model.{name}": tensor for name, tensor in packed.items()}
    if average is not None:
        packed, description["ema"] = pack(average)
        tensors |= {f"ema.{name}": tensor for name, tensor in packed.items()}
    names: dict[Tensor, str] = {parameter: name for name, parameter in model.named_parameters()}
    for parameter, state in optimizer.state.items():
        for key, value in state.items():
            if isinstance(value, Tensor):
                tensors[f"optimizer.{key}.{names[parameter]}"] = value.detach().cpu().clone()
    tensors["random.cpu"] = torch.get_rng_state()
    if torch.cuda.is_available():
        for index, state in enumerate(torch.cuda.get_rng_state_all()):
            tensors[f"random.cuda.{index}"] = state
    description |= {"epoch": epoch, "history": history, "position": position, "data": data}
    return write_tensors(path, tensors, {**description, "sha256": _digest(tensors, description)})


def verify(path: Path, model: nn.Module) -> None:
    """Check that a file is whole, as it was written, and of this network; ``model`` is not touched.

    Raises:
        ValueError: it is cut off or no resume file, its checksum differs, or the network is another one.
        OSError: the file cannot be read.
    """
    tensors, description = _read(path)
    recorded = description.pop("sha256", None)  # version 0.1.0 wrote none
    if recorded is not None and recorded != _digest(tensors, description):
        raise ValueError(f"Expected {path} to have the checksum that was written with it. Got another; the file is damaged.")
    other = description.get("members", [description])[0]["model"]  # the levels of one run are of one network
    if other != json.loads(json.dumps(model.config)):
        raise ValueError(f"Expected {path} to hold the network of this configuration. Got another network: "
                         f"{other.get('name')} with {other.get('num_classes')} classes.")


def load_model(path: Path, model: nn.Module) -> None:
    """Give a dense network the weights, patterns and stage of the resume file.

    Raises:
        ValueError: not a resume file, or one of another network.
        OSError: the file cannot be read.
    """
    tensors, description = _read(path)
    _fill(path, model, tensors, description, "model.")


def load_average(path: Path, average: nn.Module) -> None:
    """Give a copy of the network of the resume file its averaged weights; raises like :func:`load_model`."""
    tensors, description = read_tensors(path)
    if "ema" not in description:
        raise ValueError(f"Expected {path} to hold averaged weights. Got none; it was written without --ema.")
    _fill(path, average, tensors, description["ema"], "ema.")


def load_network(path: Path) -> Recognizer | Ensemble:
    """The network of the resume file, or the networks of a run that trains several, built anew.

    Raises:
        ValueError: not a resume file, or a damaged one.
        OSError: the file cannot be read.
    """
    tensors, description = _read(path)
    try:
        return rebuild(_part(tensors, "model."), description)
    except DAMAGED as error:
        raise ValueError(f"Expected {path} to be a complete resume file. Got: {error}.") from error


def load_state(path: Path, model: nn.Module, optimizer: torch.optim.Optimizer) -> tuple[int,
                                                                                        list[dict[str, Any]]]:
    """Give the optimizer of a network from :func:`load_model` its state back, restore the random state of
    torch.

    Returns:
        (epoch, history): the next epoch, from 0, and the records of those before it.
    """
    tensors, description = read_tensors(path)
    try:
        epoch, history = int(description["epoch"]), [dict(record) for record in description["history"]]
        parameters = dict(model.named_parameters())
        for entry, value in tensors.items():
            if entry.startswith("optimizer."):
                _, key, name = entry.split(".", 2)
                # A step count is a scalar that torch keeps on the CPU.
                on_device = value.to(parameters[name].device) if value.ndim else value
                optimizer.state[parameters[name]][key] = on_device
        torch.set_rng_state(tensors["random.cpu"])
        if torch.cuda.is_available():
            for index in range(torch.cuda.device_count()):
                if (state := tensors.get(f"random.cuda.{index}")) is not None:
                    torch.cuda.set_rng_state(state, index)
    except DAMAGED as error:
        raise ValueError(f"Expected {path} to be the resume file of a run. Got one whose parts do not fit: {error}.") from error
    return epoch, history


def read_position(path: Path) -> Position | None:
    """Where in its epoch the run of a resume file is; None before the epoch's first step."""
    return read_metadata(path).get("position")


def _read(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Everything in a resume file."""
    tensors, description = read_tensors(path)
    if "epoch" not in description:
        raise ValueError(f"Expected {path} to be the resume file of a run. Got a checkpoint without training "
                         "state.")
    return tensors, description


def _part(tensors: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {k.removeprefix(prefix): v for k, v in tensors.items() if k.startswith(prefix)}


def _fill(path: Path, model: nn.Module, tensors: Mapping[str, Tensor], description: Mapping[str, Any], prefix: str) -> None:
    try:
        unpack(model, _part(tensors, prefix), description)
    except DAMAGED as error:
        raise ValueError(f"Expected {path} to fit the network of this configuration. "
                         f"Got: {error}.") from error


def _digest(tensors: Mapping[str, Tensor], description: Mapping[str, Any]) -> str:
    """SHA-256 of the description as JSON and of every tensor with its name, in the order of the names."""
    digest = hashlib.sha256(json.dumps(description, sort_keys=True).encode())
    for name in sorted(tensors):
        tensor = tensors[name].contiguous()
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.reshape(-1).view(torch.uint8).numpy().data if tensor.numel() else b"")
    return digest.hexdigest()
