"""CTR-GCN's spatial unit as a sum of products of its inputs with single maps: what csrc/cpu/fused_inputs.inl runs."""
from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from .program import Entries

_ENTRY = 2  # what an entry of the convolution costs beside its bo multiply-adds


def _blocks(vector: Tensor, bo: int) -> np.ndarray:
    """(C) -> (block rows, bo), zeros behind the last channel."""
    padded = np.zeros(-(-len(vector) // bo) * bo)
    padded[:len(vector)] = vector.numpy()
    return padded.reshape(-1, bo)


@dataclass
class InputProducts:
    """sum over k of (sum over j of W3_k[c,j] x_j + b3_k[c]) (A_k + b4_k[c] + sum over r of W4_k[c,r] D_kr), multiplied out.

    Product p is input[p] (-1: frames of ones) times map graph[p]: A_k for k < K, ones for K, tanh map m for K + 1 + m. The
    entries of the convolution that adds products up are block row, product, weights; ``bias`` is what needs no product.
    """

    rows: int
    bo: int
    graph: np.ndarray
    input: np.ndarray
    row: np.ndarray
    product: np.ndarray
    weight: np.ndarray
    bias: Tensor

    @classmethod
    def of(cls, values: list[Entries], biases: list[Tensor], mixes: list[Entries], constants: list[Tensor], joints: int
           ) -> InputProducts:
        """From W3, b3, W4 and b4 of every subset; the offset of an entry of W4 is the number of its tanh map."""
        if len({part.bo for part in (*values, *mixes)}) > 1:
            values, mixes = [part.split() for part in values], [part.split() for part in mixes]
        bo, subsets = values[0].bo, len(values)
        rows, graphs, inputs, weights = [], [], [], []
        bias = np.zeros((-(-values[0].rows // bo), bo))

        def add(row: np.ndarray, graph: np.ndarray | int, input: np.ndarray, weight: np.ndarray) -> None:
            rows.append(row), inputs.append(input), weights.append(weight)
            graphs.append(np.broadcast_to(graph, row.shape))

        for k, (value, b3, mix, b4) in enumerate(zip(values, biases, mixes, constants, strict=True)):
            ones, constant = _blocks(b3, bo), _blocks(b4, bo)
            carrying = np.flatnonzero(ones.any(1))
            row = np.concatenate([np.concatenate(value.row), carrying])
            input = np.concatenate([np.concatenate(value.input), np.full(len(carrying), -1)])
            weight = np.concatenate([np.concatenate(value.weight).astype(np.float64), ones[carrying]])
            add(row, k, input, weight)
            bias += joints * ones * constant
            read = (input >= 0) & constant[row].any(1)
            add(row[read], subsets, input[read], (weight * constant[row])[read])
            by_row, mix_row = np.argsort(row, kind="stable"), np.concatenate(mix.row)
            count = np.bincount(row, minlength=len(bias))
            first = np.concatenate([[0], np.cumsum(count)])
            times = count[mix_row]  # every entry of W4 with every entry of W3 of its block row
            left = np.repeat(np.arange(len(mix_row)), times)
            start = np.repeat(np.cumsum(times) - times, times)
            right = by_row[first[mix_row[left]] + np.arange(len(left)) - start]
            add(row[right], subsets + 1 + np.concatenate(mix.offset)[left], input[right],
                weight[right] * np.concatenate(mix.weight)[left])
        row, graph, input, weight = (np.concatenate(part) for part in (rows, graphs, inputs, weights))
        width = int(input.max()) + 2
        key, product = np.unique(graph * width + input + 1, return_inverse=True)
        pair, entry = np.unique(row * len(key) + product.reshape(-1), return_inverse=True)
        total = np.zeros((len(pair), bo))
        np.add.at(total, entry.reshape(-1), weight)
        return cls(values[0].rows, bo, (key // width).astype(np.int32), (key % width - 1).astype(np.int32), pair // len(key),
                   pair % len(key), total, torch.from_numpy(bias.reshape(-1)))

    def cheaper_than(self, products: int, values: list[Entries], joints: int) -> bool:
        """Whether less is computed than by ``products`` products and the convolution ``values``."""
        def convolution(entries: int, bo: int) -> int:
            return entries * (bo + _ENTRY)

        mine = int((self.input >= 0).sum()) * joints + convolution(len(self.row), self.bo)
        return mine < products * joints + sum(convolution(len(value.row[0]), value.bo) for value in values)

    def entries(self, ld: int) -> Entries:
        """The convolution over rows of products, ``ld`` floats from one to the next."""
        made = Entries(self.rows, self.bo)
        made.row, made.weight = [self.row], [self.weight]
        return made.place(self.product * ld)
