"""The convolutions that a mask can cover, and the temporal unit that is built on them."""
from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .batch_norms import join_parameters, norm_fuses, normalise, track_all
from .kernels import BlockPattern, LiveConv, _native, again, branches, graph_conv, graph_product, max_pool, temporal_conv
from .kernels.branches import Map, fuses
from .kernels.dispatch import beside, runs_natively, widened, widened_dtype

__all__ = ["Maps", "SparseConv2d", "TemporalUnit", "Units", "as_maps", "normed", "pointwise_unit", "run_units", "unwatched"]

# Inputs times taps up to which a dense weight is trained faster by the kernels of live blocks than by PyTorch's convolution, as
# measured (kernels/README.md): the weights of eight outputs, 36 kB, still stay in the first cache.
_LONGEST_SUM = {"avx512": 1152, "avx512_bf16": 1152}


class SparseConv2d(nn.Module):
    """Convolution over frames, 1 x 1 or k x 1, whose weight can be dense or live blocks only.

    Y[n,o,t,v] = b[o] + sum over (i,k) of W[o,i,k] X[n, i, t*stride + (k - (K-1)/2)*dilation, v];
    shapes (N, I, T, V) -> (N, O, ceil(T / stride), V). With ``subsets`` > 1 it is the convolution of a graph
    unit, which ``aggregate`` runs: ``subsets * out_channels`` outputs, subset-major.

    Stages:
        dense: ``weight`` (subsets * O, I, kernel, 1), no pattern.
        warmup: a pattern is attached, ``weight`` is dense still and all of it is used, unless ``masked`` is
        set.
        compact: ``values`` (blocks, bi, bo) is the only weight; ``weight`` is None.

    State-dict keys and the initialisation of the dense stage are those of ``nn.Conv2d``.
    """

    weight: nn.Parameter  # None once compact
    values: nn.Parameter | None
    bias: nn.Parameter | None

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int = 1,
        stride: int = 1,
        dilation: int = 1,
        bias: bool = True,
        subsets: int = 1,
    ) -> None:
        super().__init__()
        if not hasattr(kernel_size, "__index__") or kernel_size < 1 or kernel_size % 2 == 0:
            raise ValueError(f"Expected kernel_size to be an odd whole number, the frames that it spans. Got {kernel_size!r}.")
        if subsets > 1 and (kernel_size, stride) != (1, 1):
            raise ValueError(
                f"Expected a graph convolution (subsets > 1) to have kernel_size 1 and stride 1. "
                f"Got {kernel_size} and {stride}."
            )
        self.in_channels, self.out_channels, self.subsets = in_channels, out_channels, subsets
        self.kernel_size, self.stride, self.dilation = kernel_size, stride, dilation
        self.pattern: BlockPattern | None = None
        self.masked = False
        self._whole: BlockPattern | None = None
        self.weight = nn.Parameter(torch.empty(subsets * out_channels, in_channels, kernel_size, 1))
        self.register_parameter("values", None)
        if bias:
            self.bias = nn.Parameter(torch.empty(subsets * out_channels))
        else:
            self.register_parameter("bias", None)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """PyTorch's default for convolutions: weight and bias uniform in +-1 / sqrt(fan_in)."""
        if self.weight is None:
            raise ValueError(
                "Expected a convolution with a dense weight. Got a compact one; call densify first."
            )
        nn.init.kaiming_uniform_(self.weight, a=math.sqrt(5))
        if self.bias is not None:
            bound = 1 / math.sqrt(self.in_channels * self.kernel_size)
            nn.init.uniform_(self.bias, -bound, bound)

    @property
    def stage(self) -> str:
        """"dense", "warmup" or "compact"."""
        if self.values is not None:
            return "compact"
        return "dense" if self.pattern is None else "warmup"

    @property
    def shape_oik(self) -> tuple[int, int, int]:
        """(O, I, K) of the weight as a pattern sees it; K = subsets of a graph convolution, else taps."""
        return self.out_channels, self.in_channels, self.subsets if self.subsets > 1 else self.kernel_size

    def as_oik(self, dense: Tensor) -> Tensor:
        """View of a tensor of the weight's shape as (O, I, K); [k*O + o, i] is [o, i, k] of subsets."""
        if self.subsets == 1:
            return dense[..., 0]
        return dense.view(self.subsets, self.out_channels, self.in_channels).permute(1, 2, 0)

    def from_oik(self, weight: Tensor) -> Tensor:
        """The inverse of ``as_oik``."""
        if self.subsets == 1:
            return weight[..., None]
        return weight.permute(2, 0, 1).reshape(-1, self.in_channels, 1, 1)

    def weight_oik(self) -> Tensor:
        """The weight as (O, I, K): a view of the dense one, or the live blocks among zeros."""
        if self.values is not None and self.pattern is not None:
            return self.pattern.scatter(self.values)
        return self.as_oik(self.weight)

    def gather(self, dense: Tensor) -> Tensor:
        """The live blocks of a tensor of the weight's shape, in the shape and order of ``values``."""
        if self.pattern is None:
            raise ValueError("Expected a convolution with a pattern. Got none; call sparsify.")
        return self.pattern.gather(self.as_oik(dense))

    def dense_weight(self) -> Tensor:
        """(subsets * O, I, kernel, 1): what the forward pass uses in this stage, differentiable."""
        if self.values is not None:
            return self.from_oik(self.weight_oik())
        if self.masked and self.pattern is not None:
            return self.from_oik(self.as_oik(self.weight) * self.pattern.mask())
        return self.weight

    @property
    def live_pattern(self) -> BlockPattern | None:
        """The pattern of the blocks that the kernels run on: the live ones of the compact stage; before it every block, in
        training on a CPU and where that is faster than PyTorch's convolution; None where that one runs.
        """
        if self.values is not None:
            return self.pattern
        if not self._trains_as_blocks():
            return None
        if self._whole is None:
            self._whole = BlockPattern.full(self.shape_oik, (8, 1))
        return self._whole

    def _trains_as_blocks(self) -> bool:
        return (self.training and self.in_channels * self.shape_oik[2] <= _LONGEST_SUM.get(_native.isa, 0)
                and self.weight.dtype == torch.float32 and torch.is_grad_enabled() and not torch.compiler.is_compiling()
                and not torch.is_autocast_enabled("cpu") and runs_natively("temporal_conv", self.weight))

    def live(self) -> LiveConv | None:
        """Weight and bias as the blocks of ``live_pattern``, differentiable; a graph convolution's bias has K * O entries."""
        pattern = self.live_pattern
        if pattern is None:
            return None
        values = pattern.gather(self.as_oik(self.dense_weight())) if self.values is None else self.values
        return LiveConv(values, pattern, self.bias, self.dilation)

    def attach(self, pattern: BlockPattern) -> None:
        """dense -> warmup: fix which weights will be kept.

        Raises:
            ValueError: the pattern has another shape than the weight, or the weight is compact already.
        """
        if pattern.shape != self.shape_oik:
            raise ValueError(f"Expected pattern of shape {self.shape_oik}. Got {pattern.shape}.")
        if self.weight is None:
            raise ValueError(
                "Expected a convolution with a dense weight. Got a compact one; call densify first."
            )
        self.pattern = pattern.to(self.weight.device)

    def compact(self) -> tuple[nn.Parameter, nn.Parameter, Callable[[Tensor], Tensor]]:
        """warmup -> compact: drop the dead weights.

        Returns:
            The weight that was dropped, the ``values`` that replace it, and the function that takes a tensor
            of the old weight's shape (a momentum buffer, say) to the shape of ``values`` in the same order.
        """
        old = self.weight
        if self.pattern is None or old is None:
            raise ValueError(
                f"Expected a convolution in stage 'warmup'. Got stage {self.stage!r}; call sparsify."
            )
        with torch.no_grad():
            self.values = nn.Parameter(self.gather(old), requires_grad=old.requires_grad)
        self.weight = None  # type: ignore[assignment]
        return old, self.values, self.gather

    def densify(self) -> None:
        """compact -> warmup: the dense weight with zeros where no block lives; the pattern stays attached."""
        if self.values is None:
            return
        with torch.no_grad():
            dense = self.dense_weight().contiguous()
        self.weight = nn.Parameter(dense, requires_grad=self.values.requires_grad)
        self.values = None

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        if self.values is not None and hasattr(destination, "_metadata"):
            # Masks of other seeds have as many blocks: shapes do not tell them apart. No key of its own: keys are PyTorch's.
            destination._metadata[prefix[:-1]]["pattern"] = self.pattern.digest()

    def _load_from_state_dict(self, state_dict: Any, prefix: str, local_metadata: Any, strict: bool, missing_keys: list[str],
                              unexpected_keys: list[str], error_msgs: list[str]) -> None:
        given = local_metadata.get("pattern")
        if self.values is not None and given not in (None, self.pattern.digest()):
            error_msgs.append(f"Expected {prefix}values of the pattern that this network has. Got those of another one; load a "
                              "file of the whole network with sparse_stgcn.load, or densify both first.")
            return
        super()._load_from_state_dict(state_dict, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs)

    def forward(self, x: Tensor) -> Tensor:
        if self.subsets > 1:
            raise ValueError(
                "Expected a convolution without subsets. Got a graph convolution; call aggregate."
            )
        live = self.live()
        if live is not None:
            return temporal_conv(beside(x, live.values), live.values, live.pattern, live.bias, self.stride, self.dilation)
        padding = (self.kernel_size - 1) // 2 * self.dilation
        return F.conv2d(x, self.dense_weight(), self.bias, (self.stride, 1), (padding, 0), (self.dilation, 1))

    def aggregate(self, x: Tensor, adjacency: Tensor, support: Tensor | None = None) -> Tensor:
        """Y[n,o,t,w] = sum over k, v of A_k[v,w] (b_k[o] + sum over i of W_k[o,i] X[n,i,t,v]).

        Args:
            x: (N, I, T, V).
            adjacency: (K, V, V), K = ``subsets``.
            support: bool (K, V, V), the only entries of ``adjacency`` that can differ from 0.
        """
        bias = None if self.bias is None else self.bias.view(self.subsets, self.out_channels)
        live = self.live()
        if live is not None:
            x, adjacency = beside(x, live.values), beside(adjacency, live.values)
            return graph_conv(x, live.values, live.pattern, adjacency, bias, support=support)
        if self.training and torch.is_grad_enabled() and runs_natively("graph_product", x):
            weight = torch.cat(self.dense_weight().chunk(self.subsets), 1)  # one product over all subsets
            out = F.conv2d(graph_product(x, adjacency, support), weight)
            return out if bias is None else out + (bias.t() @ adjacency.sum(1))[None, :, None, :]
        batch, channels, frames, joints = x.shape
        rows = x.reshape(-1, joints)
        # The product with A_k comes first: it then runs on the narrower side, and no K * O channels are held.
        parts = (
            F.conv2d((rows @ subset).view(batch, channels, frames, joints), weight)
            for weight, subset in zip(self.dense_weight().chunk(self.subsets), adjacency, strict=True)
        )
        out = next(parts)
        for part in parts:
            out.add_(part)
        return out if bias is None else out + (bias.t() @ adjacency.sum(1))[None, :, None, :]

    def _apply(self, fn: Callable, recurse: bool = True) -> SparseConv2d:
        super()._apply(fn, recurse)
        if self.pattern is not None:
            self.pattern = self.pattern.to((self.weight if self.values is None else self.values).device)
        return self

    def extra_repr(self) -> str:
        text = f"{self.in_channels}, {self.out_channels}"
        for name, usual in (("kernel_size", 1), ("stride", 1), ("dilation", 1), ("subsets", 1)):
            if getattr(self, name) != usual:
                text += f", {name}={getattr(self, name)}"
        return text if self.pattern is None else f"{text}, {self.stage}, {self.pattern}"


