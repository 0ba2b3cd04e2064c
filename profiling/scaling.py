"""Predict how a request scales from 1 to 16 GPUs, for every guidance x token layout; or measure it where GPUs are.

    python profiling/scaling.py --link-gbps 300 --network-gbps 40 -- --height 768 --width 1280
    python profiling/scaling.py --measure -- --checkpoint-path ltx-2.3.safetensors --gemma-root gemma --prompt "..."

What follows -- are arguments of ltx_sp.generate. A prediction needs neither a GPU nor a checkpoint (without one the
model is the published 22B); it rests on what profiling/calibrate.py measured on one GPU, on counted operations and
bytes, and on link speeds that the calibration has or that are stated here.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from ltx_sp.arguments import Command, parse
from ltx_sp.cost import DEFAULT_MACHINE, Machine, Prediction
from ltx_sp.errors import LtxSpError, PlanError, RequestError
from ltx_sp.parallel.mesh import calibration_path, device_name
from ltx_sp.plan import Plan, make_plan
from ltx_sp.spec import ModelSpec
from ltx_sp.stage import Stage
from ltx_sp.weights.checkpoint import read_spec
from profiling.calibrate import Calibration, Link, read_calibration
from profiling.models import full_size

_PUBLISHED = Path("the published 22B model")  # stands for a checkpoint where none is given


@dataclasses.dataclass(frozen=True)
class Wires:
    """How ranks are connected; neighbouring ranks share a host.

    Args:
        exchange, gather: inside a host, for all-to-alls and for all-gathers.
        between: hosts, per GPU; None where that is not known.
    """

    per_host: int
    exchange: Link
    gather: Link
    between: Link | None

    def seconds(self, link: Link, num_bytes: float, num_calls: int, *, size: int, stride: int = 1) -> float:
        """How long the exchanges of an axis take.

        Args:
            num_bytes: that a rank receives, from all others alike.
            size, stride: of the axis: its ranks, and how far apart they are.

        Raises:
            RequestError: the axis reaches over several hosts and nothing says how fast that is.
        """
        if size == 1:
            return 0.0
        here = max(1, self.per_host // stride)
        if size <= here:
            return num_calls * link.latency + num_bytes / link.bytes_per_second
        if self.between is None:
            raise RequestError(
                f"{size * stride} GPUs are several hosts of {self.per_host}, and nothing says how fast these are "
                "connected. Give --network-gbps, or --gpus-per-host."
            )
        beyond = num_bytes * (size - here) / (size - 1)
        inside = (num_bytes - beyond) / link.bytes_per_second
        return num_calls * self.between.latency + max(inside, beyond / self.between.bytes_per_second)


@dataclasses.dataclass(frozen=True)
class Row:
    """One layout: seconds per step of each stage, where known, and of all denoising."""

    layout: tuple[int, int]
    steps: tuple[float, ...]
    seconds: float

    @property
    def num_gpus(self) -> int:
        return self.layout[0] * self.layout[1]


def step_seconds(stage: Stage, calibration: Calibration, wires: Wires) -> float:
    """Predict one step of a stage: of the ranks that take longest, nothing of an exchange hidden."""
    guidance, tokens = stage.layout
    attention_rate = calibration.attention_rate(sum(stage.token_shares))

    def hand_seconds(cost: Prediction) -> float:
        computing = (cost.flops - cost.attention_flops - cost.audio_flops) / calibration.product_flops
        computing += cost.attention_flops / attention_rate
        reading = cost.audio_bytes / calibration.read_bytes_per_second
        computing += max(cost.audio_flops / calibration.product_flops, reading)
        num_calls = cost.all_to_alls + cost.all_gathers
        exchanging = wires.seconds(wires.exchange, cost.received_bytes, num_calls, size=tokens)
        return computing + exchanging + wires.seconds(wires.gather, cost.x0_bytes, 1, size=guidance, stride=tokens)

    return max(map(hand_seconds, stage.predictions))


def layouts(command: Command, model: ModelSpec, num_gpus: int, machine: Machine = DEFAULT_MACHINE) -> Iterator[Plan]:
    """A plan for each layout that the request can have on so many GPUs, fewest ranks for guidance first.

    Args:
        machine: decides which passes share a batch.
    """
    seen = set()
    for guidance in range(1, num_gpus + 1):
        if num_gpus % guidance:
            continue
        settings = dataclasses.replace(command.settings, parallel=f"{guidance}x{num_gpus // guidance}")
        try:
            plan = make_plan(command.request, model, settings, num_gpus, machine)
        except PlanError:
            continue  # more ranks than passes or heads
        if plan.stages[0].layout not in seen:
            seen.add(plan.stages[0].layout)
            yield plan


def predict_rows(
    command: Command, model: ModelSpec, gpus: Sequence[int], calibration: Calibration, wires: Wires
) -> list[Row]:
    """Predict every layout on each number of GPUs.

    Raises:
        PlanError: the request itself does not fit the model.
    """
    make_plan(command.request, model, dataclasses.replace(command.settings, parallel="auto"))
    machine, rows = calibration.machine(wires.exchange), []
    for num_gpus in gpus:
        for plan in layouts(command, model, num_gpus, machine):
            steps = tuple(step_seconds(stage, calibration, wires) for stage in plan.stages)
            total = sum(stage.num_steps * step for stage, step in zip(plan.stages, steps, strict=True))
            rows.append(Row(plan.stages[0].layout, steps, total))
    return rows


def measure_rows(command: Command, model: ModelSpec, gpus: Sequence[int], arguments: Sequence[str]) -> list[Row]:
    """Generate once per layout, with torchrun, and read from the report how long denoising took.

    Raises:
        RequestError: a run failed.
    """
    rows = []
    for num_gpus in gpus:
        for plan in layouts(command, model, num_gpus):
            with tempfile.TemporaryDirectory() as folder:
                report = Path(folder) / "report.json"
                guidance, tokens = plan.stages[0].layout
                own = ["--parallel", f"{guidance}x{tokens}", "--report", str(report)]
                own += ["--output-path", str(Path(folder) / "clip.mp4")]
                torchrun = ["torch.distributed.run", "--standalone", f"--nproc_per_node={num_gpus}"]
                run = [sys.executable, "-m", *torchrun, "-m", "ltx_sp.generate", *arguments, *own]
                threads = os.environ.get("OMP_NUM_THREADS") or str(max(1, (os.cpu_count() or 1) // num_gpus))
                ended = subprocess.run(
                    run, env=os.environ | {"OMP_NUM_THREADS": threads}, stdout=sys.stderr, check=False
                )
                if ended.returncode:
                    raise RequestError(f"{' '.join(run)} ended with {ended.returncode}. Its own words are above.")
                seconds = denoising_seconds(report, plan)
            rows.append(Row(plan.stages[0].layout, (), seconds))
    return rows


def denoising_seconds(report: Path, plan: Plan) -> float:
    """Sum the stages of the last request in a report, on the device's clock where there is one."""
    phases = json.loads(report.read_text())["requests"][-1]["phases"]
    names = {stage.name for stage in plan.stages}
    times = [phase["device_seconds"] or phase["seconds"] for phase in phases if phase["phase"] in names]
    if not times:
        raise RequestError(f"The report has none of the phases {', '.join(sorted(names))}.")
    return float(sum(times))


