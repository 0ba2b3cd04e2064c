"""Time loading of weights beside its ceilings and beside how others do it, and hold it to limits.

    python profiling/load.py

Writes random bf16 checkpoints, as one file and as shards. Every run is a fresh process with one thread of torch's own,
and ends when every page of what it loaded has been touched. Contestants take turns, in a new order every round; a ratio
is the median of the ratios within the rounds. Returns 1 where a limit is broken.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import functools
import importlib.metadata
import importlib.util
import random
import statistics
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from profiling import load_baselines as others
from profiling import load_checkpoints as files
from profiling.load_baselines import Case, Contestant, Sample
from profiling.load_clock import header, huge_page_mode
from tests.support.ranks import run_ranks

FORMS = {"file": (100,), "shards": files.UNEVEN}
NUM_SMALL = 40_000
SPARSE_BYTES = 4 * 2**30
RIVALS = {"fastsafetensors": others.fastsafetensors_load, "runai_model_streamer": others.runai_load}
TIMEOUT = 900.0


@dataclasses.dataclass(frozen=True)
class Run:
    """One run, its ranks taken together: the last to end, the largest peak, the sum of what was fetched.

    Args:
        others: how many cores other processes used meanwhile.
    """

    seconds: float
    others: float
    stall: float
    peak_bytes: int
    fetched_bytes: int
    resident: float

    @staticmethod
    def of(samples: Sequence[Sample]) -> Run:
        seconds = max(sample.ended for sample in samples) - min(sample.began for sample in samples)
        others = max(sample.busy for sample in samples) - sum(sample.own for sample in samples)
        return Run(
            seconds,
            max(0.0, others / seconds),
            max(sample.stall for sample in samples),
            max(sample.peak_bytes for sample in samples),
            sum(sample.fetched_bytes for sample in samples),
            samples[0].resident,
        )


@dataclasses.dataclass(frozen=True)
class Check:
    """Figures of all rounds, and what their median may be at most."""

    what: str
    values: tuple[float, ...]
    limit: float

    @property
    def median(self) -> float:
        return statistics.median(self.values)

    @property
    def passed(self) -> bool:
        return self.median <= self.limit

    def __str__(self) -> str:
        spread, verdict = f"{min(self.values):.3f} .. {max(self.values):.3f}", "pass" if self.passed else "FAIL"
        return f"    {self.what:58} {self.median:9.3f}   {spread:22} at most {self.limit:<6g} {verdict}"


def ratios(ours: Sequence[float], other: Sequence[float]) -> tuple[float, ...]:
    """Ours by the other's of the same round; by the only one where the other ran once."""
    if len(other) == 1:
        return tuple(value / other[0] for value in ours)
    return tuple(a / b for a, b in zip(ours, other, strict=True))


def clone_limit(huge_pages: str) -> float:
    """What loading to the host may take of what ``load_file`` and a clone take, by the mode of huge pages.

    Where the kernel gives them to everybody, most of the difference is gone.
    """
    return 0.90 if huge_pages == "always" else 0.25


def exit_code(checks: Sequence[Check]) -> int:
    """1 where a limit is broken, or where nothing was held to one."""
    return 0 if checks and all(check.passed for check in checks) else 1


