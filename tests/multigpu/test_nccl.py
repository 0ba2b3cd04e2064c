"""Two or more CUDA devices over NCCL. Oracle: the golden files."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from ltx_sp.parallel.mesh import Mesh, resolve_device, start, start_store
from tests.parity.golden import Row, find_files, run_file
from tests.support.ranks import run_ranks


def _run(rank: int, num_ranks: int, folder: str) -> list[Row]:
    torch.backends.cuda.matmul.allow_tf32 = False
    device = resolve_device("cuda")
    with start(device, start_store()) as mesh:
        assert isinstance(mesh, Mesh)
        return [
            row for checkpoint, io, kind in find_files(Path(folder)) for row in run_file(checkpoint, io, kind, mesh)
        ]


@pytest.mark.parametrize("num_ranks", [2, 3, 4])
def test_golden_cases_over_nccl(golden: Path, num_ranks: int) -> None:
    if torch.cuda.device_count() < num_ranks:
        pytest.skip(f"needs {num_ranks} CUDA devices")
    for rows in run_ranks(_run, num_ranks, str(golden / "transformer"), timeout=300, init_group=False):
        assert [str(row) for row in rows if max(row.video, row.audio or 0) > 10 * row.tolerance] == []
