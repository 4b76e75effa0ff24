"""Checkpoints: one safetensors file with JSON metadata, live weights only. ``docs/format.md`` describes it for other readers.

Parameters and buffers stand under their state-dict names, except the weights of sparse convolutions. For all of these
together, one after another in the order of the network, there are

    sparse.values   the kept weights in row-major order of (O, I, K)
    sparse.live or sparse.gaps, or neither: their patterns, see ``pattern_coding``

so that nothing in the file depends on how the kernels lay weights out. A convolution that is still in the warm-up has its
dense ``NAME.weight`` instead of a part of ``sparse.values``. Equal buffers (the graph, in every block) are stored once.
Floating point is float32; with ``dtype="float16"`` weights of two or more dimensions and ``sparse.values`` are float16, and
vectors (norms, biases, statistics) stay float32.

An ensemble is such a file of several networks: the tensors of member i begin with ``members.i.``, a tensor that an earlier
member has, too, is stored once (``same_as`` of the file), and the metadata has the list ``members``. A compact member
whose kept weights are all among those of an earlier member, at the same places, has no ``sparse.values`` but the
earlier member's number as ``values_of``.

The metadata has one key, ``sparse_stgcn``, with JSON text: ``format``, ``version``, ``model`` (what rebuilds the network),
``dtype``, ``sparse`` (groups of convolutions with the same block and stage), ``coding`` and ``recipe`` of the patterns,
``pattern`` (SHA-256 of all pattern digests), ``batches`` (``num_batches_tracked`` of every batch norm), ``same_as`` (buffer ->
the buffer that it equals) and ``meta`` (what the caller of :func:`save` added).
"""
from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor, nn

from .checkpoint_pyskl import from_paper, from_pyskl, to_pyskl
from .kernels import BlockPattern
from .masks import Layer
from .pattern_coding import GAPS, LIVE, Recipe, decode, encode
from .recognizer import Ensemble, Recognizer
from .sparsity import mask_layers, maskable_convs, parse_block
from .tensor_file import FORMAT, read_metadata, read_tensors, serialised, write_atomically, write_tensors

__all__ = ["dense_bytes", "from_paper", "from_pyskl", "load", "pack", "pattern_digest", "read_metadata", "read_tensors",
           "rebuild", "save", "size", "to_pyskl", "unpack", "write_atomically", "write_tensors"]

# What the contents of a file raise that are not those of a checkpoint, besides ValueError.
DAMAGED = (KeyError, IndexError, TypeError, AttributeError, RuntimeError, ArithmeticError, MemoryError)
COUNTER, VALUES = ".num_batches_tracked", "sparse.values"

Dtype = Literal["float32", "float16"]
Coding = Literal["seed", "bitmask", "index"]


def save(model: nn.Module, path: str | Path, *, dtype: Dtype = "float32", coding: Coding | None = None, **meta: Any) -> int:
    """Write ``model`` to ``path`` and return the size of the file in bytes.

    The file is written under a temporary name in the same directory, flushed to the disk and renamed, so that
    ``path`` is at any moment either the old file or the whole new one.

    Args:
        model: a ``Recognizer`` at any stage (dense, warm-up or compact), or an ``Ensemble`` of such.
        path: the file; its directory must exist.
        dtype: of the weights in the file: ``float32`` keeps every bit, ``float16`` rounds to half of the size, with a
            relative error of at most 2^-11 for each weight. What is loaded computes in float32 again.
        coding: of the patterns. None: the smallest, which for masks that ``sparsify`` drew is their ``seed``. They are then
            drawn again by :func:`load`, and checked against their digest. ``bitmask`` and ``index`` hold the masks themselves,
            and need neither this package's methods nor numpy's random numbers to be read.
        **meta: anything that JSON can hold: label names, metrics, protocol ...; :func:`read_metadata` gives
            it back.

    Example:
        >>> from sparse_stgcn import compact, create_model, sparsify
        >>> model = compact(sparsify(create_model("stgcn", num_classes=2), 0.95))
        >>> save(model, "model.safetensors", dtype="float16", label_names=["drink", "eat"]) < 500_000
        True
        >>> read_metadata("model.safetensors")["meta"]
        {'label_names': ['drink', 'eat']}
        >>> load("model.safetensors").num_classes
        2

    Raises:
        TypeError: the model is neither.
        ValueError: ``dtype`` or ``coding`` is unknown or does not fit the model: a weight too large for float16, or patterns
            that no seed gives.
        OSError: the directory is missing or full; ``path`` is then as it was.
    """
    if not isinstance(model, (Recognizer, Ensemble)):
        raise TypeError(f"Expected model to be a Recognizer or an Ensemble. Got {type(model).__name__}; save the network that "
                        "optimize made it from.")
    if not all(member.config for member in getattr(model, "members", [model])):
        raise ValueError("Expected a network that can be built again from its config. Got a Recognizer without one; use "
                         "create_model.")
    tensors, description = pack(model, dtype, coding)
    return write_tensors(path, tensors, {**description, "meta": meta})


