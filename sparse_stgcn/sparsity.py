"""Make a model sparse, drop its dead weights, and the way back."""
from __future__ import annotations

import re
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import count

import numpy as np
from torch import Tensor, nn

from . import masks
from .layers import SparseConv2d
from .pattern_coding import Recipe

__all__ = [
    "LayerSummary",
    "Summary",
    "block_of",
    "compact",
    "compact_parameters",
    "densify",
    "groups_of",
    "mask_layers",
    "maskable_convs",
    "masked",
    "parse_block",
    "sparsify",
    "stage",
    "summary",
]

_BLOCK = re.compile(r"(?:^|\.)(?:gcn|net)\.(\d+)\.")


def maskable_convs(model: nn.Module) -> dict[str, SparseConv2d]:
    """Every convolution that the mask covers, by its full name, in the order of the network.

    Covered: spatial and temporal convolutions, graph-embedding convolutions, multi-branch 1 x 1 and residuals
    (PYSKL's ``nn.Conv2d``). Not covered: batch norm, graph parameters, attention, the classifier.
    """
    return {name: module for name, module in model.named_modules() if isinstance(module, SparseConv2d)}


def block_of(name: str) -> int:
    """Index 0 to 9 of the network block that a name such as ``backbone.gcn.3.tcn.conv`` is in.

    The blocks are the groups of the group lasso (the paper's layers).

    Raises:
        ValueError: the name is not inside a block.
    """
    found = _BLOCK.search(name)
    if not found:
        raise ValueError(
            f"Expected name to be inside a network block, as backbone.gcn.0.tcn.conv is. Got {name!r}."
        )
    return int(found.group(1))


def groups_of(names: Sequence[str]) -> list[int]:
    """The network block of each name, see ``block_of``; what is in none (a network of one's own) is a group by itself."""
    found = [_BLOCK.search(name) for name in names]
    blocks = [None if match is None else int(match.group(1)) for match in found]
    free = count(1 + max((block for block in blocks if block is not None), default=-1))
    return [next(free) if block is None else block for block in blocks]


def parse_block(block: str | tuple[int, int]) -> tuple[int, int]:
    """(bo, bi) from a pair or from text such as ``8x1``."""
    try:
        parts = tuple(block.lower().split("x")) if isinstance(block, str) else tuple(block)
        sizes = tuple(int(part) for part in parts)
    except (TypeError, ValueError):
        parts = sizes = ()
    if len(sizes) != 2 or min(sizes) < 1 or (not isinstance(block, str) and sizes != parts):
        raise ValueError(f"Expected block to be two positive sizes, outputs x inputs, such as 8x1 or (8, 1). "
                         f"Got {block!r}.")
    return sizes[0], sizes[1]


def stage(model: nn.Module) -> str:
    """"dense", "warmup" (patterns attached, weights dense) or "compact" (live blocks only)."""
    stages = {conv.stage for conv in maskable_convs(model).values()}
    return next((name for name in ("compact", "warmup") if name in stages), "dense")


def sparsify(model: nn.Module, sparsity: float, block: tuple[int, int] | str = (8, 1), method: str = "random",
             density: masks.Density = "uniform", scope: str = "layer", seed: int = 0, file: str | None = None) -> nn.Module:
    """Attach a fixed pattern to every maskable convolution; weights stay dense (warm-up stage).

    Args:
        model: a model in stage ``dense``: one of ``create_model``, or any other with ``layers.SparseConv2d`` in it.
        sparsity: fraction of the maskable weights that are masked, 0 <= sparsity < 1.
        block: (bo, bi), outputs x inputs of a block at one tap; (1, 1) is unstructured. A block taller or
            wider than every layer is an error; in a layer thinner than the block, blocks are ragged.
        method, density, scope, seed, file: see ``masks.draw``.

    Returns:
        The model itself.

    Example:
        >>> from sparse_stgcn import create_model
        >>> model = sparsify(create_model("stgcn", num_classes=60), 0.95, block=(8, 1), seed=0)
        >>> print(summary(compact(model)))
        152,608 of 3,052,096 maskable weights kept (5.00%), 199,344 of 3,098,832 parameters (6.43%)

    Raises:
        ValueError: an argument is out of range, or the model has patterns already, or nothing that a mask can cover.
    """
    if stage(model) != "dense":
        raise ValueError(
            f"Expected model to have no patterns yet. Got one in stage {stage(model)!r}; build a new "
            "model, or call densify(model, forget=True) first."
        )
    convs, layers = maskable_convs(model), mask_layers(model, block)
    if not convs:
        raise ValueError("Expected model to have convolutions that a mask can cover, layers.SparseConv2d. Got none.")
    patterns = masks.draw(layers, sparsity, method, density, scope, seed, file)
    for name, conv in convs.items():
        conv.attach(patterns[name])
    if masks.is_seeded(method) and isinstance(density, str):
        model.mask_recipe = Recipe(float(sparsity), layers[0].block, method, density, scope,  # type: ignore[assignment]
                                   int(seed)) if layers else None
    kept, total = sum(p.num_live for p in patterns.values()), sum(p.size for p in patterns.values())
    prescribed = method == "predefined" or not isinstance(density, str)
    if total and kept > 1.1 * (1 - sparsity) * total and not prescribed:
        bo, bi = layers[0].block
        warnings.warn(
            f"block {bo}x{bi} keeps {kept / total:.2%} of the weights, not {1 - sparsity:.2%}: "
            "every block row keeps at least one block. Use a smaller block for this sparsity.",
            stacklevel=2,
        )
    return model