class Bench:
    """The checkpoints, the rounds, and what has been checked so far.

    Args:
        folder: where the checkpoints are written.
    """

    def __init__(self, args: argparse.Namespace, folder: Path):
        self.args, self.folder, self.checks = args, folder, list[Check]()
        self._order, self._verified = random.Random(0), set[tuple[str, Path, int]]()

    def checkpoint(self, form: str) -> Path:
        """The checkpoint as one file or as shards, in the page cache as far as there is room. Blocks the host."""
        shapes = files.model_shapes(int(self.args.size_gib * 2**30))
        path = files.write_checkpoint(self.folder / f"{form}-{self.args.size_gib:g}", shapes, FORMS[form])
        files.warm(path)
        return path

    def check(self, what: str, values: Sequence[float], limit: float) -> None:
        """Hold the median of some figures to a limit, and print both."""
        self.checks.append(Check(what, tuple(values), limit))
        print(self.checks[-1], flush=True)

    def ratio(self, runs: Mapping[str, Sequence[Run]], name: str, other: str, limit: float) -> None:
        """Hold one contestant's time to a multiple of another's."""
        mine, theirs = ([run.seconds for run in runs[key]] for key in (name, other))
        self.check(f"{name} / {other}", ratios(mine, theirs), limit)

    def cases(self) -> list[tuple[str, int]]:
        """Both forms with one rank, one of them with more."""
        forms, ranks = self.args.forms, sorted(self.args.ranks)
        return [(form, ranks[0]) for form in forms] + [(forms[-1], num_ranks) for num_ranks in ranks[1:]]

    def rivals(self) -> dict[str, Contestant]:
        """The optional contestants that are asked for and there."""
        return {name: rival for name, rival in RIVALS.items() if self.args.rivals and is_there(name)}

    def compare(
        self,
        title: str,
        contestants: Mapping[str, Contestant],
        case: Case,
        *,
        most_rounds: int | None = None,
        once: Sequence[str] = (),
    ) -> dict[str, list[Run]]:
        """Let the contestants take turns and print their times; those named in ``once`` run in one round only."""
        for name, contestant in contestants.items():
            if name not in once and (name, case.path, case.num_ranks) not in self._verified:
                self._run(name, contestant, case, verify=True)
        runs: dict[str, list[Run]] = {name: [] for name in contestants}
        for number in range(self.args.rounds if most_rounds is None else min(self.args.rounds, most_rounds)):
            turns = [name for name in contestants if number == 0 or name not in once]
            for name in self._order.sample(turns, len(turns)):
                runs[name].append(self._run(name, contestants[name], case, verify=name in once))
        everyone = [run for each in runs.values() for run in each]
        resident, used = ([getattr(run, field) for run in everyone] for field in ("resident", "others"))
        num_bytes, num_files = files.checkpoint_bytes(case.path), len(files.checkpoint_files(case.path))
        print(
            f"\n{title}: {num_bytes / 2**30:.2f} GiB in {num_files} file(s), {case.num_ranks} rank(s), "
            f"{min(resident):.2f} .. {max(resident):.2f} of it in the page cache before; other processes used "
            f"{statistics.median(used):.2f} cores, at most {max(used):.2f}"
        )
        for name, each in runs.items():
            seconds = [run.seconds for run in each]
            median, spread = statistics.median(seconds), f"{min(seconds):.3f} .. {max(seconds):.3f} s"
            peak = max(run.peak_bytes for run in each) / 2**20
            print(f"    {name:58} {median:9.3f} s {spread:22} {num_bytes / median / 2**30:8.2f} GiB/s {peak:8.0f} MiB")
        return runs

    def _run(self, name: str, contestant: Contestant, case: Case, *, verify: bool) -> Run:
        samples = run_ranks(others.measure, case.num_ranks, contestant, case, verify, timeout=TIMEOUT, init_group=False)
        if verify and contestant is not others.copy_pinned:  # which copies nothing in particular
            self._verified.add((name, case.path, case.num_ranks))
            expected = files.file_digests(case.path)
            for sample in samples:
                if sample.digests is not None and (odd := expected.items() ^ sample.digests.items()):
                    self.check(f"{name}: tensors that differ from the file", [len({key for key, _ in odd})], 0)
        return Run.of(samples)


def to_host(bench: Bench) -> None:
    """To host memory of one's own, and mapped."""
    read, mapped = "ours, read", "ours, mapped"
    contestants: dict[str, Contestant] = {
        read: functools.partial(others.ours, mode="stream"),
        mapped: functools.partial(others.ours, mode="mmap"),
        "load_file + clone": others.load_and_clone,
        "read() into fresh huge pages": others.read_huge,
        **bench.rivals(),
    }
    for form, num_ranks in bench.cases():
        runs = bench.compare("to host memory", contestants, Case(bench.checkpoint(form), num_ranks))
        # Several ranks share the cores: plain reading then takes more than this limit of what cloning takes. What the
        # loader does on a host with several ranks, unless told otherwise, is to map.
        bench.ratio(runs, read if num_ranks == 1 else mapped, "load_file + clone", clone_limit(huge_page_mode()))
        bench.ratio(runs, read, "read() into fresh huge pages", 1.5)


