"""Masks from a file: a checkpoint of this package, the work directory of a run, or an .npz of bool arrays."""
from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from .plan import Layer

__all__ = ["read"]


def read(path: str | Path, layers: Sequence[Layer]) -> list[np.ndarray]:
    """The live blocks (G, H, K) of every layer.

    A checkpoint (``.safetensors``, or a work directory that holds ``model.safetensors``) gives the patterns of its
    network. An ``.npz`` has one bool array per layer, named like the layer: True for kept weights (O, I, K) or for live
    blocks (G, H, K).

    Raises:
        ValueError: the file is neither, layers are missing or unknown, a mask is not bool or has another shape, or it
            cuts through a block.
        OSError: the file cannot be read.
    """
    source = Path(path)
    source = source / "model.safetensors" if source.is_dir() else source
    if not source.exists():
        raise FileNotFoundError(f"Expected file (--mask-file) to be a checkpoint, a work directory or an .npz of masks. Got "
                                f"{source}, which does not exist.")
    found = _arrays(source) if source.suffix == ".npz" else _patterns(source)
    names = [layer.name for layer in layers]
    missing, unknown = sorted(set(names) - set(found)), sorted(set(found) - set(names))
    if missing or unknown:
        raise ValueError(f"Expected {source} to have one mask for each of the {len(names)} maskable convolutions. Got "
                         f"{len(missing)} missing and {len(unknown)} unknown ({', '.join((missing + unknown)[:3])}...); "
                         "use the masks of the same network.")
    return [_blocks(found[layer.name], layer, source) for layer in layers]


def _arrays(path: Path) -> Mapping[str, np.ndarray]:
    from ..data.storage import read_npz

    try:
        return read_npz(path)
    except ValueError as error:
        raise ValueError(f"Expected {path} to be an .npz of bool masks. Got: {error}") from error


def _patterns(path: Path) -> Mapping[str, np.ndarray]:
    from ..checkpoint import load
    from ..sparsity import maskable_convs

    convs = maskable_convs(load(path))
    masks = {name: conv.pattern.mask().numpy() for name, conv in convs.items() if conv.pattern is not None}
    if not masks:
        raise ValueError(f"Expected {path} to be the checkpoint of a sparse network. Got a dense one.")
    return masks


def _blocks(mask: np.ndarray, layer: Layer, path: Path) -> np.ndarray:
    if mask.dtype != bool:
        raise ValueError(f"Expected the mask of {layer.name} in {path} to be bool. Got {mask.dtype}; save mask != 0.")
    if mask.shape == layer.grid:
        return mask
    if mask.shape != layer.shape:
        raise ValueError(f"Expected the mask of {layer.name} in {path} to have shape {layer.shape}, or {layer.grid} in "
                         f"blocks. Got {mask.shape}.")
    kept = layer.block_sums(mask.astype(np.int64))
    if ((kept > 0) & (kept < layer.block_sizes())).any():
        raise ValueError(f"Expected the mask of {layer.name} in {path} to be made of whole {layer.block[0]}x"
                         f"{layer.block[1]} blocks. Got one that cuts through a block; choose the block of the file, or "
                         "1x1.")
    return kept > 0
