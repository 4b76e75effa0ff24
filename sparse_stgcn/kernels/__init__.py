"""The core: block-sparse graph and temporal convolutions, and the group lasso. The map is in kernels/README.md."""
from __future__ import annotations

from ._library import Lasso
from ._memory import use_pool
from .again import again
from .attend import attend
from .branches import LiveConv, branches
from .dispatch import backends
from .graph_conv import Support, graph_conv
from .graph_product import graph_product
from .group_lasso import group_lasso, lasso_terms
from .means import append_mean, share, spread_mean
from .norm import norm
from .pattern import BlockPattern
from .pool import max_pool
from .split import spans, split
from .temporal_conv import temporal_conv

from . import gpu  # isort: skip  # noqa: F401  (registers the kernels of a GPU for the ops that are defined above)

__all__ = ["BlockPattern", "Lasso", "LiveConv", "Support", "again", "append_mean", "attend", "backends", "branches",
           "graph_conv", "graph_product", "group_lasso", "lasso_terms", "max_pool", "norm", "share", "spans", "split",
           "spread_mean", "temporal_conv", "use_pool"]
