"""The history of a run as TensorBoard event files, one step per epoch."""
from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ..errors import UserError

__all__ = ["EventLog", "scalars"]

NAMES = {"loss": "loss/cross entropy", "lasso": "loss/lasso", "train_accuracy": "accuracy/train",
         "test_accuracy": "accuracy/test", "test_accuracy_unmasked": "accuracy/test, all weights",
         "learning_rate": "learning rate", "samples_per_second": "speed/sequences per second"}


class EventLog:
    """Writes each epoch to ``folder`` as soon as it is over, for ``tensorboard --logdir``.

    Args:
        folder: made if it is missing. A folder with events is continued: those of epochs that are not in ``history`` are
            of a part that was interrupted, and TensorBoard drops them.
        history: records of the epochs so far; they are written if ``folder`` has no events yet.

    Raises:
        UserError: TensorBoard is not installed.
    """

    def __init__(self, folder: Path, history: Sequence[Mapping[str, Any]] = ()) -> None:
        writer = require()
        continued = any(folder.glob("events.out.tfevents.*"))
        self._writer = writer(str(folder), purge_step=len(history) + 1 if continued else None)
        for record in () if continued else history:
            self.write(record)

    def write(self, record: Mapping[str, Any]) -> None:
        """One epoch (see ``loop.Trainer``), on the disk when this returns. Epochs count from 1."""
        for name, value in scalars(record).items():
            self._writer.add_scalar(name, value, record["epoch"] + 1)
        self._writer.flush()

    def close(self) -> None:
        """Close the file."""
        self._writer.close()


def scalars(record: Mapping[str, Any]) -> dict[str, float]:
    """The numbers of an epoch's record by their names in TensorBoard; the masked norms per network block, from 1."""
    found = {name: float(record[key]) for key, name in NAMES.items() if key in record}
    if record["stage"] == "warm-up":  # the masked weights are gone after it
        found |= {f"masked norm/block {i:02d}": float(norm) for i, norm in enumerate(record["masked_norms"], start=1)}
    return found


def require() -> Any:
    """torch's SummaryWriter. Raises UserError without TensorBoard; training asks before it begins."""
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError as error:
        raise UserError("Expected TensorBoard for --tensorboard. Got none; install it with pip install "
                        f"'sparse-stgcn[tensorboard]' ({error}).") from error
    return SummaryWriter
