"""What the kernels of both kinds ask of torch on a GPU: the device that is current, and how float32 multiplies."""
from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from typing import Any, TypeVar, cast

import torch
from torch import Tensor

_Function = TypeVar("_Function", bound=Callable[..., Any])


def on_its_device(function: _Function) -> _Function:
    """Launches on the GPU that the first argument lies on, whichever is the current one."""

    @wraps(function)
    def call(first: Tensor, *args: Any, **kwargs: Any) -> Any:
        with torch.cuda.device_of(first):
            return function(first, *args, **kwargs)

    return cast(_Function, call)


def multiplies_in_tf32() -> bool:
    """Whether torch's own products of float32 matrices use TF32 on a GPU, whichever of its settings says so."""
    matmul: Any = torch.backends.cuda.matmul
    try:
        return matmul.fp32_precision == "tf32"  # follows the older settings too, which refuse to be read once this one was set
    except AttributeError:  # torch before 2.9
        return torch.get_float32_matmul_precision() != "highest"
