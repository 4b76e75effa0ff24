"""TrainConfig: the one source of every flag of ``train``, of its YAML file and of its defaults."""
from __future__ import annotations

import argparse
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, TypeVar, get_type_hints

import tyro
import yaml

from .errors import UserError, one_of, validating
from .options import OptionalFloat, OptionalInt, OptionalStr, check_device, check_part, coerce, flag, read_mapping

if TYPE_CHECKING:
    from .allocation.budget import Budget

__all__ = ["PRESETS", "TrainConfig", "parse", "parse_as"]

SCHEDULES = ("linear", "constant")
PRECISIONS = ("float32", "bf16")
LASSO_STEPS = ("gradient", "proximal")
GROUPS = ("block", "tensor", "global")

# What a key becomes that neither the command line nor the YAML file sets, by where the data come from: the
# synthetic set, a data set of fewer than SMALL training sequences, or a larger one (the PYSKL recipe).
SMALL = 10_000
PRESETS: dict[str, dict[str, Any]] = {
    "synthetic": {"sequences": 600, "epochs": 30, "batch_size": 16, "clip_len": 16, "lr_reference_batch": 32,
                  "rotate": 0.0, "scale": 0.0, "eval_every": 10},
    "small": {"epochs": 70, "batch_size": 16, "clip_len": 32, "lr_reference_batch": 32, "rotate": 0.2, "scale": 0.1,
              "eval_every": 10},
    "large": {"epochs": 80, "batch_size": 128, "clip_len": 100, "lr_reference_batch": 128, "rotate": 0.0, "scale": 0.0,
              "eval_every": 1},
}
# Warm-up epochs over all epochs. A dense epoch costs as much as several sparse ones, and on few sequences the penalty has
# drained the masked weights after five or six epochs, so the two presets for small sets learn in the second stage.
WARMUP = {"synthetic": 1 / 6, "small": 0.085, "large": 0.6}

T = TypeVar("T", bound="TrainConfig")

# What may differ between the first part of a run and its continuation: where it runs, not what it computes. The data may
# lie elsewhere; that they are the same is checked when they have been opened, see training/same_data.py.
_FREE_ON_RESUME = ("config", "resume", "data", "device", "threads", "workers", "keep", "save_every_steps", "tensorboard")
_NOT_RECORDED = ("config", "resume")


