"""The program of an AA-GCN: graphs from the embeddings of each person, their product with live inputs, attention."""
from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from .program import AA_APPLY, AA_GRAPH, ATTEND, Entries, fold, row_length
from .stgcn import STGCNProgram

_TILE = 16  # frames at a time: of any number of joints, whole cache lines


class AAGCNProgram(STGCNProgram):
    """Compiles an AA-GCN: the spatial unit is its own, the temporal one that of ST-GCN."""

    def inputs(self, unit: nn.Module) -> int:
        return unit.conv_d[0].in_channels

    def spatial(self, unit: nn.Module, source: dict[str, Any], targets: list[dict[str, Any]]) -> None:
        joints, subsets = self.joints, len(unit.conv_d)
        maps = self.arena.take(subsets * joints * -(-joints // 16) * 16)
        base = self.arena.size
        embed = self._embeddings(unit, source)
        coef = torch.cat([unit.A.reshape(-1), unit.alpha.reshape(-1), torch.zeros(16)]).numpy()
        scratch_ld = row_length(_TILE * joints)
        scratch = self.arena.take((embed["rows"] // subsets + 1) * scratch_ld)
        self.steps.append({"kind": AA_GRAPH, **source, **embed, "subsets": subsets, "hidden": unit.embedded, "maps": maps,
                           "coef": coef, "tile": _TILE, "scratch": scratch, "scratch_ld": scratch_ld})
        self.peak = max(self.peak, self.arena.size)
        self.arena.size = base  # embeddings are no longer needed
        step = self._apply(unit)
        scratch = self.arena.take(len(step["made_input"]) * step["scratch_ld"])
        step |= {"maps": maps, "scratch": scratch}
        identity = isinstance(unit.down, nn.Identity)
        self.steps += [{**step, **target, **({"residual": target["src"], "residual_ld": target["src_ld"]} if identity else {})}
                       for target in targets]
        self.peak = max(self.peak, self.arena.size)
        self.arena.size = base

    def between(self, unit: nn.Module, hidden: dict[str, Any]) -> None:
        if not unit.attention:
            return
        rows, joints = hidden["rows"], self.joints
        taps, reach = unit.conv_sa.kernel_size[0], unit.conv_ta.kernel_size[0]
        narrow = unit.fc1c.out_features
        weight = [unit.conv_sa.weight[0], unit.conv_ta.weight[0], _padded(unit.fc1c.weight.t()), _padded(unit.fc2c.weight.t())]
        bias = [unit.conv_sa.bias, unit.conv_ta.bias, _padded(unit.fc1c.bias), _padded(unit.fc2c.bias)]
        front = -(-max(joints, reach) // 32) * 16
        ld = -(-max(max(hidden["frames"], joints) + 2 * front + 16, rows + 16) // 16) * 16
        planes = hidden["planes"]
        scratch = self.arena.take((rows + 4) * ld + planes * (-(-hidden["frames"] // planes) * joints + 16))
        self.steps.append({"kind": ATTEND, **hidden, "hidden": narrow, "subsets": taps, "tile": reach, "scratch": scratch,
                           "scratch_ld": ld, "weight": torch.cat([w.reshape(-1) for w in weight]).numpy(),
                           "bias": torch.cat([b.reshape(-1) for b in bias]).numpy()})

    def _embeddings(self, unit: nn.Module, source: dict[str, Any]) -> dict[str, Any]:
        """Rows of conv_a and conv_b, subset by subset, of X at ``source``."""
        convs = [conv for pair in zip(unit.conv_a, unit.conv_b, strict=True) for conv in pair]
        parts = [Entries.of(conv, torch.ones(conv.out_channels)) for conv in convs]
        entries = Entries.stack([part.place(source["src"] + part.input[0] * source["src_ld"]) for part in parts])
        bias = torch.zeros(len(convs), entries.rows // len(convs))
        for row, conv in zip(bias, convs, strict=True):
            if conv.bias is not None:
                row[:conv.out_channels] = conv.bias
        return {**entries.step(), "bias": bias.reshape(-1).numpy()}

    def _apply(self, unit: nn.Module) -> dict[str, Any]:
        """relu(BN(sum_k conv_d_k(X G_k)) + down(X)), but for where it reads and writes."""
        gain, shift = fold(unit.bn)
        parts = [(conv, gain) for conv in unit.conv_d]
        bias = shift
        if not isinstance(unit.down, nn.Identity):
            down_gain, down_shift = fold(unit.down[1])
            parts.append((unit.down[0], down_gain))
            bias = bias + down_shift
        lists, keys = [], []
        for subset, (conv, scale) in enumerate(parts):
            lists.append(Entries.of(conv, scale))
            keys.append(subset * conv.in_channels + np.concatenate(lists[-1].input))
            if conv.bias is not None:
                bias = bias + scale * conv.bias
        made, row = np.unique(np.concatenate(keys), return_inverse=True)
        scratch_ld = row_length(_TILE * self.joints)
        offsets = np.split(row.reshape(-1) * scratch_ld, np.cumsum([len(key) for key in keys])[:-1])
        entries = lists[0].place(offsets[0])
        for part, offset in zip(lists[1:], offsets[1:], strict=True):
            entries = entries + part.place(offset)
        inputs = parts[0][0].in_channels
        return {"kind": AA_APPLY, **entries.step(), "bias": bias.numpy(), "subsets": len(unit.conv_d), "tile": _TILE,
                "scratch_ld": scratch_ld, "made_input": (made % inputs).astype(np.int32),
                "made_subset": (made // inputs).astype(np.int32)}


def _padded(tensor: Tensor) -> Tensor:
    """Zeros behind the last dimension up to a multiple of 16."""
    return torch.nn.functional.pad(tensor, (0, -tensor.shape[-1] % 16))