def size(model: nn.Module, coding: Coding | None = None, **meta: Any) -> int:
    """Size in bytes of the file that :func:`save` would write."""
    tensors, description = pack(model, coding=coding)
    return len(serialised(tensors, {**description, "meta": meta}))


def load(path: str | Path, device: str | torch.device = "cpu") -> Any:
    """The ``Recognizer`` or ``Ensemble`` of a file written by :func:`save`: same stage, same outputs, in evaluation mode.

    Raises:
        ValueError: not such a file, or one whose contents do not fit together.
        OSError: the file cannot be read.
    """
    if Path(path).is_dir():
        raise ValueError(f"Expected path to be a file. Got the directory {path}; name model.safetensors or another file in it.")
    tensors, description = read_tensors(path)
    try:
        model = rebuild(tensors, description)
    except DAMAGED as error:
        raise ValueError(f"Expected {path} to be a complete checkpoint. Got: {error}.") from error
    return model.to(device).eval()


def dense_bytes(model: nn.Module) -> int:
    """Bytes of parameters and buffers of the same network with dense float32 weights, without a header."""
    dense = {name: pattern.size for name, _, pattern in _sparse_layers(model)}
    return sum(_stored(t).nbytes for k, t in model.state_dict().items() if _layer_of(k) not in dense) \
        + 4 * sum(dense.values())


def pack(model: nn.Module, dtype: Dtype = "float32", coding: Coding | None = None) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """(tensors, description) of a network or an ensemble, laid out as the module says; tensors are copies on the CPU."""
    if dtype not in ("float32", "float16"):
        raise ValueError(f"Expected dtype to be float32 or float16. Got {dtype!r}.")
    if isinstance(model, Ensemble):
        return _pack_members(list(model.members), dtype, coding)
    layers = _sparse_layers(model)
    compact = {name for name, conv, _ in layers if conv.stage == "compact"}
    tensors = {k: _stored(t) for k, t in model.state_dict().items() if _layer_of(k) not in compact}
    batches = _take_counters(tensors)
    same_as = _drop_repeated(tensors, [name for name, _ in model.named_buffers()])
    groups: dict[tuple[Any, ...], list[str]] = {}
    for name, conv, pattern in layers:
        groups.setdefault((pattern.block, conv.stage), []).append(name)
    coded: dict[str, Any] = {}
    if layers:
        patterns = {name: pattern for name, _, pattern in layers}
        own, coded = encode(patterns, _layers(model, {name: p.block for name, p in patterns.items()}),
                            getattr(model, "mask_recipe", None), coding)
        values = [pattern.scatter(conv.values.detach().cpu())[pattern.mask()]
                  for _, conv, pattern in layers if conv.stage == "compact"]
        tensors |= own | {VALUES: _stored(torch.cat(values)) if values else torch.zeros(0)}
    from . import __version__

    return {name: _rounded(name, t) if dtype == "float16" else t for name, t in tensors.items()}, {
        "format": FORMAT, "version": __version__, "model": model.config, "dtype": dtype,
        "sparse": [{"block": key[0], "stage": key[1], "layers": names} for key, names in groups.items()],
        **coded, "pattern": _digest([pattern for _, _, pattern in layers]), "batches": batches, "same_as": same_as}


def rebuild(tensors: Mapping[str, Tensor], description: Mapping[str, Any]) -> Recognizer | Ensemble:
    """The network or the ensemble that :func:`pack` gave; raises like :func:`unpack`."""
    if "members" not in description:
        model = Recognizer.from_config(description["model"])
        unpack(model, tensors, description)
        return model
    tensors = {**tensors, **{name: tensors[source] for name, source in description["same_as"].items()}}
    models: list[Recognizer] = []
    for index, member in enumerate(description["members"]):
        prefix = f"members.{index}."
        own = {k.removeprefix(prefix): v for k, v in tensors.items() if k.startswith(prefix)}
        model = Recognizer.from_config(member["model"])
        if (source := member.get("values_of")) is not None:
            if source not in range(index):
                raise ValueError(f"Expected values_of of member {index} to be an earlier one. Got {source!r}.")
            convs = maskable_convs(models[source])
            patterns = _read_patterns(model, own, member)
            own[VALUES] = torch.cat([convs[name].weight_oik().detach()[p.mask()] for name, p in patterns.items()])
        unpack(model, own, member)
        models.append(model)
    return Ensemble(models)