def through_buffers(bench: Bench) -> None:
    """Through small buffers, nothing kept."""
    ring = "ours, ring of buffers"
    contestants: dict[str, Contestant] = {
        ring: others.ours_passing,
        "load_file + copy through 64 MiB": others.load_and_stage,
        "read() into one 16 MiB buffer": others.read_reused,
    }
    for form, num_ranks in bench.cases():
        runs = bench.compare("through small buffers", contestants, Case(bench.checkpoint(form), num_ranks, keeps=False))
        bench.ratio(runs, ring, "read() into one 16 MiB buffer", 1.25)
        if num_ranks == 1:  # of several, ours reads a stripe each, and load_file everything
            bench.ratio(runs, ring, "load_file + copy through 64 MiB", 0.9)


def stall(bench: Bench) -> None:
    """How long other Python threads stand still."""
    contestants: dict[str, Contestant] = {
        "ours, read": functools.partial(others.ours, mode="stream"),
        "ours, mapped": functools.partial(others.ours, mode="mmap"),
        "ours, ring of buffers": others.ours_passing,
    }
    case = Case(bench.checkpoint(bench.args.forms[-1]), ticking=True)
    runs = bench.compare("beside a thread that looks at the clock", contestants, case)
    for name, each in runs.items():
        bench.check(f"{name}: longest stall of another thread, ms", [run.stall * 1e3 for run in each], 60)


def stripes(bench: Bench) -> None:
    """How evenly ranks share the bytes."""
    for form in bench.args.forms:
        path = bench.checkpoint(form)
        source = others.source_of(path)
        print(f"\nstripes of {path.name}")
        for num_ranks in range(1, 9):
            cuts = [source.stripe(rank, num_ranks) for rank in range(num_ranks)]
            largest = max(end - begin for begin, end in cuts)
            bench.check(f"{num_ranks} rank(s): largest / mean", [largest * num_ranks / source.num_bytes], 1.02)


def memory(bench: Bench) -> None:
    """What streaming needs on the host, whatever the size."""
    sparse = files.write_sparse(bench.folder / "sparse.safetensors", SPARSE_BYTES)
    for path in (bench.checkpoint(bench.args.forms[-1]), sparse):
        case, contestants = Case(path, keeps=False), {"ours, ring of buffers": others.ours_passing}
        (runs,) = bench.compare("memory", contestants, case, most_rounds=1).values()
        bench.check("growth of resident memory, MiB", [run.peak_bytes / 2**20 for run in runs], 128)
    sparse.unlink()


def from_storage(bench: Bench) -> None:
    """From storage: times are told, what is fetched is limited."""
    contestants: dict[str, Contestant] = {
        "ours, read": functools.partial(others.ours, mode="stream"),
        "ours, mapped": functools.partial(others.ours, mode="mmap"),
        "ours, ring of buffers": others.ours_passing,
        "load_file + clone": others.load_and_clone,
        "read() into one 16 MiB buffer": others.read_reused,
    }
    path = bench.checkpoint(bench.args.forms[-1])
    for num_ranks in bench.args.ranks:
        runs = bench.compare("from storage", contestants, Case(path, num_ranks, cold=True), most_rounds=3)
        for name in contestants:
            if name.startswith("ours"):
                shares = [run.fetched_bytes / files.checkpoint_bytes(path) for run in runs[name]]
                bench.check(f"{name}: fetched by all ranks / checkpoint", shares, 1.05)


def small(bench: Bench) -> None:
    """Very many small parameters."""
    contestants: dict[str, Contestant] = {
        "ours, read": functools.partial(others.ours, mode="stream"),
        "load_file + load_state_dict(assign=True)": others.load_and_assign,
    }
    rival = "accelerate.load_checkpoint_in_model"
    if is_there("accelerate"):
        contestants[rival] = others.accelerate_load
    path = files.write_checkpoint(bench.folder / "small", files.small_shapes(NUM_SMALL), (1,) * 10)
    files.warm(path)
    runs = bench.compare(f"{NUM_SMALL} small parameters", contestants, Case(path), once=[rival])
    bench.ratio(runs, "ours, read", "load_file + load_state_dict(assign=True)", 0.5)
    if rival in runs:
        bench.ratio(runs, "ours, read", rival, 0.05)


