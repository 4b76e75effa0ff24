"""Batch norm with the statistics of the whole batch, which lies on several processes.

PyTorch's ``nn.SyncBatchNorm`` does this on GPUs and is used there; it has no CPU implementation, so here is one of the same
formulas. With n_r, m_r, v_r the count, mean and variance of a channel on process r and n = sum n_r (Chan et al. 1979):

    mean = sum n_r m_r / n,   var = sum n_r (v_r + (m_r - mean)^2) / n,   y = weight (x - mean) / sqrt(var + eps) + bias

and backward, with xh = (x - mean) / sqrt(var + eps) and the sums running over the elements of *all* processes,

    dx = weight / sqrt(var + eps) (dy - sum dy / n - xh sum(dy xh) / n).

dweight and dbias are this process's own sums: they are averaged with the other gradients.
"""
from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from ..batch_norms import track

__all__ = ["SyncedBatchNorm1d", "SyncedBatchNorm2d", "synchronise"]


class _SyncedNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> tuple[Tensor, Tensor, Tensor]:
        outer = [d for d in range(x.dim()) if d != 1]
        variance, mean = torch.var_mean(x.to(weight.dtype), outer, correction=0)
        own = torch.cat([mean, variance, mean.new_tensor([x.numel() / x.shape[1]])])
        every = [torch.empty_like(own) for _ in range(dist.get_world_size())]
        dist.all_gather(every, own)
        means, variances, counts = torch.stack(every).double().split([len(mean), len(mean), 1], 1)
        total = counts.sum()
        joint = (counts * means).sum(0) / total
        spread = (counts * (variances + (means - joint) ** 2)).sum(0) / total
        rstd = torch.rsqrt(spread + eps).to(weight.dtype)
        y = F.batch_norm(x, joint.to(weight.dtype), spread.to(weight.dtype), weight, bias, False, 0.0, eps)
        unbiased = (spread * total / (total - 1)).to(weight.dtype)
        mean = joint.to(weight.dtype)
        ctx.mark_non_differentiable(mean, unbiased)
        ctx.save_for_backward(x, weight, mean, rstd)
        ctx.total = float(total)
        return y, mean, unbiased

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor, *unused: Tensor) -> tuple[Tensor, Tensor, Tensor, None]:
        x, weight, mean, rstd = ctx.saved_tensors
        outer, column = [d for d in range(x.dim()) if d != 1], (1, -1) + (1,) * (x.dim() - 2)
        grad = dy.to(weight.dtype)
        centred = x.to(weight.dtype) - mean.view(column)
        dbias, dweight = grad.sum(outer), (grad * centred).sum(outer) * rstd
        sums = torch.cat([dbias, dweight])
        dist.all_reduce(sums)
        mean_dy, mean_dy_xh = (sums / ctx.total).chunk(2)
        dx = (grad - mean_dy.view(column)).sub_(centred.mul_((rstd * mean_dy_xh).view(column)))
        return dx.mul_((weight * rstd).view(column)).to(x.dtype), dweight, dbias, None


class _Synced(nn.modules.batchnorm._BatchNorm):
    """What the two classes below share. In evaluation it is the ordinary batch norm."""

    def forward(self, x: Tensor) -> Tensor:
        if not self.training:
            return super().forward(x)
        y, mean, variance = _SyncedNorm.apply(x, self.weight, self.bias, self.eps)
        track(self, mean, variance)
        return y


class SyncedBatchNorm1d(_Synced, nn.BatchNorm1d):
    """``nn.BatchNorm1d`` over the batches of all processes."""


class SyncedBatchNorm2d(_Synced, nn.BatchNorm2d):
    """``nn.BatchNorm2d`` over the batches of all processes."""


def synchronise(model: nn.Module) -> nn.Module:
    """Replace every batch norm by one over all processes, with the same parameters and buffers; the model itself."""
    if next(model.parameters()).device.type == "cuda":
        return nn.SyncBatchNorm.convert_sync_batchnorm(model)
    for parent in list(model.modules()):
        for name, child in list(parent.named_children()):
            if type(child) in (nn.BatchNorm1d, nn.BatchNorm2d):
                kind = SyncedBatchNorm1d if type(child) is nn.BatchNorm1d else SyncedBatchNorm2d
                norm: Any = child
                synced = kind(norm.num_features, norm.eps, norm.momentum)
                synced.weight, synced.bias = norm.weight, norm.bias
                for buffer in ("running_mean", "running_var", "num_batches_tracked"):
                    setattr(synced, buffer, getattr(norm, buffer))
                setattr(parent, name, synced.train(norm.training))
    return model