def table(rows: Sequence[Row]) -> str:
    """The rows as Markdown; the fastest layout of each number of GPUs is in bold."""
    num_stages = max((len(row.steps) for row in rows), default=0)
    heads = ["GPUs", "guidance x tokens", *(f"step of stage {number + 1}, ms" for number in range(num_stages))]
    heads += ["denoising, s", "speed-up", "efficiency"]
    lines = [f"| {' | '.join(heads)} |", f"|{'--:|' * len(heads)}"]
    base = rows[0]
    for row in rows:
        fastest = min(other.seconds for other in rows if other.num_gpus == row.num_gpus)
        gain = base.seconds / row.seconds
        cells = [str(row.num_gpus), f"{row.layout[0]} x {row.layout[1]}", *(f"{1e3 * step:.1f}" for step in row.steps)]
        cells += [f"{row.seconds:.3f}", f"{gain:.2f}", f"{100 * gain * base.num_gpus / row.num_gpus:.0f} %"]
        bold = "**" if row.seconds == fastest else ""
        lines.append(f"| {' | '.join(f'{bold}{cell}{bold}' for cell in cells)} |")
    return "\n".join(lines)


def _request(arguments: Sequence[str]) -> tuple[Command, ModelSpec]:
    command = parse(["--prompt", "a prompt", "--checkpoint-path", str(_PUBLISHED), *arguments])
    if command.settings.checkpoint_path == _PUBLISHED:
        return command, ModelSpec((2, 3), "published", full_size(), {})
    return command, read_spec(command.settings.checkpoint_path)


