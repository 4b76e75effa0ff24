"""What the mask of a network keeps: the density of every layer, and where its live blocks lie."""
from __future__ import annotations

import math
from fnmatch import fnmatchcase
from typing import TYPE_CHECKING

import numpy as np
from torch import nn

from ..layers import SparseConv2d
from ..sparsity import groups_of, maskable_convs, stage, summary
from .style import COLOURS, GREY, MARKERS, canvas, styled

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["densities", "maps"]

KINDS = ("graph convolution", "temporal convolution", "1x1 convolution")
TAPS = {"graph convolution": "subsets", "temporal convolution": "taps"}  # what the third axis of a weight runs over


@styled
def densities(model: nn.Module, title: str = "") -> Figure:
    """Kept weights of every layer, in percent of the layer, in the order of the network; the area of a mark grows with the
    layer's weights. The dashed line is the whole network.

    Args:
        model: a network in any stage; a dense one keeps all.
    """
    figure, axes = canvas(title, size=(7, 3.4))
    kept, kinds = summary(model), np.array([kind(conv) for conv in maskable_convs(model).values()])
    layers = kept.layers
    place, blocks = np.arange(len(layers)), groups_of([layer.name for layer in layers])
    total = np.array([layer.total for layer in layers])
    percent = np.array([100 * layer.kept / layer.total for layer in layers])
    for name, colour, marker in zip(KINDS, COLOURS, MARKERS, strict=False):
        mine = kinds == name
        if mine.any():
            axes.scatter(place[mine], percent[mine], 15 + 120 * total[mine] / total.max(), color=colour, marker=marker,
                         alpha=0.8, label=name)
    axes.axhline(100 * kept.kept_fraction, color=GREY, linestyle="--", label=f"all together, {kept.kept_fraction:.2%}")
    starts = [i for i in range(len(layers)) if i == 0 or blocks[i] != blocks[i - 1]]
    middles = [(a + b - 1) / 2 for a, b in zip(starts, [*starts[1:], len(layers)], strict=True)]
    for start in starts[1:]:
        axes.axvline(start - 0.5, color=GREY, linewidth=0.4)
    axes.set_xticks(middles, [str(blocks[start] + 1) for start in starts])
    axes.tick_params(axis="x", length=0)
    axes.set_ylim(0, 1.15 * percent.max())
    axes.set_xlabel("network block")
    axes.set_ylabel("kept weights (% of the layer)")
    axes.legend(fontsize="small", loc="lower left")
    return figure


@styled
def maps(model: nn.Module, layers: str = "*", limit: int = 24, title: str = "") -> Figure:
    """Where the live weights of the layers lie: inputs to the right, outputs downwards, the darker the more taps live.

    Of more than ``limit`` layers those with the most weights are shown, in the order of the network.

    Args:
        model: a sparse network.
        layers: names of the layers, with * and ?.

    Raises:
        ValueError: no sparse layer has such a name, or ``limit`` < 1.
    """
    if limit < 1:
        raise ValueError(f"Expected limit >= 1. Got {limit}.")
    convs = maskable_convs(model)
    sparse = {name: conv for name, conv in convs.items() if conv.pattern is not None and fnmatchcase(name, layers)}
    if not sparse:
        raise ValueError(f"Expected layers to match sparse layers, such as {', '.join(list(convs)[:3])}. Got {layers!r} in "
                         f"{'a dense' if stage(model) == 'dense' else 'this'} network.")
    largest = sorted(sparse, key=lambda name: -sparse[name].pattern.size)[:limit]
    chosen = {name: conv for name, conv in sparse.items() if name in largest}
    columns = min(4, len(chosen))
    rows = math.ceil(len(chosen) / columns)
    if len(chosen) < len(sparse):
        title = title or f"the {len(chosen)} largest of {len(sparse)} layers"
    figure, grid = canvas(title, rows, columns, (2.1, 2.3))
    all_axes = np.ravel(grid)
    for axes, (name, conv) in zip(all_axes, chosen.items(), strict=False):
        pattern = conv.pattern
        outputs, inputs, taps = pattern.shape
        live = pattern.mask().sum(2).cpu().numpy()
        most = max(int(live.max()), 1)
        axes.imshow(live, cmap="Greys", vmin=0, vmax=most, aspect="auto", extent=(0, inputs, outputs, 0))
        depth = f", 0 to {most} of {taps} {TAPS[kind(conv)]}" if taps > 1 else ""
        axes.set_title(f"{name.removeprefix('backbone.')}\n{100 * pattern.density:.1f} % live{depth}", fontsize=7)
        axes.set_xticks([0, inputs])
        axes.set_yticks([0, outputs])
        axes.tick_params(labelsize=6)
    for axes in all_axes[len(chosen):]:
        axes.set_axis_off()
    figure.supxlabel("input channel", fontsize=8)
    figure.supylabel("output channel", fontsize=8)
    return figure


def kind(conv: SparseConv2d) -> str:
    """One of ``KINDS``."""
    return KINDS[0] if conv.subsets > 1 else KINDS[1] if conv.kernel_size > 1 else KINDS[2]
