"""Point and front: the networks that were looked at, and those that no other one beats in everything."""
from __future__ import annotations

import csv
import io
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields
from typing import Any

__all__ = ["Point", "front", "table", "to_csv"]


@dataclass(frozen=True)
class Point:
    """One choice of live blocks, with what it costs and how good it is expected to be.

    Attributes:
        rule: how the densities came about.
        kept: live weights over maskable ones.
        bytes, multiply_adds, seconds: of the checkpoint, and of one sample; seconds is None without a latency table.
        damage: expected rise of the loss, sum over layers of s_l (1 / d_l - 1), see ``sensitivity``.
        loss: of a short trial, mean over its second half; None where there was none.
        lost: top-1 accuracy lost against dense on held-out training sequences, as a fraction; None where not measured.
        chosen: this is the one that was trained.
    """

    rule: str
    kept: float
    bytes: float
    multiply_adds: float
    seconds: float | None
    damage: float
    loss: float | None = None
    lost: float | None = None
    chosen: bool = False

    def costs(self) -> tuple[float, ...]:
        """What shall be small: weights, seconds (or multiply-adds without them) and damage."""
        return (self.kept, self.multiply_adds if self.seconds is None else self.seconds, self.damage)

    def to_dict(self) -> dict[str, Any]:
        """For JSON."""
        return asdict(self)


def front(points: Sequence[Point]) -> list[Point]:
    """The points that no other one equals or beats in every cost while it beats them in one, in their order."""
    def beats(a: Point, b: Point) -> bool:
        pairs = list(zip(a.costs(), b.costs(), strict=True))
        return all(x <= y for x, y in pairs) and any(x < y for x, y in pairs)

    return [point for point in points if not any(beats(other, point) for other in points)]


def to_csv(points: Sequence[Point]) -> str:
    """One row per point, the last column says whether it is on the front."""
    text, best = io.StringIO(), front(points)
    names = [field.name for field in fields(Point)]
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow([*names, "front"])
    for point in points:
        values = ["" if (value := getattr(point, name)) is None else value for name in names]
        writer.writerow([*values, point in best])
    return text.getvalue()


def table(points: Sequence[Point]) -> list[str]:
    """The points as lines of text, ascending in weights; * on the front, > the chosen one."""
    best = front(points)
    lines = [f"front       {'rule':<12}{'kept':>9}{'file':>12}{'mult-adds':>12}{'latency':>11}"
             f"{'damage':>10}{'trial':>8}{'lost':>8}"]
    for point in sorted(points, key=lambda p: (p.kept, p.rule)):
        mark = ">" if point.chosen else "*" if point in best else " "
        latency = "–" if point.seconds is None else f"{1e3 * point.seconds:.2f} ms"
        loss = "–" if point.loss is None else f"{point.loss:.3f}"
        lost = "–" if point.lost is None else f"{100 * point.lost:.1f}"
        lines.append(f"        {mark}   {point.rule:<12}{point.kept:>9.2%}{point.bytes / 1e3:>9,.0f} kB"
                     f"{point.multiply_adds / 1e6:>10,.1f} M{latency:>11}{point.damage:>10.3g}{loss:>8}{lost:>8}")
    return lines
