"""Record a window of denoising steps with torch.profiler: one Chrome trace per rank, with or without a GPU.

    python profiling/trace.py traces --ranks 2 -- --profile-steps 3-4 --checkpoint-path ltx-2.3.safetensors ...

What follows -- are the arguments of ltx_sp.generate, --profile-steps A-B among them: the steps to record, counted from
1 over all stages. The files open in Perfetto; profiling/kernels.py makes tables of them.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from torch.profiler import ProfilerActivity, profile

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from ltx_sp.parallel.mesh import environment_rank

_AS_RANK = "--as-rank"  # set for the processes that torchrun starts


class TorchWindow:
    """Records what lies between ``start`` and ``stop``, for ``ltx_sp.generate.main(argv, window=...)``.

    Args:
        path: of the trace, .json or .json.gz.
        with_host: on CUDA also record the operations on the host, which slows them down: gaps between kernels are then
            the profiler's in part.
    """

    def __init__(self, path: Path, *, with_host: bool = False):
        self._path, self._on_gpu = path, torch.cuda.is_available()
        activities = [ProfilerActivity.CUDA] if self._on_gpu else []
        self._profile = profile(
            activities=activities + ([ProfilerActivity.CPU] if with_host or not self._on_gpu else [])
        )

    def start(self) -> None:
        """Blocks the host until what was under way is done, so that it stays outside."""
        self._wait()
        self._profile.start()

    def stop(self) -> None:
        """Write the trace. Blocks the host."""
        self._wait()
        self._profile.stop()
        self._profile.export_chrome_trace(str(self._path))

    def _wait(self) -> None:
        if self._on_gpu:
            torch.cuda.synchronize()


def trace_path(folder: Path, rank: int) -> Path:
    """Where a rank's trace goes."""
    return folder / f"rank{rank}.json.gz"


def run_rank(folder: Path, arguments: Sequence[str], *, with_host: bool) -> int:
    """Generate on this rank, and record the window; the exit code is that of ``ltx_sp.generate``."""
    from ltx_sp import generate  # takes seconds, and who launches the ranks does not need it

    main: Callable[..., int] = generate.main
    return main(arguments, window=TorchWindow(trace_path(folder, environment_rank()), with_host=with_host))


def launch(folder: Path, num_ranks: int, arguments: Sequence[str], *, with_host: bool) -> int:
    """Start the ranks with torchrun and wait for them. Return the exit code: not 0 if a trace is missing."""
    folder.mkdir(parents=True, exist_ok=True)
    paths = [trace_path(folder, rank) for rank in range(num_ranks)]
    for path in paths:
        path.unlink(missing_ok=True)  # or an old one would pass for this run's
    own = [str(Path(__file__).resolve()), str(folder), _AS_RANK, *(["--host"] if with_host else [])]
    torchrun = ["torch.distributed.run", "--standalone", f"--nproc_per_node={num_ranks}"]
    threads = os.environ.get("OMP_NUM_THREADS") or str(max(1, (os.cpu_count() or 1) // num_ranks))
    ended = subprocess.run(
        [sys.executable, "-m", *torchrun, *own, "--", *arguments],
        env=os.environ | {"OMP_NUM_THREADS": threads},
        check=False,
    )
    if ended.returncode:
        return ended.returncode
    missing = [path.name for path in paths if not path.exists()]
    if missing:
        print(
            f"trace: the run ended well without {', '.join(missing)}. Give --profile-steps steps that the run has.",
            file=sys.stderr,
        )
        return 1
    print(f"trace: {num_ranks} files in {folder}. python profiling/kernels.py {' '.join(map(str, paths))}")
    return 0


def main(argv: Sequence[str] | None = None) -> int:
    """Record, or be one of the ranks that are recorded."""
    words = list(sys.argv[1:] if argv is None else argv)
    split = words.index("--") if "--" in words else len(words)
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, usage="%(prog)s DIR [options] -- ..."
    )
    parser.add_argument("folder", type=Path, metavar="DIR", help="where the traces go")
    ranks = torch.cuda.device_count() or 1
    parser.add_argument(
        "--ranks", type=int, default=ranks, metavar="N", help="processes on this host (default: as many as GPUs, or 1)"
    )
    parser.add_argument("--host", action="store_true", help="with a GPU, record the operations on the host too")
    parser.add_argument(_AS_RANK, action="store_true", help=argparse.SUPPRESS)
    given, arguments = parser.parse_args(words[:split]), words[split + 1 :]
    if given.ranks < 1:
        parser.error(f"--ranks {given.ranks} must be 1 or more")
    if not any(word.partition("=")[0] == "--profile-steps" for word in arguments):
        parser.error("the arguments after -- need --profile-steps A-B: which steps to record, counted from 1")
    if given.as_rank:
        return run_rank(given.folder, arguments, with_host=given.host)
    return launch(given.folder, given.ranks, arguments, with_host=given.host)


if __name__ == "__main__":
    raise SystemExit(main())