@dataclass
class TrainConfig:
    """Train a sparse ST-GCN in two stages: a dense warm-up under the group lasso, then the live blocks alone.

    Every flag (--warmup-epochs) is also a key of the YAML file (warmup_epochs). A flag that is left out takes
    the value that suits the data set; the values in force are printed and written to config.yaml in the work
    directory.
    """

    backbone: str = "stgcn"
    """Network: stgcn, aagcn, ctrgcn or dgstgcn."""
    base_channels: int = 64
    """Channels of the first four blocks; the others have two and four times as many."""
    sparsity: float | Literal["auto"] = 0.95
    """Fraction of the maskable weights that is masked, in [0, 1). 0 trains the dense network; auto: what --budget allows."""
    budget: OptionalStr = None
    """With --sparsity auto: 500kB (checkpoint file), 2ms (inference of one sample here), 5% (of the maskable weights), or
    "1 point" (of accuracy lost at most, measured on held-out training sequences)."""
    data: OptionalStr = None
    """Archive (.npz or directory). Without it the embedded synthetic set is used."""
    split: OptionalStr = None
    """Evaluation protocol of the archive, e.g. xsub. Default: train and test (or val), or the only one; of several name one."""
    fold: OptionalInt = None
    """Fold to hold out, for data sets split into folds."""
    layout: OptionalStr = None
    """Skeleton layout: a name (nturgb+d, coco, ...) or a YAML/JSON file. Default: the archive's own."""
    stream: str = "j"
    """Input stream: j joints, b bones, jm, bm their motion; several joined by + enter together."""
    missing: str = "keep"
    """Lost or NaN joints: keep (NaN is an error), interpolate, zero or drop the frame."""
    align: bool = True
    """Turn 3D bodies upright and facing one way."""
    box: bool = False
    """Scale each axis of a sequence so that its joints span [-1, 1]; in 3D after the random turn, so that --scale is without
    effect."""
    sampler: str = "uniform"
    """How frames are drawn: uniform (PYSKL's; a short sequence begins again), decode (the same, its other test clips), or
    ordered (with repetition, in order of time: a short sequence is stretched)."""
    sequences: OptionalInt = None
    """Size of the synthetic set, training and test together."""

    block: str = "8x1"
    """Weight block, output x input channels. 1x1 is the paper's unstructured mask."""
    method: str = "random"
    """Which blocks live: random (balanced over the rows of a layer), nested (random, inside the masks of lower levels),
    biregular (balanced over rows and inputs), iid, fan_in (the authors' pooled scores), magnitude (the largest weights, see
    --init) or predefined (--mask-file)."""
    mask_file: OptionalStr = None
    """Masks for --method predefined: a checkpoint, a work directory or an .npz of bool arrays. They set the sparsity."""
    density: str = "uniform"
    """Share of each layer: uniform, erk (more for small layers), or auto (measured early in the warm-up)."""
    measure_epochs: int = 1
    """With --density auto: epochs at the start of the warm-up, dense and without penalty, after which it is measured."""
    trial_epochs: OptionalInt = None
    """With a budget in points: epochs of the short trainings that are compared. Default: a fifth of the epochs."""
    scope: str = "layer"
    """Where the sparsity holds exactly: in each layer, in each network block, or global."""
    init: OptionalStr = None
    """Checkpoint or work directory whose weights the network starts from. Default: random weights from the seed."""
    lasso: float = 1.0
    """Weight lambda of the group lasso during warm-up."""
    lasso_schedule: str = "linear"
    """lambda over the warm-up: linear from 0, or constant."""
    lasso_step: str = "gradient"
    """gradient: the penalty is part of the loss; proximal: masked weights are shrunk after each step."""
    lasso_group: str = "block"
    """One norm per network block (the paper's), per tensor, or one global norm."""

    epochs: OptionalInt = None
    """Epochs of both stages together."""
    warmup_epochs: OptionalInt = None
    """Epochs of the dense warm-up. Default: 0.6 of the epochs; 0.085 of them with fewer than 10,000 training sequences, a sixth
    on the synthetic set."""
    batch_size: OptionalInt = None
    """Sequences per step, of all processes together."""
    auto_batch: bool = False
    """Choose the batch size: the largest power of two that fits into memory. With --batch-size, keep it and choose
    --accumulate, so that it fits."""
    accumulate: int = 1
    """Compute a step in this many parts, one after another: less memory for the same step. Batch norm sees the parts."""
    clip_len: OptionalInt = None
    """Frames sampled from each sequence."""
    num_person: OptionalInt = None
    """Persons per sequence; missing ones are zero. Default: as many as the archive has."""
    lr: float = 0.1
    """Learning rate per lr_reference_batch sequences; scaled linearly with the batch size and printed."""
    lr_reference_batch: OptionalInt = None
    """Batch size that --lr refers to. PYSKL: 128."""
    momentum: float = 0.9
    """Nesterov momentum of SGD."""
    weight_decay: float = 5e-4
    """Weight decay on every parameter."""
    rotate: OptionalFloat = None
    """Largest random rotation of a training sequence about each axis, in radians. Default: 0.2 for small sets, else 0."""
    scale: OptionalFloat = None
    """Largest random change of size per axis, as a fraction. Default: 0.1 for small sets, else 0."""

    ema: OptionalFloat = None
    """Test and keep an exponential moving average of the weights with this decay, e.g. 0.999. Default: the weights
    themselves."""
    precision: str = "float32"
    """float32, or bf16: convolutions and products of the forward and backward pass in bfloat16 (autocast); on a CPU the
    dense convolutions."""
    sync_norm: bool = True
    """With several processes: batch norm over the whole batch, as one process would. --no-sync-norm: over each process's
    share, which exchanges less."""

    eval_every: OptionalInt = None
    """Test on one clip per sequence every this many epochs, and at the end of each stage."""
    eval_clips: int = 10
    """Clips per sequence in the final test, probabilities averaged."""
    seed: int = 0
    """Seed of weights, pattern, order and sampling."""
    device: OptionalStr = None
    """cpu, cuda or cuda:N. Default: cuda if there is one."""
    threads: OptionalInt = None
    """CPU threads. Default: what torch chooses."""
    workers: OptionalInt = None
    """Processes that load data; 0 loads in the main process."""
    keep: int = 2
    """Resume files that stay in the work directory: the newest ones."""
    save_every_steps: OptionalInt = None
    """Save the state every this many steps. Default: at the end of each epoch; at the end of an epoch it is saved anyway."""
    work_dir: OptionalStr = None
    """Directory for what the run writes. Default: a new one under runs/."""
    tensorboard: bool = False
    """Write events for TensorBoard to tensorboard/ in the work directory, one step per epoch."""
    config: OptionalStr = None
    """YAML file of these keys; flags on the command line win."""
    resume: OptionalStr = None
    """Work directory of an interrupted run to continue exactly."""

    @property
    def learning_rate(self) -> float:
        """``lr`` scaled linearly from the reference batch to the batch. Needs a resolved configuration."""
        if self.batch_size is None or self.lr_reference_batch is None:
            raise ValueError("Expected a resolved configuration, as config.resolved(preset) gives. Got no "
                             "batch size.")
        return self.lr * self.batch_size / self.lr_reference_batch

    @property
    def sparse(self) -> bool:
        """Whether weights are masked at all."""
        return isinstance(self.sparsity, str) or self.sparsity > 0

    @property
    def level(self) -> str:
        """The sparsity as text: 0.95, or auto."""
        return self.sparsity if isinstance(self.sparsity, str) else f"{self.sparsity:g}"

    @property
    def automatic(self) -> bool:
        """Whether densities are measured, and not known from the start."""
        return self.sparse and (self.density == "auto" or self.sparsity == "auto")

    def limit(self) -> Budget:
        """The budget of an automatic run: ``--budget``, or the weights that ``--sparsity`` keeps."""
        from .allocation.budget import Budget

        if isinstance(self.sparsity, str):
            return Budget.parse(self.budget or "")
        return Budget("weights", 1 - self.sparsity, f"{100 * (1 - self.sparsity):g}%", "--sparsity")

    def resolved(self: T, preset: str) -> T:
        """A copy in which the keys that are None have the values of ``PRESETS[preset]``, checked again.

        ``num_person``, ``split``, ``threads``, ``workers``, ``device`` and ``work_dir`` depend on the data or
        the machine and stay as they are.
        """
        full = replace(self, **{k: v for k, v in PRESETS[preset].items() if getattr(self, k) is None})
        if full.warmup_epochs is None and full.epochs is not None:
            warmup = min(max(1, round(WARMUP[preset] * full.epochs)), full.epochs - 1)
            full.warmup_epochs = warmup if full.sparse else 0
        if full.sparsity == "auto":
            full.density = "auto"
            if full.trial_epochs is None and full.epochs is not None:
                full.trial_epochs = max(1, full.epochs // 5)
        full.validate()
        return full

    def validate(self) -> None:
        """Check everything that can be checked without the data.

        Raises:
            UserError: the first key that is out of range, with its flag and the fix.
        """
        from .backbones import BACKBONES
        from .data.preparation import SAMPLERS
        from .data.transforms import MISSING, streams_of
        from .masks import DENSITIES, METHODS, SCOPES
        from .sparsity import parse_block

        one_of("--backbone", self.backbone, list(BACKBONES))
        streams_of(self.stream)
        one_of("--missing", self.missing, MISSING)
        one_of("--sampler", self.sampler, SAMPLERS)
        one_of("--method", self.method, list(METHODS))
        one_of("--density", self.density, (*DENSITIES, "auto"))
        one_of("--scope", self.scope, SCOPES)
        one_of("--lasso-schedule", self.lasso_schedule, SCHEDULES)
        one_of("--lasso-step", self.lasso_step, LASSO_STEPS)
        one_of("--lasso-group", self.lasso_group, GROUPS)
        one_of("--precision", self.precision, PRECISIONS)
        with validating("--block"):
            parse_block(self.block)
        if not isinstance(self.sparsity, str) and not 0 <= self.sparsity < 1:
            raise UserError(f"Expected --sparsity in [0, 1), the fraction of weights masked (0.95 keeps "
                            f"5 %). Got {self.sparsity:g}.")
        for name in ("sequences", "epochs", "batch_size", "clip_len", "num_person", "lr_reference_batch",
                     "eval_every", "eval_clips", "threads", "base_channels", "trial_epochs", "accumulate", "keep",
                     "save_every_steps"):
            self._at_least(name, 1)
        for name in ("warmup_epochs", "measure_epochs", "workers", "fold", "seed"):
            self._at_least(name, 0)
        for name in ("lasso", "weight_decay", "rotate", "scale"):
            value = getattr(self, name)
            self._number(name, value is None or 0 <= value < math.inf, "a finite number >= 0")
        self._number("lr", 0 < self.lr < math.inf, "a finite number > 0")
        self._number("ema", self.ema is None or 0 < self.ema < 1, "a number in (0, 1)")
        self._number("momentum", 0 < self.momentum < 1, "a number in (0, 1)")
        if self.sparse and self.epochs is not None and self.warmup_epochs is not None \
                and self.warmup_epochs >= self.epochs:
            raise UserError(f"Expected --warmup-epochs below --epochs ({self.epochs}), so that the live "
                            f"blocks are fine-tuned. Got {self.warmup_epochs}.")
        if (self.method == "predefined") != (self.mask_file is not None):
            raise UserError(f"Expected --mask-file together with --method predefined. Got --method {self.method}"
                            f"{'' if self.mask_file is None else f' and --mask-file {self.mask_file}'}.")
        if self.method == "predefined" and self.sparsity == 0:
            raise UserError("Expected --sparsity > 0 with --method predefined, which trains a sparse network. Got 0.")
        self._check_budget()
        if self.data is not None and not Path(self.data).exists():
            raise UserError(f"Expected --data to be an archive that exists. Got {self.data}; check the path, "
                            "or leave --data out to train on the synthetic set.")
        if self.data is not None and self.sequences is not None:
            raise UserError("Expected --sequences without --data, as it sizes the synthetic set. Remove one "
                            "of the two.")
        if self.data is None and self.fold is not None:
            raise UserError("Expected --fold together with --data. The synthetic set has no folds; remove "
                            "--fold.")
        check_part(self.split, self.fold)
        if self.device is not None:
            check_device(self.device)

    def _check_budget(self) -> None:
        if (self.sparsity == "auto") != (self.budget is not None):
            raise UserError(f"Expected --budget together with --sparsity auto. Got --sparsity {self.sparsity}"
                            f"{'' if self.budget is None else f' and --budget {self.budget}'}.")
        if self.sparsity == "auto":
            self.limit()
            if self.density == "erk":
                raise UserError("Expected --sparsity auto with its own densities. Got --density erk; leave it out.")
        if self.automatic and self.method == "magnitude":
            raise UserError("Expected --sparsity auto and --density auto with a method that draws masks from the seed. Got "
                            "--method magnitude; name another method, or a number as --sparsity and --density uniform or erk.")
        if self.automatic and self.method == "predefined":
            raise UserError("Expected --mask-file without --sparsity auto and --density auto: a file has its own densities. "
                            "Remove one of the two.")

    def _at_least(self, name: str, least: int) -> None:
        value = getattr(self, name)
        if value is not None and value < least:
            raise UserError(f"Expected {flag(name)} >= {least}. Got {value}.")

    def _number(self, name: str, good: bool, expected: str) -> None:
        if not good:
            raise UserError(f"Expected {flag(name)} to be {expected}. Got {getattr(self, name):g}.")

    def to_dict(self) -> dict[str, Any]:
        """Every key except ``config`` and ``resume``, which say how the run was called, not what it is."""
        return {k: v for k, v in asdict(self).items() if k not in _NOT_RECORDED}

    def write(self, path: str | Path) -> None:
        """Write the keys as YAML, as a whole or not at all; ``read`` gives the same configuration back."""
        from .checkpoint import write_atomically

        write_atomically(path, yaml.safe_dump(self.to_dict(), sort_keys=False).encode())

    @classmethod
    def read(cls: type[T], path: str | Path) -> T:
        """The configuration of a YAML file; keys that it does not set keep their defaults.

        Raises:
            UserError: no such file, not YAML, not a mapping, an unknown key, or a value of the wrong type.
        """
        return cls.from_mapping(read_mapping(path), path)

    @classmethod
    def recorded(cls: type[T], work_dir: str | Path) -> T:
        """The configuration of the run in ``work_dir``.

        Raises:
            UserError: there is none, or it cannot be read.
        """
        path = Path(work_dir) / "config.yaml"
        if not path.is_file():
            raise UserError(f"Expected --resume to be the work directory of a run. Got {work_dir}, which "
                            "has no config.yaml.")
        return cls.read(path)

    def resuming(self: T, work_dir: str | Path) -> T:
        """The configuration that goes on with the run in ``work_dir``; keys that are None here are as they were.

        Raises:
            UserError: a key here would change what the run computes.
        """
        there = type(self).recorded(work_dir)
        here = replace(self, **{f.name: getattr(there, f.name) for f in fields(self) if getattr(self, f.name) is None})
        if here.method == "predefined":
            here.sparsity = there.sparsity  # the file set it
        if here.sparsity == "auto" and here.density == "uniform":
            here.density = there.density  # the default, in place of which the run recorded that it chose
        if here.auto_batch:
            here.accumulate = there.accumulate
        changed = [flag(f.name) for f in fields(self) if f.name not in (*_FREE_ON_RESUME, "work_dir")
                   and getattr(here, f.name) != getattr(there, f.name)]
        if changed:
            raise UserError(f"Expected --resume to continue the run unchanged. Got other values for "
                            f"{', '.join(changed)}; leave them out, or start a new run.")
        # The directory may have been moved or renamed since it was written.
        here.config, here.resume, here.work_dir = None, str(work_dir), str(work_dir)
        return here

    @classmethod
    def from_mapping(cls: type[T], content: Mapping[str, Any], path: str | Path) -> T:
        """The configuration of keys and values read from ``path``; raises like :meth:`read`."""
        kinds = get_type_hints(cls)
        values: dict[str, Any] = {}
        for key, value in content.items():
            name = str(key).replace("-", "_")
            one_of(f"each key of {path}", name, [f.name for f in fields(cls) if f.name not in _NOT_RECORDED])
            values[name] = coerce(name, value, kinds[name], path)
        return cls(**values)


def parse(argv: Sequence[str] | None = None, prog: str | None = None) -> TrainConfig:
    """The configuration of a command line of ``train``, see :func:`parse_as`."""
    return parse_as(TrainConfig, argv, prog)


def parse_as(kind: type[T], argv: Sequence[str] | None = None, prog: str | None = None) -> T:
    """The configuration of a command line as a ``kind``: defaults, then the ``--config`` file, then flags.

    With ``--resume D`` the configuration is D/config.yaml; a flag that would change what the run computes is
    refused.

    Raises:
        UserError: a bad file or a bad combination. A flag that does not parse ends the process with code 2.
    """
    early = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    early.add_argument("--config")
    early.add_argument("--resume")
    known, _ = early.parse_known_args(argv)
    default = kind()
    if known.resume is not None:
        if known.config is not None:
            raise UserError("Expected --resume without --config, as the run keeps its own. Remove --config.")
        default = kind.recorded(known.resume)
    elif known.config is not None:
        default = kind.read(known.config)
    config = tyro.cli(kind, args=argv, default=default, prog=prog)
    if known.resume is not None:
        return config.resuming(known.resume)
    return config