def to_device(bench: Bench) -> None:
    """Onto a CUDA device, copies included; the goal is 0.8 of the slower of reading and copying."""
    name, copy, read = "ours, to the device", "copy from pinned memory", "read() into one 16 MiB buffer"
    contestants: dict[str, Contestant] = {
        name: functools.partial(others.ours, mode="stream"),
        "load_file + to(device)": others.load_and_move,
        copy: others.copy_pinned,
        read: others.read_reused,
        **bench.rivals(),
    }
    for form, num_ranks in bench.cases():
        path = bench.checkpoint(form)
        for is_cold in (False, True):
            case = Case(path, num_ranks, device="cuda", keeps=False, cold=is_cold)
            runs = bench.compare("to the device", contestants, case)
            slower = [max(a.seconds, b.seconds) for a, b in zip(runs[copy], runs[read], strict=True)]
            mine = [run.seconds for run in runs[name]]
            bench.check("ours / the slower of reading and copying", ratios(mine, slower), 1 / 0.8)


GROUPS: dict[str, Callable[[Bench], None]] = {
    "host": to_host,
    "stream": through_buffers,
    "stall": stall,
    "stripes": stripes,
    "memory": memory,
    "cold": from_storage,
    "small": small,
    "device": to_device,
}


def is_there(package: str) -> bool:
    """Whether a package can be imported; says so if not."""
    if importlib.util.find_spec(package) is not None:
        return True
    print(f"\n{package} is not installed and is left out")
    return False


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """Read the command line; stops the program where it cannot be done."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size-gib", type=float, default=2.0, metavar="G", help="of the checkpoint (default 2)")
    parser.add_argument("--rounds", type=int, default=5, metavar="N", help="turns of each contestant (default 5)")
    parser.add_argument("--ranks", type=int, nargs="+", default=[1, 2], metavar="P", help="default 1 2")
    parser.add_argument("--forms", nargs="+", choices=FORMS, default=list(FORMS), help="default both")
    parser.add_argument("--only", type=lambda text: text.split(","), metavar="A,B", help=f"of {', '.join(GROUPS)}")
    parser.add_argument("--folder", type=Path, help="keep the checkpoints there, and use those that are there")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu", help="cuda adds the group device")
    parser.add_argument("--rivals", action="store_true", help="time fastsafetensors and runai-model-streamer too")
    args = parser.parse_args(argv)
    args.only = args.only or [name for name in GROUPS if name != "device" or args.device == "cuda"]
    if unknown := set(args.only) - set(GROUPS):
        parser.error(f"--only knows {', '.join(GROUPS)}, not {', '.join(sorted(unknown))}")
    if args.size_gib <= 0 or args.rounds < 1 or min(args.ranks) < 1:
        parser.error("--size-gib, --rounds and --ranks must be positive")
    if "device" in args.only and args.device != "cuda":
        parser.error("the group device needs --device cuda")
    if args.device == "cuda" and torch.cuda.device_count() < max(args.ranks):
        parser.error(f"--ranks {max(args.ranks)} needs as many CUDA devices; there are {torch.cuda.device_count()}")
    return args


def main() -> int:
    """Print the report; return 1 if a limit is broken."""
    args = parse(None)
    print(header(args.device), flush=True)
    with contextlib.ExitStack() as stack:
        folder = args.folder or Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="load-")))
        folder.mkdir(parents=True, exist_ok=True)
        bench = Bench(args, folder)
        for name in args.only:
            GROUPS[name](bench)
    broken = [check for check in bench.checks if not check.passed]
    print(f"\n{len(bench.checks)} limits, {len(broken)} broken", *broken, sep="\n")
    return exit_code(bench.checks)


if __name__ == "__main__":
    raise SystemExit(main())
