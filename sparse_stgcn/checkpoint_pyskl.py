"""Checkpoints of PYSKL, in and out, and the sparse ones of the paper's code, in."""
from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from . import __version__
from .kernels import BlockPattern
from .recognizer import Recognizer
from .sparsity import block_of, compact, maskable_convs, stage

__all__ = ["PAPER_ARGUMENTS", "from_paper", "from_pyskl", "to_pyskl"]

Checkpoint = Mapping[str, Any] | str | Path

# Arguments of create_model that give the architectures of the paper's sparse networks; they are not PYSKL's.
PAPER_ARGUMENTS: dict[str, dict[str, Any]] = {
    "stgcn": {"graph": "random", "adaptive": "init"},
    "aagcn": {"graph": "random"},
    "ctrgcn": {"graph": "random", "temporal": "mixed"},
    "dgstgcn": {"joint_mean": False},
}
_HEAD = ("cls_head.fc_cls.weight", "cls_head.fc_cls.bias")
_SCORE = ".weight_score"
# Part of a key that only this backbone has.
_TELLTALES = {".gcn1.": "ctrgcn", ".gcn.conv_d.": "aagcn", ".gcn.pre.": "dgstgcn", ".gcn.conv.": "stgcn"}


def from_pyskl(model: nn.Module, checkpoint: Checkpoint, new_head: bool = False) -> nn.Module:
    """Load a checkpoint of PYSKL into a model of the same architecture.

    Args:
        model: from ``create_model``, in any stage; a compact model takes the weights that its patterns keep.
        checkpoint: a file, a dict with ``state_dict`` (and ``meta``), or the state dict itself; keys may
            begin with ``module.``. Files are read with ``weights_only=True``: nothing in them is executed.
        new_head: keep the classifier that the model has, for instance because the classes are others.

    Returns:
        The model itself.

    Raises:
        ValueError: the file cannot be read, or keys or shapes do not fit; the model is unchanged then.
    """
    state = _state_dict(checkpoint)
    if any(key.endswith(_SCORE) for key in state):
        raise ValueError(
            "Expected checkpoint to be one of PYSKL's. Got mask scores (*.weight_score) of the paper's "
            "code; use from_paper."
        )
    _load(model, state, new_head)
    return model


def to_pyskl(model: nn.Module) -> dict[str, Any]:
    """``{"state_dict", "meta"}`` with PYSKL's keys, for ``torch.save``.

    Weights are dense: of a compact model with zeros where no block lives, of a warm-up model as they are.
    Tensors are copies on the CPU.
    """
    convs = maskable_convs(model)
    state: dict[str, Tensor] = {}
    for key, tensor in model.state_dict().items():
        name, _, leaf = key.rpartition(".")
        if leaf == "values" and name in convs:
            key, tensor = f"{name}.weight", convs[name].dense_weight().contiguous()
        state[key] = tensor.detach().cpu().clone()
    return {
        "state_dict": state,
        "meta": {"sparse_stgcn": __version__, "config": getattr(model, "config", {})},
    }


