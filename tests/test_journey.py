"""A new user's walk: the commands and the Python of the guide run in order, with fewer epochs and narrower networks."""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
import tyro

from sparse_stgcn import cli

ROOT = Path(__file__).resolve().parent.parent
PAGES = {name: (ROOT / name).read_text(encoding="utf-8") for name in
         ("README.md", *(f"docs/{page}.md" for page in ("guide", "own-data", "experiments", "prediction", "benchmarks")))}
COMMAND = re.compile(r"^(?:sparse-stgcn|python -m sparse_stgcn)(?:[. ]|$)")

# What makes a command small; a flag that is given twice has its last value.
SMALL = {"train": "--epochs 2 --warmup-epochs 1 --base-channels 8 --clip-len 8 --eval-clips 1 --batch-size 8 "
                  "--lr-reference-batch 8 --workers 0 --threads 1 --device cpu --block 4x1",
         "evaluate": "--clips 2 --workers 0 --device cpu", "ensemble": "--clips 1 --workers 0 --device cpu",
         "bench": "--rounds 1 --frames 8 --persons 1"}
SLOW = ("bench", "export")  # seconds each; they have tests of their own


def blocks(page: str) -> Iterator[tuple[str, str]]:
    """(language, text) of the fenced blocks of a page."""
    yield from re.findall(r"^```(\w+)\n(.*?)^```", PAGES[page], re.DOTALL | re.MULTILINE)


def commands(text: str) -> Iterator[list[str]]:
    """Verb ("" for none) and arguments of every command of this package in a block of shell text."""
    for part in re.split("&&|\n", text):
        if COMMAND.match(part.strip()):
            words = shlex.split(part, comments=True)
            yield [words[2].removeprefix("sparse_stgcn").lstrip("."), *words[3:]] if words[0] == "python" else words[1:]


def commands_of(page: str) -> list[list[str]]:
    return [command for language, text in blocks(page) if language == "bash" for command in commands(text)]


@pytest.mark.parametrize("page", PAGES)
def test_flags_exist(page: str, monkeypatch: pytest.MonkeyPatch) -> None:
    class Parsed(Exception):
        pass

    parse = tyro.cli

    def stop(*args: Any, **kwargs: Any) -> None:
        parse(*args, **kwargs)
        raise Parsed

    monkeypatch.setattr(tyro, "cli", stop)
    found = [words for words in commands_of(page) if words[0]]
    assert found
    for verb, *arguments in found:
        assert verb in cli.VERBS
        if "--resume" in arguments:
            continue  # reads the run before the flags
        try:
            with pytest.raises(Parsed):
                import_module(f"sparse_stgcn.{verb}").main(arguments)
        except SystemExit:
            pytest.fail(f"{page}: not accepted: {verb} {' '.join(arguments)}")


def run_page(page: str, skip: tuple[str, ...]) -> list[str]:
    """Run the commands and the Python of a page in this directory; the verbs that ran."""
    ran = []
    for language, text in blocks(page):
        if language == "python":
            exec(compile(text, page, "exec"), {})
            continue
        if language == "yaml":
            name = re.search(r"^name: (\w+)$", text, re.MULTILINE)[1]  # type: ignore[index]
            Path(f"{name}.yaml").write_text(text)
            continue
        for verb, *arguments in commands(text) if language == "bash" else ():
            if verb in skip:
                continue
            small = [] if "--resume" in arguments else shlex.split(SMALL.get(verb, ""))
            if verb == "train" and "--data" not in arguments and small:
                small += ["--sequences", "39"]
            assert cli.main([verb, *arguments, *small] if verb else []) == 0, (verb, arguments)
            ran.append(verb)
    return ran


@pytest.fixture
def workplace(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("SPARSE_STGCN_DATA", str(tmp_path))
    (tmp_path / "experiments").symlink_to(ROOT / "experiments")
    return tmp_path


@pytest.mark.filterwarnings("ignore:block .* keeps")
def test_guide(workplace: Path) -> None:
    pytest.importorskip("matplotlib")
    ran = run_page("docs/guide.md", SLOW)
    assert {"", "train", "convert", "evaluate", "ensemble", "fuse", "info", "sweep", "predict", "plot", "report"} == set(ran)
    for name in ("runs/s95/model.safetensors", "runs/levels/ensemble.safetensors", "runs/levels/confidence.png", "fused.npz"):
        assert (workplace / name).stat().st_size > 0


@pytest.mark.filterwarnings("ignore:block .* keeps")
def test_own_joints(workplace: Path) -> None:
    import numpy as np

    for name in ("left", "right"):
        (workplace / "reach" / name).mkdir(parents=True)
        for i in range(8):
            clip = np.random.default_rng(i).normal(size=(12, 4, 3)).astype(np.float32)
            np.save(workplace / "reach" / name / f"{i}.npy", clip)
    assert run_page("docs/own-data.md", ()) == ["convert", "train"]
    from sparse_stgcn import load

    assert load(workplace / "runs/reach/model.safetensors").backbone.skeleton.joints == ("chest", "shoulder", "elbow", "wrist")


@pytest.mark.slow
def test_bench_of_the_guide(workplace: Path) -> None:
    line = next(words for words in commands_of("docs/guide.md") if words[0] == "bench")
    assert cli.main([*line, *shlex.split(SMALL["bench"])]) == 0
