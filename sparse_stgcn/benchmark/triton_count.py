"""Counts what the Triton kernels are made of: every variant a launch can ask for, compiled for GPUs that are not here.

    python -m sparse_stgcn.bench --what triton-count --part 1/4 --out results/triton_count.json

compiles a quarter of them (one takes about a second of one core) and adds its rows to the file; the table beside it is of all
rows that the file holds. Nothing is run: these are properties of machine code, not speeds.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import astuple, dataclass, fields
from pathlib import Path

from ..errors import UserError
from .measure import environment


@dataclass(frozen=True)
class Count:
    """The machine code of one variant on one architecture.

    Attributes:
        spilled: bytes of local memory of a thread. shared: bytes of a program.
        matrix: the newest matrix instruction, or None. copies: asynchronous copies (cp.async).
        bytes_of_x: of the widest load or copy of the gathered tensor (x, or dy for dX) by one thread; 0 where it has none.
    """

    kernel: str
    arithmetic: str
    variant: str
    capability: int
    registers: int
    spilled: int
    shared: int
    matrix: str | None
    copies: int
    bytes_of_x: int


def bytes_of_argument(ptx: str, index: int = 0) -> int:
    """Bytes of the widest global load, or asynchronous copy, whose address is made from a kernel's pointer argument."""
    made = set(re.findall(rf"ld\.param\.b64\s+(%rd\d+), \[\w+_param_{index}\]", ptx))
    sums = re.findall(r"^\s*(?:add|sub|mov|mad|selp|cvta)\S*\s+(%rd\d+), ([^;]*);", ptx, re.MULTILINE)
    before = -1
    while before != len(made):
        before = len(made)
        made |= {target for target, sources in sums if made.intersection(re.findall(r"%rd\d+", sources))}
    widths = [
        int(hexadecimal, 16) for address, hexadecimal in re.findall(r"cp\.async[^;]*, \[\s*(%rd\d+)[^\]]*\], (0x\w+)", ptx)
        if address in made
    ]  # fmt: skip
    widths += [
        int(count or 1) * int(bits) // 8
        for count, bits, address in re.findall(r"ld\.global\S*?(?:\.v(\d))?\.b(\d+)[^\[;]*\[\s*(%rd\d+)", ptx)
        if address in made
    ]
    return max(widths, default=0)


def part_of(text: str) -> tuple[int, int]:
    """(1, 4) of "1/4".

    Raises:
        UserError: it is no such share.
    """
    found = re.fullmatch(r"(\d+)/(\d+)", text)
    part, parts = (int(found[1]), int(found[2])) if found else (0, 0)
    if not 1 <= part <= parts:
        raise UserError(f"Expected --part to be a share such as 1/4. Got {text!r}.")
    return part, parts


def counts(part: int = 1, parts: int = 1) -> Iterator[Count]:
    """Of every ``parts``-th (variant, architecture), beginning with number ``part``.

    Raises:
        UserError: triton, or the cuobjdump that it ships, is not there.
    """
    try:
        from .triton_code import CAPABILITIES, TOOL, compiled, every_variant
    except ImportError as error:
        raise UserError(f"Expected triton to be installed. Got: {error}; pip install triton.") from error
    if not TOOL.exists():
        raise UserError(f"Expected triton to ship cuobjdump. Got none at {TOOL}.")
    every = [(variant, capability) for variant in every_variant() for capability in CAPABILITIES]
    for variant, capability in every[part - 1 :: parts]:
        code = compiled(variant, capability)
        yield Count(
            variant.kernel, variant.arithmetic, str(variant), capability, code.registers, code.spilled, code.shared,
            code.matrix, code.count(r"cp\.async\.c[ag]"), bytes_of_argument(code.ptx),
        )  # fmt: skip


def load(path: Path) -> list[Count]:
    """The rows of a file, none where there is no file yet."""
    if not path.exists():
        return []
    report = json.loads(path.read_text(encoding="utf-8"))
    return [Count(**dict(zip(report["columns"], row, strict=True))) for row in report["rows"]]


def write(path: Path, rows: Iterable[Count]) -> list[Count]:
    """Rows in place of those of the same variants in the file, and the table of all beside it; returns all."""
    import triton

    merged = {(row.variant, row.capability): row for row in (*load(path), *rows)}
    every = [merged[key] for key in sorted(merged)]
    kept = {name: value for name, value in environment().items() if name in ("commit", "date")}
    head = {"triton": triton.__version__, **kept, "columns": [field.name for field in fields(Count)]}
    lines = ",\n  ".join(json.dumps(astuple(row)) for row in every)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(head, indent=1)[:-2] + ',\n "rows": [\n  ' + lines + "\n ]\n}\n", encoding="utf-8")
    path.with_suffix(".md").write_text(markdown(every) + "\n", encoding="utf-8")
    return every


def markdown(rows: Sequence[Count]) -> str:
    """The totals, and one line for every kernel, arithmetic and architecture."""
    spilled, matrix = sum(row.spilled > 0 for row in rows), sum(row.matrix is not None for row in rows)
    lines = [
        f"Triton kernels compiled: {len(rows)}; with registers spilled: {spilled}; with matrix instructions: {matrix}. "
        "Machine code, not run.",
        "",
        "| kernel | arithmetic | sm | compiled | spilled | most registers | most shared KB | matrix instructions | "
        "with cp.async | bytes of x at a time: variants |",
        "| --- | --- | ---: | ---: | ---: | ---: | ---: | --- | ---: | --- |",
    ]
    for key in dict.fromkeys((row.kernel, row.arithmetic, row.capability) for row in rows):
        here = [row for row in rows if (row.kernel, row.arithmetic, row.capability) == key]
        names, widths = ([getattr(row, name) for row in here] for name in ("matrix", "bytes_of_x"))
        matrices = [f"{name}: {names.count(name)}" for name in sorted({name for name in names if name})]
        cells = [
            *key, len(here), sum(row.spilled > 0 for row in here), max(row.registers for row in here),
            f"{max(row.shared for row in here) / 1024:.0f}", ", ".join(matrices) or "none",
            sum(row.copies > 0 for row in here),
            ", ".join(f"{width}: {widths.count(width)}" for width in sorted(set(widths), reverse=True)),
        ]  # fmt: skip
        lines.append("| " + " | ".join(map(str, cells)) + " |")
    return "\n".join(lines)
