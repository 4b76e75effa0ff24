"""The resume file: everything a run needs to go on as if it had never stopped.

One safetensors file, replaced atomically after every epoch: the network as ``sparse_stgcn.checkpoint`` packs
it (prefix ``model.``), each parameter's optimizer state (``optimizer.KEY.PARAMETER``), the random state of
torch on the CPU and on each CUDA device, and in the metadata the next epoch and the history. Order and
augmentation are functions of (seed, epoch, index) and need no state.
"""
from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..checkpoint import DAMAGED, pack, read_tensors, rebuild, unpack, write_tensors
from ..recognizer import Ensemble, Recognizer

__all__ = ["load_model", "load_network", "load_state", "save_state"]


def save_state(path: Path, model: nn.Module, optimizer: torch.optim.Optimizer, epoch: int,
               history: list[dict[str, Any]]) -> int:
    """Write the state before epoch ``epoch`` (from 0) and return the size of the file in bytes."""
    packed, description = pack(model)
    tensors = {f"model.{name}": tensor for name, tensor in packed.items()}
    names: dict[Tensor, str] = {parameter: name for name, parameter in model.named_parameters()}
    for parameter, state in optimizer.state.items():
        for key, value in state.items():
            if isinstance(value, Tensor):
                tensors[f"optimizer.{key}.{names[parameter]}"] = value.detach().cpu().clone()
    tensors["random.cpu"] = torch.get_rng_state()
    if torch.cuda.is_available():
        for index, state in enumerate(torch.cuda.get_rng_state_all()):
            tensors[f"random.cuda.{index}"] = state
    return write_tensors(path, tensors, {**description, "epoch": epoch, "history": history})


def load_model(path: Path, model: nn.Module) -> None:
    """Give a dense network the weights, patterns and stage of the resume file.

    Raises:
        ValueError: not a resume file, or one of another network.
        OSError: the file cannot be read.
    """
    tensors, description = _read(path)
    try:
        unpack(model, tensors, description)
    except DAMAGED as error:
        raise ValueError(f"Expected {path} to fit the network of this configuration. "
                         f"Got: {error}.") from error


def load_network(path: Path) -> Recognizer | Ensemble:
    """The network of the resume file, or the networks of a run that trains several, built anew.

    Raises:
        ValueError: not a resume file, or a damaged one.
        OSError: the file cannot be read.
    """
    tensors, description = _read(path)
    try:
        return rebuild(tensors, description)
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


def _read(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """(tensors, description) of the network in the resume file, as ``pack`` gave them."""
    tensors, description = read_tensors(path)
    if "epoch" not in description:
        raise ValueError(f"Expected {path} to be the resume file of a run. Got a checkpoint without training "
                         "state.")
    prefix = "model."
    return {k.removeprefix(prefix): v for k, v in tensors.items() if k.startswith(prefix)}, description