def mask_layers(model: nn.Module, block: tuple[int, int] | str = (8, 1), weights: bool = True) -> list[masks.Layer]:
    """The maskable weights of ``model`` as the methods of ``masks`` see them, in the order of the network.

    Without ``weights`` their sizes alone, which is enough for methods that need a seed only.
    """
    size, convs = parse_block(block), maskable_convs(model)
    return [masks.Layer(name, conv.shape_oik, size, group, _array(conv) if weights else None,
                        conv.in_channels * conv.kernel_size)
            for (name, conv), group in zip(convs.items(), groups_of(list(convs)), strict=True)]


def compact(model: nn.Module) -> nn.Module:
    """Drop the dead weights: every convolution with a pattern keeps ``values``, its live blocks, alone.

    Parameters are replaced, so an optimiser has to be told: see ``compact_parameters``.

    Returns:
        The model itself; unchanged where it is compact already.

    Raises:
        ValueError: the model has no patterns.
    """
    compact_parameters(model)
    return model


def compact_parameters(
    model: nn.Module,
) -> dict[nn.Parameter, tuple[nn.Parameter, Callable[[Tensor], Tensor]]]:
    """Like ``compact``, and say what became of the parameters.

    Returns:
        For each weight that was dropped, the ``values`` that replace it and a function that takes a tensor of
        the weight's shape (its momentum, say) to the shape of ``values``.
    """
    if stage(model) == "dense":
        raise ValueError("Expected model to have patterns. Got a dense model; call sparsify first.")
    replaced = {}
    for conv in maskable_convs(model).values():
        if conv.stage == "warmup":
            old, new, gather = conv.compact()
            replaced[old] = (new, gather)
    return replaced


def densify(model: nn.Module, forget: bool = False) -> nn.Module:
    """Dense weights with zeros where no block lives; the way back from ``compact``.

    Args:
        forget: also drop the patterns, which makes it an ordinary dense model. They stay by default, so that
            ``compact`` can follow again.

    Returns:
        The model itself.
    """
    for conv in maskable_convs(model).values():
        conv.densify()
        if forget:
            conv.pattern = None
    return model


@contextmanager
def masked(model: nn.Module) -> Iterator[nn.Module]:
    """Inside this context a warm-up model computes as if its masked weights were 0 already."""
    convs = list(maskable_convs(model).values())
    before = [conv.masked for conv in convs]
    try:
        for conv in convs:
            conv.masked = True
        yield model
    finally:
        for conv, value in zip(convs, before, strict=True):
            conv.masked = value


@dataclass(frozen=True)
class LayerSummary:
    """Weights of one maskable convolution, all and kept."""

    name: str
    shape: tuple[int, int, int]
    total: int
    kept: int


@dataclass(frozen=True)
class Summary:
    """Counts of a model as if it were dense (``maskable``, ``parameters``) and of what its patterns keep."""

    layers: tuple[LayerSummary, ...]
    maskable: int
    kept: int
    parameters: int

    @property
    def kept_parameters(self) -> int:
        """Kept maskable weights and everything that cannot be masked."""
        return self.parameters - self.maskable + self.kept

    @property
    def kept_fraction(self) -> float:
        """Of the maskable weights."""
        return self.kept / self.maskable if self.maskable else 1.0

    @property
    def kept_parameters_fraction(self) -> float:
        """Of all parameters."""
        return self.kept_parameters / self.parameters

    def __str__(self) -> str:
        return (
            f"{self.kept:,} of {self.maskable:,} maskable weights kept ({self.kept_fraction:.2%}), "
            f"{self.kept_parameters:,} of {self.parameters:,} parameters "
            f"({self.kept_parameters_fraction:.2%})"
        )


def summary(model: nn.Module) -> Summary:
    """What was really kept, in any stage; entries beyond ragged edges do not count."""
    convs = maskable_convs(model)
    layers = tuple(
        LayerSummary(name, conv.shape_oik, total, total if conv.pattern is None else conv.pattern.num_live)
        for name, conv in convs.items()
        for total in [conv.shape_oik[0] * conv.shape_oik[1] * conv.shape_oik[2]])
    own = {id(conv.weight if conv.values is None else conv.values) for conv in convs.values()}
    rest = sum(parameter.numel() for parameter in model.parameters() if id(parameter) not in own)
    maskable = sum(layer.total for layer in layers)
    return Summary(layers, maskable, sum(layer.kept for layer in layers), rest + maskable)


def _array(conv: SparseConv2d) -> np.ndarray:
    return conv.weight_oik().detach().cpu().numpy()
