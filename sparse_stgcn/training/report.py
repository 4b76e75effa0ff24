"""What a training run shows: a progress bar on a terminal, one plain line per epoch elsewhere, and events for TensorBoard."""
from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from .events import EventLog

__all__ = ["Report", "describe_epoch"]


class Report:
    """Progress of one run on ``console``. Use as a context manager.

    Args:
        epochs: epochs of the whole run.
        console: where to write; the standard output by default. Bars appear only if it is a terminal.

    Attributes:
        events: writes each epoch for TensorBoard as well; None does not.
    """

    def __init__(self, epochs: int, console: Console | None = None) -> None:
        self.epochs = epochs
        self.events: EventLog | None = None
        self.console = console or Console(highlight=False, soft_wrap=True)
        self._bar = Progress(
            TextColumn("{task.description}"), BarColumn(bar_width=24), MofNCompleteColumn(),
            TextColumn("loss {task.fields[loss]:.3f}  lasso {task.fields[lasso]:.2f}  "
                       "acc {task.fields[accuracy]:.1%}  {task.fields[speed]:.0f} seq/s"),
            TimeRemainingColumn(), console=self.console, transient=True, disable=not self.console.is_terminal)
        self._task: Any = None

    @classmethod
    def silent(cls) -> Report:
        """One that shows nothing: of a process that leaves the talking to another."""
        return cls(1, Console(quiet=True))

    def __enter__(self) -> Report:
        self._bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._bar.stop()
        if self.events is not None:
            self.events.close()

    def line(self, text: str) -> None:
        """One line of text, above the bar if there is one."""
        self._bar.console.print(text, markup=False)

    def begin(self, epoch: int, stage: str, steps: int, done: int = 0) -> None:
        """A new bar for epoch ``epoch`` (from 0) of ``steps`` steps, ``done`` of them before."""
        if self._task is not None:
            self._bar.remove_task(self._task)
        self._task = self._bar.add_task(f"epoch {epoch + 1}/{self.epochs} {stage}", total=steps, completed=done,
                                        loss=0.0, lasso=0.0, accuracy=0.0, speed=0.0)

    def step(self, *, loss: float, lasso: float, accuracy: float, speed: float) -> None:
        """One more step, and the figures of the epoch so far."""
        self._bar.update(self._task, advance=1, loss=loss, lasso=lasso, accuracy=accuracy, speed=speed)

    def epoch(self, record: Mapping[str, Any]) -> None:
        """An epoch is over: its line, and its events."""
        self.line(describe_epoch(record, self.epochs))
        if self.events is not None:
            self.events.write(record)


def describe_epoch(record: Mapping[str, Any], epochs: int) -> str:
    """The one line of an epoch's record (see ``loop.Trainer``)."""
    parts = [f"epoch {record['epoch'] + 1:>{len(str(epochs))}}/{epochs}", f"{record['stage']:<9}",
             f"loss {record['loss']:.3f}"]
    if record["stage"] == "warm-up":
        parts.append(f"lasso {record['lasso']:.2f}  masked norm {sum(record['masked_norms']):.2f}")
    parts.append(f"train {record['train_accuracy']:.1%}")
    if "test_accuracy" in record:
        parts.append(f"test {record['test_accuracy']:.1%}")
    if "test_accuracy_levels" in record:
        parts.append(f"(levels {' '.join(f'{value:.1%}' for value in record['test_accuracy_levels'])})")
    if "test_accuracy_unmasked" in record:
        parts.append(f"(all weights {record['test_accuracy_unmasked']:.1%})")
    parts.append(f"{record['samples_per_second']:.0f} seq/s  {record['seconds']:.1f} s")
    return "  ".join(parts)