def unwatched(module: nn.Module) -> bool:
    """No hook looks at what goes into the module or comes out of it, so that others may do its work."""
    return not (module._forward_hooks or module._forward_pre_hooks or module._backward_hooks or module._backward_pre_hooks)


class Maps(NamedTuple):
    """What ``kernels.branches`` makes of its inputs, for all norms of one eps."""

    of: list[Map]
    stride: int
    eps: float


def as_maps(norms: Sequence[nn.Module], x: Tensor, modules: Sequence[nn.Module]) -> Maps | None:
    """relu(bn_i(.)) and module_i behind it as maps of ``kernels.branches``; None where that cannot stand for all of them.

    The modules are live convolutions over frames and poolings over three frames, of one stride. x: has the inputs' N, T and V,
    dtype and device.
    """
    maps: list[Map] = []
    strides: set[int] = set()
    for bn, module in zip(norms, modules, strict=True):
        if not norm_fuses(bn, x) or not unwatched(bn) or not unwatched(module):
            return None
        if isinstance(module, SparseConv2d):
            live = None if module.subsets > 1 else module.live()
            if live is None:
                return None
            maps.append(live)
            strides.add(module.stride)
        elif _pools(module, x):
            maps.append("max")
            strides.add(module.stride[0])  # type: ignore[index,arg-type]  # a pair, see _pools
        else:
            return None
    eps: set[float] = {bn.eps for bn in norms}  # type: ignore[misc]
    if len(eps) > 1 or len(strides) > 1 or not fuses(x, maps, min(strides), widened_dtype(x)):
        return None
    return Maps(maps, min(strides), min(eps))


