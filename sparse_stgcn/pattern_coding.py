"""How the patterns of a network lie in a file: as the recipe they were drawn with, as bits, or as gaps between live blocks.

All describe ``pattern.blocks()`` (G, H, K) of every sparse convolution, in row-major order and the order of the network:

    seed      no tensor: the arguments of ``sparsify``, from which the same blocks are drawn again.
    bitmask   ``sparse.live``, uint8: one bit a block, eight to a byte, the first block in the highest bit; every convolution
              begins a new byte.
    index     ``sparse.gaps``, uint8: for each live block the dead ones since the one before it, over all convolutions
              joined; 255 stands for 255 dead blocks, with more of the same gap to follow.

With n blocks of which a share d lives they take 0, n / 8 and about n d bytes. The digest of the patterns is kept beside them
whatever the coding, and compared when they are read.
"""
from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from . import masks
from .kernels import BlockPattern

__all__ = ["CODINGS", "GAPS", "LIVE", "Recipe", "decode", "encode"]

CODINGS = ("seed", "bitmask", "index")
LIVE, GAPS = "sparse.live", "sparse.gaps"
ESCAPE = 255  # the byte of a gap that goes on in the next one

Patterns = Mapping[str, BlockPattern]


@dataclass(frozen=True)
class Recipe:
    """The arguments of ``masks.draw`` from which a mask follows on any machine, whatever the weights are."""

    sparsity: float
    block: tuple[int, int]
    method: str = "random"
    density: str = "uniform"
    scope: str = "layer"
    seed: int = 0
    coordinates: bool = True

    @classmethod
    def of(cls, fields: Mapping[str, Any]) -> Recipe:
        """From the metadata of a file. Raises TypeError where ``fields`` are not those of a recipe.

        A file that says nothing of coordinates is from before masks took care of them.
        """
        return cls(**{"coordinates": False, **fields, "block": tuple(fields["block"])})

    def draw(self, layers: Sequence[masks.Layer]) -> dict[str, BlockPattern]:
        """The patterns of ``layers``.

        Raises:
            ValueError: the method needs more than a seed, or an argument is out of range.
        """
        if not masks.is_seeded(self.method):
            raise ValueError(f"Expected a recipe with a method that needs a seed alone. Got {self.method!r}.")
        return masks.draw(layers, self.sparsity, self.method, self.density, self.scope, self.seed, coordinates=self.coordinates)


def encode(patterns: Patterns, layers: Sequence[masks.Layer], recipe: Recipe | None, coding: str | None = None,
           ) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The tensors of a file and the entries of its metadata that hold ``patterns``.

    Args:
        patterns: of the sparse convolutions, in the order of the network.
        layers: of the same convolutions, without weights: what ``recipe`` is tried on.
        recipe: what the patterns were drawn with, if that is known. It is used only where it gives them again.
        coding: one of ``CODINGS``. None: the smallest.

    Raises:
        ValueError: ``coding`` is unknown, or ``seed`` and the recipe does not give these patterns.
    """
    if coding is not None and coding not in CODINGS:
        raise ValueError(f"Expected coding to be one of {', '.join(CODINGS)}, or None for the smallest. Got {coding!r}.")
    if coding in (None, "seed"):
        if recipe is not None and _equal(recipe.draw(layers), patterns):
            return {}, {"coding": "seed", "recipe": asdict(recipe)}
        if coding == "seed":
            raise ValueError("Expected patterns that sparsify drew from a seed, for coding 'seed'. Got others; leave it out.")
    live = [pattern.blocks().numpy() for pattern in patterns.values()]
    coded = {"bitmask": np.concatenate([np.packbits(blocks) for blocks in live]),
             "index": _gaps(np.concatenate([blocks.ravel() for blocks in live]))}
    chosen = coding or min(coded, key=lambda name: coded[name].nbytes)
    return {LIVE if chosen == "bitmask" else GAPS: torch.from_numpy(coded[chosen])}, {"coding": chosen}


def decode(tensors: Mapping[str, Tensor], description: Mapping[str, Any], layers: Sequence[masks.Layer]) -> Patterns:
    """The inverse of :func:`encode`: the pattern of each of ``layers``.

    Raises:
        ValueError: the tensors do not fit the layers, or the coding is unknown.
    """
    coding = description.get("coding", "bitmask")  # format 1 had this one only
    if coding == "seed":
        return Recipe.of(description["recipe"]).draw(layers)
    if coding not in CODINGS:
        raise ValueError(f"Expected a coding of the patterns among {', '.join(CODINGS)}. Got {coding!r}; update sparse_stgcn.")
    sizes = [layer.num_blocks for layer in layers]
    code = tensors[LIVE if coding == "bitmask" else GAPS].numpy() if layers else np.zeros(0, np.uint8)
    bits = _unpacked(code, sizes) if coding == "bitmask" else np.split(_positions(code, sum(sizes)), np.cumsum(sizes)[:-1])
    return {layer.name: BlockPattern.from_blocks(torch.from_numpy(live.reshape(layer.grid)), layer.shape, layer.block)
            for layer, live in zip(layers, bits, strict=True)}


def _equal(first: Patterns, second: Patterns) -> bool:
    return first.keys() == second.keys() and all(first[name].digest() == second[name].digest() for name in first)


def _gaps(live: NDArray[np.bool_]) -> NDArray[np.uint8]:
    """The code ``index`` of a row of blocks."""
    gaps = np.diff(np.flatnonzero(live), prepend=-1) - 1
    code = np.full(int((gaps // ESCAPE + 1).sum()), ESCAPE, np.uint8)
    code[np.cumsum(gaps // ESCAPE + 1) - 1] = gaps % ESCAPE
    return code


def _positions(code: NDArray[np.uint8], total: int) -> NDArray[np.bool_]:
    """The row of ``total`` blocks that ``code`` stands for."""
    ends = np.flatnonzero(code != ESCAPE)
    at = np.cumsum(code, dtype=np.int64)[ends] + np.arange(len(ends))
    if len(code) and (code[-1] == ESCAPE or at[-1] >= total):
        raise ValueError(f"Expected {GAPS} to end within the {total} blocks of this network. Got more; the file is damaged.")
    live = np.zeros(total, dtype=bool)
    live[at] = True
    return live


def _unpacked(code: NDArray[np.uint8], sizes: Sequence[int]) -> list[NDArray[np.bool_]]:
    """The blocks of every convolution from the code ``bitmask``."""
    bytes_each = [-(-size // 8) for size in sizes]
    if len(code) != sum(bytes_each):
        raise ValueError(f"Expected {LIVE} of {sum(bytes_each)} bytes for this network. Got {len(code)}; the file is damaged.")
    parts = np.split(code, np.cumsum(bytes_each)[:-1])
    return [np.unpackbits(part, count=size).astype(bool) for part, size in zip(parts, sizes, strict=True)]
