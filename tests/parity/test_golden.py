"""Oracle: the reference implementation's outputs, on every number of ranks up to the number of heads."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from ltx_sp.parallel.mesh import Mesh
from tests.parity.golden import Row, find_files, run_file
from tests.support.ranks import run_ranks


def _run(rank: int, num_ranks: int, folder: str, version: str) -> list[Row]:
    mesh = Mesh.alone() if num_ranks == 1 else Mesh.of_group(None, torch.device("cpu"))
    files = [found for found in find_files(Path(folder)) if version in found[1].name]
    return [row for checkpoint, io, kind in files for row in run_file(checkpoint, io, kind, mesh)]


@pytest.mark.parametrize("version", ["2.0", "2.3", "2.5"])
@pytest.mark.parametrize("num_ranks", [1, 2, 3, 4])
def test_every_case_equals_the_reference(golden: Path, version: str, num_ranks: int) -> None:
    by_rank = run_ranks(_run, num_ranks, str(golden / "transformer"), version, timeout=280)
    assert len(by_rank[0]) == {"2.0": 38, "2.3": 38, "2.5": 40}[version]
    failed = [str(row) for rows in by_rank for row in rows if not row.passed]
    assert not failed
    for rows in zip(*by_rank, strict=True):
        assert len({row.outputs for row in rows}) == 1, f"ranks disagree on {rows[0].case}"


def _run_guided(rank: int, num_ranks: int, folder: str, guidance: int) -> list[Row]:
    mesh = Mesh.of_group(None, torch.device("cpu")).with_guidance(guidance)
    found = [found for found in find_files(Path(folder)) if "2.3-sampling" in found[1].name]
    return [
        row for checkpoint, io, kind in found for row in run_file(checkpoint, io, kind, mesh) if "guided" in row.case
    ]


@pytest.fixture(scope="module")
def alone(golden: Path) -> list[Row]:
    """The guided cases on one rank."""
    rows: list[Row] = run_ranks(_run_guided, 1, str(golden / "transformer"), 1, timeout=280)[0]
    return rows


@pytest.mark.parametrize(("num_ranks", "guidance"), [(4, 1), (4, 2), (4, 4), (3, 3)])
def test_passes_dealt_over_ranks_equal_the_reference_and_one_rank(
    golden: Path, alone: list[Row], num_ranks: int, guidance: int
) -> None:
    """Passes by themselves and in batches; with three ranks for four passes, one has two of them."""
    by_rank = run_ranks(_run_guided, num_ranks, str(golden / "transformer"), guidance, timeout=280)
    assert {row.case.rpartition("/")[2] for row in by_rank[0]} == {
        "guided", "guided_bs4", "guided_i2v", "res2s_guided"
    }  # fmt: skip
    failed = [str(row) for rows in by_rank for row in rows if not row.passed]
    assert not failed
    for rows, one in zip(zip(*by_rank, strict=True), alone, strict=True):
        assert len({row.outputs for row in rows}) == 1, f"ranks disagree on {rows[0].case}"
        assert (rows[0].case, rows[0].strategy) == (one.case, one.strategy)
        for ours, theirs in zip(rows[0].outputs, one.outputs, strict=True):
            x, y = (np.frombuffer(output, dtype=np.float32) for output in (ours, theirs))
            assert np.abs(x - y).max() <= 1e-5 * np.abs(y).max(), one.case