def from_paper(model: Recognizer, checkpoint: Checkpoint, sparsity: float, repair_residual: bool = False,
               new_head: bool = False) -> Recognizer:
    """Load a sparse checkpoint of the paper's code: weights, and masks from their scores.

    A weight is kept where its score is at least the k-th smallest of its pool of n scores, with
    k = 1 + round(sparsity (n - 1)); the pool is the whole network for ST-GCN and the network block for the
    others. Two habits of that code are part of what its networks compute and are kept: ST-GCN and AA-GCN
    compare the scores of the blocks' residual convolutions with 0, and CTR-GCN leaves out the batch norm of
    its spatial units (here it becomes the identity).

    Args:
        model: dense, from ``create_model(name, num_classes, **PAPER_ARGUMENTS[name])``.
        checkpoint: as for ``from_pyskl``; every maskable weight has a ``weight_score`` beside it.
        sparsity: the level the checkpoint was trained for; the file does not say it.
        repair_residual: mask the residual convolutions by their pool, too.
        new_head: keep the classifier that the model has.

    Returns:
        The model itself, compact, with unstructured patterns (block 1 x 1).

    Raises:
        ValueError: as for ``from_pyskl``; or scores are missing, or the model is not dense.
    """
    if not 0 <= sparsity < 1:
        raise ValueError(f"Expected sparsity to be at least 0 and below 1. Got {sparsity}.")
    if stage(model) != "dense":
        raise ValueError(f"Expected model to be dense. Got one in stage {stage(model)!r}; build a new one.")
    state = _state_dict(checkpoint)
    scores = {key.removesuffix(_SCORE): value for key, value in state.items() if key.endswith(_SCORE)}
    convs = maskable_convs(model)
    for name, conv in convs.items():
        if name not in scores or scores[name].shape != conv.weight.shape:
            got = f"shape {tuple(scores[name].shape)}" if name in scores else "none"
            raise ValueError(
                f"Expected checkpoint to have scores {name}{_SCORE} of shape {tuple(conv.weight.shape)}."
                f" Got {got}; {_advice(state)}"
            )
    _load(model, {key: value for key, value in state.items() if not key.endswith(_SCORE)}, new_head)
    name = model.config["name"]
    thresholds = _thresholds(scores, sparsity, pooled=name == "stgcn")
    for key, conv in convs.items():
        zero = name in ("stgcn", "aagcn") and ".residual." in key and not repair_residual
        keep = scores[key] >= (0.0 if zero else thresholds[block_of(key)])
        conv.attach(BlockPattern.from_blocks(conv.as_oik(keep).contiguous(), conv.shape_oik, (1, 1)))
    if name == "ctrgcn":
        for key, module in model.named_modules():
            if isinstance(module, nn.BatchNorm2d) and key.endswith(".gcn1.bn"):
                _make_identity(module)
    compact(model)
    return model


def _thresholds(scores: Mapping[str, Tensor], sparsity: float, pooled: bool) -> dict[int, float]:
    """Threshold of every network block."""
    pools: dict[int, list[Tensor]] = {}
    for name, score in scores.items():
        pools.setdefault(0 if pooled else block_of(name), []).append(score.flatten())
    result = {}
    for pool, parts in pools.items():
        values = torch.cat(parts)
        # In percent, as that code has it: the rounding of ties depends on it.
        k = 1 + round(0.01 * (sparsity * 100) * (values.numel() - 1))
        result[pool] = values.kthvalue(k).values.item()
    return {block_of(name): result[0 if pooled else block_of(name)] for name in scores}


def _make_identity(norm: nn.BatchNorm2d) -> None:
    norm.reset_running_stats()
    nn.init.zeros_(norm.bias)
    nn.init.constant_(norm.weight, math.sqrt(1 + norm.eps))


def _state_dict(checkpoint: Checkpoint) -> dict[str, Tensor]:
    where = "checkpoint"
    if isinstance(checkpoint, (str, Path)):
        where = f"checkpoint {str(checkpoint)!r}"
        if not Path(checkpoint).is_file():
            raise ValueError(f"Expected {where} to be an existing file. Got none.")
        try:
            checkpoint = torch.load(checkpoint, map_location="cpu", weights_only=True)
        except Exception as error:  # torch raises a dozen types here, all of them about the file
            reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
            raise ValueError(
                f"Expected {where} to be a file of torch.save with tensors and plain values only. "
                f"Got: {reason} Save its state_dict alone if you trust it."
            ) from error
    content: Any = checkpoint
    if isinstance(content, Mapping) and isinstance(content.get("state_dict"), Mapping):
        content = content["state_dict"]
    if not isinstance(content, Mapping) or not content or not all(
            isinstance(key, str) and isinstance(value, Tensor) for key, value in content.items()):
        raise ValueError(f"Expected {where} to be a state dict, or a dict with one under 'state_dict'. "
                         f"Got {_describe(content)}.")
    return {key.removeprefix("module."): value for key, value in content.items()}


