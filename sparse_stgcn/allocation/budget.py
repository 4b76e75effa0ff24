"""Budget: what a network may cost, as the command line writes it: 500kB, 2ms, 5% or "1 point"."""
from __future__ import annotations

import re
from dataclasses import dataclass, field

from ..errors import UserError

__all__ = ["Budget"]

# unit -> (what is limited, how many of its basic unit)
UNITS: dict[str, tuple[str, float]] = {
    "%": ("weights", 0.01), "B": ("bytes", 1.0), "kB": ("bytes", 1e3), "MB": ("bytes", 1e6), "KiB": ("bytes", 2.0**10),
    "MiB": ("bytes", 2.0**20), "us": ("seconds", 1e-6), "ms": ("seconds", 1e-3), "s": ("seconds", 1.0),
    "point": ("points", 0.01), "points": ("points", 0.01)}
_TEXT = re.compile(r"\s*([0-9]*\.?[0-9]+(?:[eE][-+]?[0-9]+)?)\s*([^\s0-9.]+)\s*")


@dataclass(frozen=True)
class Budget:
    """A limit on one cost.

    Attributes:
        kind: ``weights``: kept over all maskable weights; ``bytes``: size of the checkpoint file; ``seconds``: latency of
            optimised inference, one sample; ``points``: top-1 accuracy lost against the dense network.
        value: the limit, as a fraction, in bytes, in seconds, or as a fraction (one point is 0.01).
        text: as it was written.
        option: the flag that set it.
    """

    kind: str
    value: float
    text: str
    option: str = field(default="--budget", repr=False)

    @classmethod
    def parse(cls, text: str) -> Budget:
        """The budget of a text: a number above 0 and a unit.

        Raises:
            UserError: no such unit, or a number out of range.

        >>> Budget.parse("500 kB")
        Budget(kind='bytes', value=500000.0, text='500 kB')
        """
        found = _TEXT.fullmatch(text)
        if not found or found[2] not in UNITS:
            raise UserError(f'Expected --budget to be a number and one of {", ".join(UNITS)}: 500kB, 2ms, 5% or "1 point". '
                            f"Got {text!r}.")
        kind, unit = UNITS[found[2]]
        value = float(found[1]) * unit
        if value <= 0 or (kind in ("weights", "points") and value >= 1):
            limit = " and below 100" if kind in ("weights", "points") else ""
            raise UserError(f"Expected --budget above 0{limit}. Got {text!r}.")
        return cls(kind, value, text)

    def format(self, value: float) -> str:
        """A value of this kind in the unit that people read it in."""
        return {"weights": f"{100 * value:.3g} %", "bytes": f"{value / 1e3:,.1f} kB", "seconds": f"{1e3 * value:.3g} ms",
                "points": f"{100 * value:.3g} points"}[self.kind]
