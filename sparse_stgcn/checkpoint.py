"""Checkpoints: one safetensors file with JSON metadata, live weights only.

Layout of the file. Parameters and buffers stand under their state-dict names, floating point as float32,
except the weights of sparse convolutions. For all of these together, one after another in the order of the
network, there are

    sparse.live     uint8: the bits of ``pattern.blocks()`` (G, H, K) in row-major order, eight to a byte,
                    first block in the highest bit; every convolution begins a new byte
    sparse.values   float32: the kept weights in row-major order of (O, I, K)

so that nothing in the file depends on how the kernels lay weights out. A convolution that is still in the
warm-up has its dense ``NAME.weight`` instead of a part of ``sparse.values``. Equal buffers (the graph, in
every block) are stored once.

An ensemble is such a file of several networks: the tensors of member i begin with ``members.i.``, a buffer that an earlier
member has, too, is stored once (``same_as`` of the file), and the metadata has the list ``members``.

The metadata has one key, ``sparse_stgcn``, with JSON text: ``format``, ``version``, ``model`` (what rebuilds
the network), ``sparse`` (groups of convolutions with the same block and stage), ``pattern`` (SHA-256 of all
pattern digests), ``batches`` (``num_batches_tracked`` of every batch norm), ``same_as`` (buffer -> the buffer
that it equals) and ``meta`` (what the caller of :func:`save` added).
"""
from __future__ import annotations

import hashlib
import json
import os
import tempfile
from collections.abc import Iterable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from .checkpoint_pyskl import from_paper, from_pyskl, to_pyskl
from .kernels import BlockPattern
from .recognizer import Ensemble, Recognizer
from .sparsity import maskable_convs

__all__ = ["dense_bytes", "from_paper", "from_pyskl", "load", "pack", "pattern_digest", "read_metadata", "read_tensors", "save",
           "to_pyskl", "unpack", "write_atomically", "write_tensors"]

FORMAT = 1
KEY = "sparse_stgcn"
COUNTER = ".num_batches_tracked"


def save(model: nn.Module, path: str | Path, **meta: Any) -> int:
    """Write ``model`` to ``path`` and return the size of the file in bytes.

    The file is written under a temporary name in the same directory, flushed to the disk and renamed, so that
    ``path`` is at any moment either the old file or the whole new one.

    Args:
        model: a ``Recognizer`` at any stage (dense, warm-up or compact), or an ``Ensemble`` of such.
        path: the file; its directory must exist.
        **meta: anything that JSON can hold: label names, metrics, protocol ...; :func:`read_metadata` gives
            it back.
    """
    tensors, description = pack_members(model.members) if isinstance(model, Ensemble) else pack(model)
    return write_tensors(path, tensors, {**description, "meta": meta})


def load(path: str | Path, device: str | torch.device = "cpu") -> Any:
    """The ``Recognizer`` or ``Ensemble`` of a file written by :func:`save`: same stage, same outputs, in evaluation mode.

    Raises:
        ValueError: not such a file, or one whose contents do not fit together.
        OSError: the file cannot be read.
    """
    tensors, description = read_tensors(path)
    try:
        model = _rebuild(tensors, description)
    except (KeyError, RuntimeError, TypeError) as error:
        raise ValueError(f"Expected {path} to be a complete checkpoint. Got: {error}.") from error
    return model.to(device).eval()


def read_metadata(path: str | Path) -> dict[str, Any]:
    """The JSON metadata of a checkpoint, without reading its tensors.

    Raises:
        ValueError: not a file written by :func:`save`.
        OSError: the file cannot be read.
    """
    from safetensors import SafetensorError, safe_open

    _must_exist(path)
    try:
        with safe_open(str(path), framework="pt") as file:
            return _description(path, file.metadata())
    except SafetensorError as error:
        raise _foreign(path, error) from error


def dense_bytes(model: nn.Module) -> int:
    """Bytes of parameters and buffers of the same network with dense float32 weights, without a header."""
    dense = {name: pattern.size for name, _, pattern in _sparse_layers(model)}
    return sum(_stored(t).nbytes for k, t in model.state_dict().items() if _layer_of(k) not in dense) \
        + 4 * sum(dense.values())