def normed(norms: Sequence[nn.Module], xs: Sequence[Tensor], maps: Maps, passing: Sequence[Tensor] = (),
           coef: Tensor | None = None) -> Tensor:
    """cat(module_i(relu(bn_i(x_i)))), and ``passing`` as it is behind them, as one op; coef: see ``kernels.branches``."""
    own: list[nn.BatchNorm2d] = list(norms)  # type: ignore[arg-type]
    ways, inputs = list(maps.of), [widened(x) for x in (*xs, *passing)]
    ways.extend("pass" for _ in passing)
    y, mean, variance = branches(inputs, *join_parameters(own), ways, maps.stride, maps.eps, coef)
    track_all(own, mean, variance)
    return y


class TemporalUnit(nn.Module):
    """k x 1 convolution over frames, then batch norm: (N, I, T, V) -> (N, O, ceil(T / stride), V).

    PYSKL's ``unit_tcn``; with ``norm=False`` the convolution alone, under the same state-dict key ``conv``.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int = 9,
        stride: int = 1,
        dilation: int = 1,
        norm: bool = True,
    ) -> None:
        super().__init__()
        self.conv = SparseConv2d(in_channels, out_channels, kernel_size, stride, dilation)
        self.bn = nn.BatchNorm2d(out_channels) if norm else nn.Identity()

    def forward(self, x: Tensor, residual: Tensor | None = None, relu: bool = False) -> Tensor:
        """relu(bn(conv(x)) + residual)."""
        return normalise(self.bn, self.conv(x), residual, relu)


class Units(nn.Sequential):
    """nn.Sequential in which a batch norm and the ReLU behind it run as one, see ``normalise``."""

    def forward(self, x: Tensor) -> Tensor:
        return run_units(list(self), x)


def run_units(modules: Sequence[nn.Module], x: Tensor) -> Tensor:
    """The modules one after the other; a batch norm, the ReLU behind it and the live convolution behind that run as one."""
    done = 0  # modules that come have been done already
    for at, module in enumerate(modules):
        if done:
            done -= 1
        elif isinstance(module, nn.BatchNorm2d):
            done = int(isinstance(modules[at + 1] if at + 1 < len(modules) else None, nn.ReLU))
            maps = as_maps([module], x, modules[at + 2:at + 3]) if done and at + 2 < len(modules) else None
            x, done = (normalise(module, x, relu=done > 0), done) if maps is None else (normed([module], [x], maps), 2)
        else:
            with again(x):
                # a pair of strides, see _pools
                x = max_pool(x, module.stride[0]) if _pools(module, x) else module(x)  # type: ignore[index,arg-type]
    return x


def _pools(module: nn.Module, x: Tensor) -> bool:
    """Whether ``kernels.max_pool`` can stand for ``module`` on x."""
    if type(module) is not nn.MaxPool2d or not unwatched(module) or not runs_natively("max_pool", x):
        return False
    shape = (module.kernel_size, module.padding, module.dilation, module.ceil_mode, module.return_indices)
    return shape == ((3, 1), (1, 0), 1, False, False) and isinstance(module.stride, tuple) and module.stride[1] == 1


def pointwise_unit(in_channels: int, out_channels: int) -> Units:
    """1 x 1 convolution and batch norm, with the state-dict keys ``0`` and ``1``."""
    return Units(SparseConv2d(in_channels, out_channels), nn.BatchNorm2d(out_channels))