def _wires(given: argparse.Namespace, calibration: Calibration) -> Wires:
    latency = given.latency_us * 1e-6
    if given.link_gbps is not None:
        exchange = gather = Link(latency, given.link_gbps * 1e9)
    elif calibration.links:
        exchange, gather = calibration.links["all_to_all"], calibration.links["all_gather"]
    elif max(given.gpus) > 1:
        raise RequestError(
            "The calibration is of one rank and has no exchanges. Give --link-gbps, or calibrate with several ranks."
        )
    else:
        exchange = gather = Link(latency, 1.0)  # on one GPU nothing is exchanged
    between = None if given.network_gbps is None else Link(latency, given.network_gbps * 1e9)
    return Wires(given.gpus_per_host, exchange, gather, between)


def _describe(link: Link) -> str:
    return f"{link.bytes_per_second / 1e9:.4g} GB/s and {1e6 * link.latency:.3g} us"


def _parse(words: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, usage="%(prog)s [options] -- ..."
    )
    parser.add_argument(
        "--gpus", type=int, nargs="+", metavar="N", help="how many (default 1 2 4 8 16, as far as known)"
    )
    parser.add_argument("--calibration", type=Path, metavar="FILE", help="default: this device's, in the cache folder")
    parser.add_argument("--gpus-per-host", type=int, default=8, metavar="N", help="default 8")
    for name, text in (
        ("link-gbps", "gigabytes (10^9) per second that a GPU receives inside a host; default: as calibrated"),
        ("network-gbps", "the same between hosts"),
    ):
        parser.add_argument(f"--{name}", type=float, metavar="GB/S", help=text)
    parser.add_argument(
        "--latency-us", type=float, default=20.0, metavar="US", help="of an exchange, for stated speeds (default 20)"
    )
    parser.add_argument("--measure", action="store_true", help="run the request on the GPUs of this host instead")
    given = parser.parse_args(words)
    for name in ("gpus_per_host", "link_gbps", "network_gbps", "latency_us"):
        if (value := getattr(given, name)) is not None and value <= 0:
            parser.error(f"--{name.replace('_', '-')} {value:g} must be more than 0")
    if given.gpus is None:
        most = max(1, torch.cuda.device_count()) if given.measure else given.gpus_per_host
        is_far = given.network_gbps is not None and not given.measure
        given.gpus = [number for number in (1, 2, 4, 8, 16) if number <= most or is_far]
    if min(given.gpus) < 1:
        parser.error(f"--gpus {min(given.gpus)} must be 1 or more")
    given.gpus = sorted(set(given.gpus))
    return given


def main(argv: Sequence[str] | None = None) -> int:
    """Print the table, after a line that says what it is."""
    words = list(sys.argv[1:] if argv is None else argv)
    split = words.index("--") if "--" in words else len(words)
    given, arguments = _parse(words[:split]), words[split + 1 :]
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        command, model = _request(arguments)
        if given.measure:
            rows = measure_rows(command, model, given.gpus, arguments)
            print(f"Measured on {device_name(device)}, one run per layout; the first step's warm-up is in it.\n")
        else:
            path = given.calibration or calibration_path(device_name(device))
            calibration = read_calibration(path)
            wires = _wires(given, calibration)
            rows = predict_rows(command, model, given.gpus, calibration, wires)
            between = f", between hosts {_describe(wires.between)}" if wires.between else ""
            print(
                f"A prediction, not a measurement, for {calibration.device}: counted operations at "
                f"{calibration.product_flops / 1e12:.4g} TFLOP/s in products and as calibrated in attention; counted "
                f"bytes at {_describe(wires.exchange)} per exchange{between}, none of it hidden. Launches, norms, "
                "elementwise kernels, encoding and decoding are not in it.\n"
            )
        if not rows:
            raise PlanError(f"The request has no layout on {' or '.join(map(str, given.gpus))} GPUs.")
        print(table(rows))
    except LtxSpError as error:
        print(f"scaling: {error}", file=sys.stderr)
        return error.exit_code
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