def pack(model: nn.Module) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """(tensors, description) of a network, laid out as the module says; tensors are copies on the CPU."""
    layers = _sparse_layers(model)
    compact = {name for name, conv, _ in layers if conv.stage == "compact"}
    tensors = {k: _stored(t) for k, t in model.state_dict().items() if _layer_of(k) not in compact}
    batches = _take_counters(tensors)
    same_as = _drop_repeated(tensors, [name for name, _ in model.named_buffers()])
    groups: dict[tuple[Any, ...], list[str]] = {}
    for name, conv, pattern in layers:
        groups.setdefault((pattern.block, conv.stage), []).append(name)
    if layers:
        live = [np.packbits(pattern.blocks().numpy()) for _, _, pattern in layers]
        values = [pattern.scatter(conv.values.detach().cpu())[pattern.mask()]
                  for _, conv, pattern in layers if conv.stage == "compact"]
        tensors["sparse.live"] = torch.from_numpy(np.concatenate(live))
        tensors["sparse.values"] = _stored(torch.cat(values)) if values else torch.zeros(0)
    from . import __version__

    return tensors, {
        "format": FORMAT, "version": __version__, "model": model.config,
        "sparse": [{"block": key[0], "stage": key[1], "layers": names} for key, names in groups.items()],
        "pattern": _digest([pattern for _, _, pattern in layers]), "batches": batches, "same_as": same_as}


def pack_members(models: Iterable[nn.Module]) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """(tensors, description) of the networks of an ensemble, laid out as the module says."""
    tensors: dict[str, Tensor] = {}
    members: list[dict[str, Any]] = []
    buffers: list[str] = []
    for index, model in enumerate(models):
        own, description = pack(model)
        tensors |= {f"members.{index}.{name}": tensor for name, tensor in own.items()}
        buffers += [f"members.{index}.{name}" for name, _ in model.named_buffers()]
        members.append(description)
    same_as = _drop_repeated(tensors, buffers)
    return tensors, {"format": FORMAT, "version": members[0]["version"], "members": members, "same_as": same_as}


def _rebuild(tensors: dict[str, Tensor], description: Mapping[str, Any]) -> Recognizer | Ensemble:
    """The network or the ensemble of a file's contents; raises like :func:`unpack`."""
    if "members" not in description:
        model = Recognizer.from_config(description["model"])
        unpack(model, tensors, description)
        return model
    tensors = tensors | {name: tensors[source] for name, source in description["same_as"].items()}
    models = []
    for index, member in enumerate(description["members"]):
        prefix = f"members.{index}."
        models.append(Recognizer.from_config(member["model"]))
        unpack(models[-1], {k.removeprefix(prefix): v for k, v in tensors.items() if k.startswith(prefix)}, member)
    return Ensemble(models)


def unpack(model: nn.Module, tensors: Mapping[str, Tensor], description: Mapping[str, Any]) -> None:
    """Fill a dense network with what :func:`pack` gave, which also brings each convolution to its stage.

    Raises:
        ValueError: a tensor is missing or does not fit, or a pattern is not the one that was packed.
    """
    rest = dict(tensors)
    stages = {name: group["stage"] for group in description["sparse"] for name in group["layers"]}
    patterns = _read_patterns(model, rest.pop("sparse.live", torch.zeros(0)).numpy(), description)
    values, convs = rest.pop("sparse.values", torch.zeros(0)), maskable_convs(model)
    compact = [name for name in patterns if stages[name] == "compact"]
    expected = sum(patterns[name].num_live for name in compact)
    if tuple(values.shape) != (expected,):
        raise ValueError(f"Expected sparse.values of shape ({expected},). Got {tuple(values.shape)}.")
    for name, pattern in patterns.items():
        convs[name].attach(pattern)
        if stages[name] == "compact":
            convs[name].compact()
            own, values = values[:pattern.num_live], values[pattern.num_live:]
            dense = torch.zeros(pattern.shape)
            dense[pattern.mask()] = own
            rest[f"{name}.values"] = pattern.gather(dense)
    for name, source in description["same_as"].items():
        rest[name] = rest[source]
    if description["batches"] is not None:
        counters = [name for name, _ in model.named_buffers() if name.endswith(COUNTER)]
        rest |= {name: torch.tensor(description["batches"]) for name in counters}
    model.load_state_dict(rest)


def write_tensors(path: str | Path, tensors: Mapping[str, Tensor], description: Mapping[str, Any]) -> int:
    """Write tensors and JSON metadata to ``path`` by way of a temporary file; returns the size in bytes.

    Raises:
        OSError: the directory is missing or full; ``path`` is then as it was, and no temporary file is left.
    """
    from safetensors.torch import save as serialise

    return write_atomically(path, serialise(dict(tensors), {KEY: json.dumps(description)}))


def write_atomically(path: str | Path, content: bytes) -> int:
    """Write ``content`` under a temporary name beside ``path``, flush it to the disk, rename it; its size."""
    path = Path(path)
    handle, temporary = tempfile.mkstemp(prefix=f".{path.name}.", suffix=".part", dir=path.parent)
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        # mkstemp makes files that only the owner can read; a checkpoint gets the permissions of any new file.
        umask = os.umask(0)
        os.umask(umask)
        os.chmod(temporary, 0o666 & ~umask)
        os.replace(temporary, path)
        _flush_directory(path.parent)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise
    return len(content)


