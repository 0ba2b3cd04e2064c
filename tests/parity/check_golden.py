"""Run every case of a golden folder on several numbers of ranks and compare with the reference.

python tests/parity/check_golden.py --golden tests/golden --ranks 1 2 3 4
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from ltx_sp.parallel.mesh import Mesh
from tests.parity.golden import Row, find_files, run_file
from tests.support.ranks import run_ranks


def run_all(rank: int, num_ranks: int, folder: str) -> list[Row]:
    """Run every case of the folder on this rank's part of the mesh. Collective."""
    mesh = Mesh.alone() if num_ranks == 1 else Mesh.of_group(None, torch.device("cpu"))
    return [row for checkpoint, io, kind in find_files(Path(folder)) for row in run_file(checkpoint, io, kind, mesh)]


def main() -> int:
    """Print one line per case; return 1 if any is out of tolerance or ranks disagree on the audio."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--golden", type=Path, required=True, metavar="DIR", help="folder in the golden format")
    parser.add_argument("--ranks", type=int, nargs="+", default=[1], metavar="N", help="numbers of ranks (default 1)")
    arguments = parser.parse_args()
    if not find_files(arguments.golden):
        print(f"{arguments.golden} holds no *_io.safetensors with golden cases.", file=sys.stderr)
        return 2
    failures = cases = 0
    for num_ranks in arguments.ranks:
        by_rank = run_ranks(run_all, num_ranks, str(arguments.golden), timeout=3600)
        for rows in zip(*by_rank, strict=True):
            worst = max(rows, key=lambda row: (not row.passed, row.video, row.audio or 0.0))
            agreed = all(row.outputs == rows[0].outputs for row in rows)
            print(worst if agreed else f"{worst}  ranks disagree on the audio", flush=True)
            failures += not (worst.passed and agreed)
            cases += 1
    print(f"{cases - failures} of {cases} passed")
    return 1 if failures else 0


if __name__ == "__main__":
    raise SystemExit(main())