def _describe(content: Any) -> str:
    if not isinstance(content, Mapping):
        return f"a {type(content).__name__}"
    return f"a dict with keys {', '.join(map(str, list(content)[:4]))}" if content else "an empty dict"


def _load(model: nn.Module, state: Mapping[str, Tensor], new_head: bool) -> None:
    """Check every key and shape, then copy."""
    convs = maskable_convs(model)
    own: dict[str, tuple[Tensor, tuple[int, ...]]] = {}
    for key, tensor in model.state_dict(keep_vars=True).items():
        name, _, leaf = key.rpartition(".")
        if leaf == "values" and name in convs:
            conv = convs[name]
            shape = (conv.subsets * conv.out_channels, conv.in_channels, conv.kernel_size, 1)
            own[f"{name}.weight"] = (tensor, shape)
        elif not (new_head and key in _HEAD):
            own[key] = (tensor, tuple(tensor.shape))
    given = {key: value for key, value in state.items() if not (new_head and key in _HEAD)}
    missing = [key for key in own if key not in given and not key.endswith("num_batches_tracked")]
    extra = [key for key in given if key not in own]
    if missing or extra:
        lacks = f"{len(missing)} missing, such as {missing[0]}" if missing else ""
        has = f"{len(extra)} unknown, such as {extra[0]}" if extra else ""
        raise ValueError(f"Expected checkpoint to have the keys of this model. Got "
                         f"{' and '.join(filter(None, (lacks, has)))}; {_advice(given)}")
    for key, value in given.items():
        if tuple(value.shape) != own[key][1] and not key.endswith("tcn.add_coeff"):
            raise ValueError(_shape_error(key, tuple(value.shape), own[key][1]))
    with torch.no_grad():
        for key, value in given.items():
            target, (name, _, leaf) = own[key][0], key.rpartition(".")
            if leaf == "weight" and name in convs and convs[name].stage == "compact":
                value = convs[name].gather(value.to(target.device))
            if leaf == "add_coeff":  # 25 entries in PYSKL, of which the first V count
                target, value = target[:len(value)], value[:len(target)]
            target.copy_(value)


def _advice(state: Mapping[str, Tensor]) -> str:
    """What the model should have been, by the look of the keys."""
    name = next((name for part, name in _TELLTALES.items() if any(part in key for key in state)), None)
    if name is None or (name == "stgcn" and any(".tcn.branches." in key for key in state)):
        return "it is of another network."  # ST-GCN++, say
    arguments = [f"{name!r}"]
    if name == "aagcn":
        arguments.append(f"attention={any('.conv_ta.' in key for key in state)}")
    if name == "ctrgcn" and any(".tcn1.transform." in key for key in state):
        arguments.append("temporal='mixed'")
    if name == "stgcn" and not any(key.endswith(".PA") for key in state):
        arguments.append("adaptive='init'")
    if name == "dgstgcn" and not any(key.endswith(".add_coeff") for key in state):
        arguments.append("joint_mean=False")
    return f"its keys look like create_model({', '.join(arguments)}, ...)."


def _shape_error(key: str, got: tuple[int, ...], want: tuple[int, ...]) -> str:
    text = f"Expected checkpoint entry {key} of shape {want}. Got {got}; "
    if key in _HEAD:
        return (
            text
            + f"build the model with num_classes={got[0]}, or pass new_head=True to keep the model's head."
        )
    if ".data_bn." in key:
        return text + "build the model with the layout, in_channels and num_person of the checkpoint."
    if key.endswith((".A", ".PA")):
        return text + f"build the model with a layout of {got[-1]} joints and a graph of {got[0]} subsets."
    return text + "build the model with the arguments of the checkpoint."