def _flush_directory(path: Path) -> None:
    """Make a rename last through a loss of power, where the system can: a directory is not a file everywhere."""
    with suppress(OSError):
        handle = os.open(path, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


def read_tensors(path: str | Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """(tensors, description) of a file written by :func:`write_tensors`. Raises like :func:`load`."""
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    description = read_metadata(path)
    try:
        return load_file(str(path)), description
    except SafetensorError as error:
        raise _foreign(path, error) from error


def _sparse_layers(model: nn.Module) -> list[tuple[str, Any, BlockPattern]]:
    """(name, convolution, its pattern on the CPU) of the sparse convolutions, in the order of the network."""
    return [(name, conv, conv.pattern.to("cpu")) for name, conv in maskable_convs(model).items()
            if conv.pattern is not None]


def _read_patterns(model: nn.Module, live: NDArray[np.uint8], description: Mapping[str, Any],
                   ) -> dict[str, BlockPattern]:
    """The pattern of every sparse convolution, in the order of the network, from ``sparse.live``."""
    blocks = {name: tuple(group["block"]) for group in description["sparse"] for name in group["layers"]}
    patterns: dict[str, BlockPattern] = {}
    for name, conv in maskable_convs(model).items():
        if name in blocks:
            shape, (bo, bi) = conv.shape_oik, blocks[name]
            grid = -(-shape[0] // bo), -(-shape[1] // bi), shape[2]
            size = -(-int(np.prod(grid)) // 8)
            bits, live = np.unpackbits(live[:size], count=int(np.prod(grid))), live[size:]
            alive = torch.from_numpy(bits.astype(bool).reshape(grid))
            patterns[name] = BlockPattern.from_blocks(alive, shape, (bo, bi))
    digest = _digest(list(patterns.values()))
    if set(patterns) != set(blocks) or len(live) or digest != description["pattern"]:
        raise ValueError("Expected the patterns of this network, with the digest that was saved with them. "
                         "Got others; the file is damaged.")
    return patterns


def pattern_digest(model: nn.Module) -> str:
    """SHA-256 of the patterns of all sparse convolutions, in the order of the network."""
    return _digest([pattern for _, _, pattern in _sparse_layers(model)])


def _digest(patterns: list[BlockPattern]) -> str:
    return hashlib.sha256("".join(pattern.digest() for pattern in patterns).encode()).hexdigest()


def _take_counters(tensors: dict[str, Tensor]) -> int | None:
    """Remove the batch counters if all are equal, as they are after any training, and return their value."""
    counters = [name for name in tensors if name.endswith(COUNTER)]
    counts = {int(tensors[name]) for name in counters}
    if len(counts) != 1:
        return None
    for name in counters:
        del tensors[name]
    return counts.pop()


def _drop_repeated(tensors: dict[str, Tensor], names: list[str]) -> dict[str, str]:
    """Remove each tensor of ``names`` that equals an earlier one; name -> the earlier one."""
    first: dict[tuple[Any, ...], str] = {}
    same_as = {}
    for name in names:
        tensor = tensors.get(name)
        if tensor is not None:
            source = first.setdefault((tensor.dtype, tensor.shape, tensor.numpy().tobytes()), name)
            if source != name:
                same_as[name] = source
                del tensors[name]
    return same_as


def _layer_of(key: str) -> str | None:
    """The module whose ``weight`` or ``values`` the state-dict key is, if it is one."""
    name, _, leaf = key.rpartition(".")
    return name if leaf in ("weight", "values") else None


def _stored(tensor: Tensor) -> Tensor:
    # A copy even where nothing changes, so that what was packed does not move on with the training.
    tensor = tensor.detach().cpu()
    return (tensor.float() if tensor.is_floating_point() else tensor).clone().contiguous()


def _must_exist(path: str | Path) -> None:
    if not Path(path).is_file():
        raise FileNotFoundError(2, "No such checkpoint", str(path))


def _foreign(path: str | Path, error: Exception | None = None) -> ValueError:
    reason = f"Got: {error}." if error else "Got a safetensors file without this project's metadata."
    return ValueError(f"Expected {path} to be a checkpoint written by sparse_stgcn.save. {reason}")


def _description(path: str | Path, metadata: Mapping[str, str] | None) -> dict[str, Any]:
    try:
        description = json.loads((metadata or {})[KEY])
        found = description["format"]
    except (KeyError, TypeError, ValueError):
        raise _foreign(path) from None
    if found != FORMAT:
        raise ValueError(f"Expected {path} in format {FORMAT}. Got format {found}; update sparse_stgcn.")
    return description