def _pack_members(models: Sequence[nn.Module], dtype: Dtype, coding: Coding | None) -> tuple[dict[str, Tensor], dict[str, Any]]:
    tensors: dict[str, Tensor] = {}
    members: list[dict[str, Any]] = []
    repeatable: list[str] = []
    for index, model in enumerate(models):
        own, description = pack(model, dtype, coding)
        source = next((i for i in range(index) if _holds_values_of(models[i], model)), None)
        if source is not None:
            del own[VALUES]
            description["values_of"] = source
        tensors |= {f"members.{index}.{name}": tensor for name, tensor in own.items()}
        repeatable += [f"members.{index}.{name}" for name in own if not name.startswith("sparse.")]
        members.append(description)
    same_as = _drop_repeated(tensors, repeatable)
    return tensors, {"format": FORMAT, "version": members[0]["version"], "members": members, "same_as": same_as}


def _holds_values_of(outer: nn.Module, inner: nn.Module) -> bool:
    """Whether each kept weight of the compact network ``inner`` is one of the compact ``outer``, with the same value."""
    holders, held = maskable_convs(outer), maskable_convs(inner)
    if {conv.stage for conv in (*holders.values(), *held.values())} != {"compact"} or holders.keys() != held.keys():
        return False
    for name, conv in held.items():
        holder, live = holders[name], conv.pattern.mask()
        if holder.shape_oik != conv.shape_oik or bool((live & ~holder.pattern.mask().to(live.device)).any()):
            return False
        if not torch.equal(holder.weight_oik().to(live.device)[live], conv.weight_oik()[live]):
            return False
    return True


def unpack(model: nn.Module, tensors: Mapping[str, Tensor], description: Mapping[str, Any]) -> None:
    """Fill a dense network with what :func:`pack` gave, which also brings each convolution to its stage.

    Raises:
        ValueError: a tensor is missing or does not fit, or a pattern is not the one that was packed.
    """
    rest = {name: t.float() if t.dtype == torch.float16 else t for name, t in tensors.items()}
    stages = {name: group["stage"] for group in description["sparse"] for name in group["layers"]}
    patterns = _read_patterns(model, rest, description)
    rest = {name: t for name, t in rest.items() if name not in (LIVE, GAPS)}
    values, convs = rest.pop(VALUES, torch.zeros(0)), maskable_convs(model)
    compact = [name for name in patterns if stages[name] == "compact"]
    expected = sum(patterns[name].num_live for name in compact)
    if tuple(values.shape) != (expected,):
        raise ValueError(f"Expected {VALUES} of shape ({expected},). Got {tuple(values.shape)}.")
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
    if "recipe" in description:
        model.mask_recipe = Recipe.of(description["recipe"])  # type: ignore[assignment]


def _sparse_layers(model: nn.Module) -> list[tuple[str, Any, BlockPattern]]:
    """(name, convolution, its pattern on the CPU) of the sparse convolutions, in the order of the network."""
    return [(name, conv, conv.pattern.to("cpu")) for name, conv in maskable_convs(model).items()
            if conv.pattern is not None]


def _layers(model: nn.Module, blocks: Mapping[str, tuple[int, int]]) -> list[Layer]:
    """The convolutions that have a block, in the order of the network."""
    return [replace(layer, block=blocks[layer.name]) for layer in mask_layers(model, weights=False) if layer.name in blocks]


def _read_patterns(model: nn.Module, tensors: Mapping[str, Tensor], description: Mapping[str, Any],
                   ) -> Mapping[str, BlockPattern]:
    """The pattern of every sparse convolution, in the order of the network."""
    blocks = {name: parse_block(group["block"]) for group in description["sparse"] for name in group["layers"]}
    patterns = decode(tensors, description, _layers(model, blocks)) if blocks else {}
    if set(patterns) != set(blocks) or _digest(list(patterns.values())) != description["pattern"]:
        if description.get("coding") == "seed":
            raise ValueError(f"Expected the recipe {description['recipe']} to give the masks that were saved, by their digest. "
                             f"Got others with numpy {np.__version__}; load the file with the numpy that wrote it and save it "
                             "with coding='index'.")
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


def _rounded(name: str, tensor: Tensor) -> Tensor:
    """In float16, what is float16 in such a file; vectors carry little of its size, and running variances much of its range."""
    if tensor.dtype != torch.float32 or (tensor.dim() < 2 and name != VALUES):
        return tensor
    half = tensor.half()
    if bool((half.isinf() & tensor.isfinite()).any()):
        raise ValueError(f"Expected weights of at most {torch.finfo(torch.float16).max:g} for dtype float16. Got "
                         f"{float(tensor.abs().max()):g} in {name}; use float32.")
    return half
