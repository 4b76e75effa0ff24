"""The info command: totals of the four networks and of a trained one."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import tiny

from sparse_stgcn import Ensemble, compact, info, save
from sparse_stgcn.macs import count
from sparse_stgcn.sparsity import summary

TOTALS = {"stgcn": (3_098_832, 3_052_096, 5_697_615_360), "aagcn": (3_781_668, 3_419_168, 6_472_807_048),
          "ctrgcn": (1_446_672, 1_390_480, 2_971_615_360), "dgstgcn": (1_701_172, 1_609_676, 2_496_195_360)}


def numbers(line: str) -> list[int]:
    return [int(n.replace(",", "")) for n in re.findall(r"(?<![\d.])\d[\d,]*(?![\d.%])", line)]


def test_all_four(capsys: pytest.CaptureFixture[str]) -> None:
    assert info.main([]) == 0
    reports = capsys.readouterr().out.strip().split("\n\n")
    assert [report.split()[0] for report in reports] == list(TOTALS)
    for report, (parameters, maskable, work) in zip(reports, TOTALS.values(), strict=True):
        lines = report.splitlines()
        assert numbers(lines[1])[0] == parameters
        assert numbers(lines[2])[:2] == [maskable, maskable]
        assert numbers(lines[3])[0] == work
        rows = [numbers(line) for line in lines[5:]]
        assert [row[0] for row in rows[:10]] == list(range(1, 11))
        assert sum(row[-4] for row in rows) == maskable
        assert sum(row[-2] for row in rows) == work


def test_a_trained_network(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = compact(tiny.model(0.8))
    save(model, tmp_path / "model.safetensors")
    for source in (tmp_path, tmp_path / "model.safetensors"):
        assert info.main([str(source), "--frames", "8", "--persons", "1"]) == 0
        lines = capsys.readouterr().out.splitlines()
        kept, work = summary(model), count(model, 8, 1)
        assert numbers(lines[1])[:2] == [kept.parameters, kept.kept_parameters]
        assert numbers(lines[3])[:2] == [work.dense, work.effective]
        assert sum(numbers(line)[-3] for line in lines[5:]) == kept.kept


def test_sparsity_of_a_new_network(capsys: pytest.CaptureFixture[str]) -> None:
    assert info.main(["--backbone", "stgcn", "--sparsity", "0.95"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 16
    maskable, kept = numbers(lines[2])[:2]
    assert kept / maskable == pytest.approx(0.05, abs=1e-3)
    assert numbers(lines[3])[1] < 0.06 * numbers(lines[3])[0]


def test_an_ensemble_is_described_member_by_member(tmp_path, capsys):
    save(Ensemble([tiny.model(), tiny.model(0.5)]), tmp_path / "ensemble.safetensors")
    for source in (tmp_path / "ensemble.safetensors", tmp_path):
        assert info.main([str(source)]) == 0
        assert capsys.readouterr().out.count("parameters") == 2
