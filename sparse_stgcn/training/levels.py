"""Levels: networks with masks inside each other that have their weights in common."""
from __future__ import annotations

import copy
import math
from collections.abc import Mapping, Sequence
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from ..kernels import BlockPattern
from ..recognizer import Ensemble, Head, Recognizer
from ..sparsity import maskable_convs

__all__ = ["Levels"]


class Levels(Ensemble):
    """Networks of nested masks M_L in ... in M_1 = M, one storage of weights: W_l = W * M_l.

    Member 0 is the widest and has W. Every other member is an ordinary compact network, which costs what its own mask
    costs; its ``values`` are copies of the widest's at the same places: :meth:`update` renews them after a step, and
    :meth:`collect` adds their gradient to that of W:

        dL/dW = sum over levels l of M_l * dL_l/dW_l.

    Batch norms, and with ``own_classifier`` the classifier, are each member's own, since the activations of a sparser
    network have other statistics (Yu and Huang 2019, section 3); all other parameters (graph, attention, biases) are the
    same objects in every member. As an ``Ensemble`` it gives the mean probability of all levels.

    Args:
        members: compact networks, the widest first, whose patterns lie in those of the first.
        own_classifier: every level has a classifier of its own.

    Raises:
        ValueError: a member is not compact, of another network, or its patterns do not lie in those of the first.
    """

    def __init__(self, members: Sequence[Recognizer], own_classifier: bool = True) -> None:
        super().__init__(members)
        self.own_classifier = own_classifier
        self._links = [self._tie(member) for member in members[1:]]
        self.update()

    @classmethod
    def of(cls, widest: Recognizer, patterns: Sequence[Mapping[str, BlockPattern]], own_classifier: bool = True) -> Levels:
        """The levels of a compact network: itself, and for each mapping (name of convolution -> pattern) a sparser one.

        Norms, and classifiers of their own, begin as those of ``widest``.
        """
        members = [widest]
        for level in patterns:
            member = copy.deepcopy(widest)
            for name, conv in _compact_convs(member).items():
                pattern = level[name].to(conv.values.device)
                conv.values, conv.pattern = nn.Parameter(conv.values.detach()[pattern.within(conv.pattern)]), pattern
            members.append(member)
        return cls(members, own_classifier)

    @classmethod
    def around(cls, inner: Sequence[Recognizer], patterns: Mapping[str, BlockPattern], own_classifier: bool = True,
               scale: float = 0.0) -> Levels:
        """Compact levels, the widest first, and a wider one in front of them.

        It has the values of ``inner[0]`` at the places of its blocks. The others are normal, from torch's random state, and
        have ``scale`` times the root mean square of those in their layer, or of fresh weights if it has none; with 0 it
        computes what ``inner[0]`` does.

        Args:
            patterns: name of convolution -> pattern of the new level.
        """
        member = copy.deepcopy(inner[0])
        for name, conv in _compact_convs(member).items():
            pattern = patterns[name].to(conv.values.device)
            held = conv.values.detach()
            drawn = torch.randn(pattern.num_blocks, *held.shape[1:])  # on the CPU: equal on every device
            drawn *= patterns[name].gather(torch.ones(pattern.shape))  # nothing beyond a ragged edge
            # Over the weights that exist; a layer that holds nothing yet begins as wide as ``SparseConv2d`` does.
            live = conv.pattern.num_live
            square = float(held.square().sum()) / live if live else 1 / (3 * math.prod(pattern.shape[1:]))
            values = scale * square ** 0.5 * drawn.to(held)
            values[conv.pattern.within(pattern)] = held
            conv.values, conv.pattern = nn.Parameter(values), pattern
        return cls([member, *inner], own_classifier)

    @property
    def widest(self) -> Recognizer:
        """The network that has all weights."""
        return self.members[0]  # type: ignore[return-value]

    def own_parameters(self) -> list[list[nn.Parameter]]:
        """What has to be optimised besides the parameters of the widest: each other member's norms and classifier."""
        elsewhere = {id(parameter) for parameter in self.widest.parameters()}
        elsewhere |= {id(values) for links in self._links for values, _, _ in links}
        return [[parameter for parameter in member.parameters() if id(parameter) not in elsewhere]
                for member in list(self.members)[1:]]

    def stored_parameters(self) -> int:
        """Number of parameters that exist once: those of the widest and :meth:`own_parameters`.

        Entries of ``values`` beyond a ragged edge do not count.
        """
        kept = {id(conv.values): conv.pattern.num_live for conv in maskable_convs(self.widest).values()
                if conv.pattern is not None}
        unique = [*self.widest.parameters(), *chain.from_iterable(self.own_parameters())]
        return sum(kept.get(id(parameter), parameter.numel()) for parameter in unique)

    @torch.no_grad()
    def update(self) -> None:
        """Give every member the values that the widest has now."""
        for links in self._links:
            for values, shared, position in links:
                values.copy_(shared[position])

    @torch.no_grad()
    def hold(self) -> None:
        """Give the widest the values of the level inside it, at their places: the reverse of :meth:`update`."""
        for values, shared, position in self._links[0]:
            shared[position] = values

    @torch.no_grad()
    def collect(self, index: int) -> None:
        """Move the gradient of the values of member ``index`` > 0 to the values that they are copies of."""
        for values, shared, position in self._links[index - 1]:
            if values.grad is None:
                continue
            if shared.grad is None:
                shared.grad = torch.zeros_like(shared)
            shared.grad.index_add_(0, position, values.grad)
            values.grad = None

    def _tie(self, member: Recognizer) -> list[tuple[nn.Parameter, nn.Parameter, Tensor]]:
        """Put the shared parameters into ``member``; (its values, the widest's, their positions there) of each layer."""
        shared, wide = dict(self.widest.named_parameters()), _compact_convs(self.widest)
        if shared.keys() != {name for name, _ in member.named_parameters()}:
            raise ValueError("Expected members of one architecture, all compact. Got parameters of other names.")
        links = []
        for name, conv in _compact_convs(member).items():
            outer = wide[name]
            links.append((conv.values, outer.values, conv.pattern.within(outer.pattern)))
        own = {id(parameter) for module in member.modules()
               if isinstance(module, _BatchNorm) or (self.own_classifier and isinstance(module, Head))
               for parameter in module.parameters()} | {id(values) for values, _, _ in links}
        for name, parameter in list(member.named_parameters()):
            if id(parameter) not in own:
                module, _, leaf = name.rpartition(".")
                setattr(member.get_submodule(module), leaf, shared[name])
        return links


def _compact_convs(network: nn.Module) -> dict[str, Any]:
    """The maskable convolutions of a network, all of which have ``values`` and a pattern."""
    convs = maskable_convs(network)
    for name, conv in convs.items():
        if conv.values is None or conv.pattern is None:
            raise ValueError(f"Expected compact networks. Got {name} in stage {conv.stage!r}; call compact.")
    return convs
