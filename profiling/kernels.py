"""Tell from a trace what ran: a table of kernel classes per rank, the gaps between kernels, and the collectives.

    python profiling/kernels.py rank0.json.gz rank1.json.gz
    python profiling/kernels.py node.sqlite --expect all_gather=48 all_to_all=96 collectives=144
    python profiling/kernels.py node.sqlite --expect --blocks 48 --ranks 2 --steps 1
    python profiling/kernels.py node.sqlite --expect --world 8 -- ARGUMENTS OF THE RUN

Reads what profiling/nsys.sh writes (the SQLite export of Nsight Systems) and what profiling/trace.py writes (Chrome
traces of torch.profiler, .json or .json.gz). The collectives to expect are given as counts, as what a rank did, or as
the arguments with which ltx_sp.generate was recorded (what these scripts got after --): then the plan of that run says
them. Exit codes: 0; 1 if a count is not the expected one; the error's own if a file is no trace or the arguments make
no sense. docs/profiling.md says what to look for.
"""

from __future__ import annotations

import argparse
import dataclasses
import re
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from ltx_sp.cost import DEFAULT_MACHINE, Machine, machine_of, read_machine
from ltx_sp.errors import LtxSpError, RequestError
from profiling.kernel_traces import CLASSES, COLLECTIVES, Track, classify, read_trace, union

# Options: default, and what they say.
_STATED = {
    "blocks": (0, "blocks that run per step, all passes of the rank together; with it, collectives are predicted"),
    "ranks": (1, "ranks of the token axis"),
    "steps": (1, "steps of the window"),
    "step_gathers": (0, "all-gathers per step: 1 for passes on several ranks, 1 for rescaled guidance"),
    "stage_ends": (0, "ends of stages in the window"),
    "skipped_exchanges": (0, "blocks per step without video self-attention (STG)"),
    "skipped_gathers": (0, "blocks per step without video-to-audio (isolated pass)"),
}


def table(track: Track) -> str:
    """The track as Markdown: a row per class, and what the device did not do."""
    sums = track.sums()
    total = sum(own for _, own in sums.values())
    what = "kernels" if track.is_device else "operations"
    lines = [f"### {track.name}", "", f"| class | {what} | ms | share |", "|---|--:|--:|--:|"]
    for key, (count, own) in sums.items():
        lines.append(f"| {CLASSES[key]} | {count} | {own / 1e6:.3f} | {_percent(own, total)} |")
    lines += [f"| all | {sum(count for count, _ in sums.values())} | {total / 1e6:.3f} | |", ""]
    window = max(activity.end for activity in track.activities) - min(activity.start for activity in track.activities)
    busy, stretches = union(track.activities)
    lines.append(
        f"Window {window / 1e6:.3f} ms, from the first to the last; {(window - busy) / 1e6:.3f} ms "
        f"({_percent(window - busy, window)}) of it nothing ran, in {stretches - 1} gaps."
    )
    rest, _ = union(activity for activity in track.activities if classify(activity.name) not in COLLECTIVES)
    if any(key in sums for key in COLLECTIVES):
        lines.append(f"Collectives ran {(busy - rest) / 1e6:.3f} ms with nothing beside them.")
    return "\n".join(lines)


def _percent(part: float, whole: float) -> str:
    return f"{100 * part / whole:.1f} %" if whole else "-"


@dataclasses.dataclass(frozen=True)
class Steps:
    """What a rank does in a window of steps.

    Args:
        blocks: how often one runs, all passes together.
        all_to_alls, all_gathers: on both axes.
    """

    blocks: int
    all_to_alls: int
    all_gathers: int

    def counts(self) -> dict[str, int]:
        """The collectives of it: these, nothing positional, nothing else."""
        return {
            "all_to_all": self.all_to_alls,
            "all_gather": self.all_gathers,
            "all_reduce": 0,
            "broadcast": 0,
            "other_collective": 0,
        }


def stated(
    blocks: int,
    *,
    ranks: int = 1,
    steps: int = 1,
    step_gathers: int = 0,
    stage_ends: int = 0,
    skipped_exchanges: int = 0,
    skipped_gathers: int = 0,
) -> Steps:
    """What a rank does according to the options: per block two all-to-alls and one all-gather, less what is skipped."""
    is_sharded = ranks > 1
    all_gathers = is_sharded * ((blocks - skipped_gathers) * steps + stage_ends) + step_gathers * steps
    return Steps(
        blocks=blocks * steps,
        all_to_alls=is_sharded * 2 * (blocks - skipped_exchanges) * steps,
        all_gathers=all_gathers,
    )


def planned(arguments: Sequence[str], num_ranks: int, machine: Machine) -> tuple[list[Steps], int]:
    """What each rank of the guidance axis does in the window of a run, and how many ranks share each of these parts.

    Args:
        arguments: of ``ltx_sp.generate``, with ``--profile-steps A-B``.
        machine: on which it ran, as far as no ``--calibration`` says.

    Raises:
        LtxSpError: they do not make a plan, or the window is not in one stage.
    """
    from ltx_sp.arguments import parse
    from ltx_sp.plan import make_plan
    from ltx_sp.weights.checkpoint import read_spec

    words, window = list(arguments), ""
    for place, word in enumerate(words):
        if word.partition("=")[0] == "--profile-steps":
            window = word.partition("=")[2] or "".join(words[place + 1 : place + 2])
            del words[place : place + (1 if "=" in word else 2)]
            break
    if not (found := re.fullmatch(r"(\d+)-(\d+)", window)):
        raise RequestError("The arguments after -- need the --profile-steps A-B with which the trace was recorded.")
    first, last = int(found[1]), int(found[2])
    command = parse(words)
    if command.settings.calibration is not None:
        machine = read_machine(command.settings.calibration, machine)
    spec, begin = read_spec(command.settings.checkpoint_path), 0
    for stage in make_plan(command.request, spec, command.settings, num_ranks, machine).stages:
        if begin < first <= last <= begin + stage.num_steps:
            steps = last - first + 1
            hands = [
                Steps(
                    blocks=steps * sum(segment.stop - segment.start for segment in segments),
                    all_to_alls=steps * cost.all_to_alls,
                    all_gathers=steps * (cost.all_gathers + (cost.x0_bytes > 0)),
                )
                for segments, cost in zip(stage.segments, stage.predictions, strict=True)
            ]
            return hands, stage.layout[1]
        begin += stage.num_steps
    raise RequestError(f"Steps {window} do not lie in one stage of the run, which has {begin} steps in all.")


def deviations(track: Track, expected: Mapping[str, int], blocks: int = 0) -> list[str]:
    """A sentence for each count of the track that is not the expected one.

    Args:
        blocks: how often a block runs, to tell what went wrong in each; 0 where that is not known.
    """
    counts, found = track.counts(), []
    for key, want in expected.items():
        have = counts[key]
        if have == want:
            continue
        text = (
            f"{track.name}: {key} = {have}, expected {want}: {abs(have - want)} too {'many' if have > want else 'few'}"
        )
        if blocks and (have - want) % blocks == 0:
            text += f", {abs(have - want) // blocks} per block"
            if key == "all_gather" and have > want:
                text += " (as if cos and sin were gathered)"
        found.append(f"{text}.")
    return found


def _expected(words: Sequence[str]) -> dict[str, int]:
    found = {}
    for word in words:
        key, _, number = word.partition("=")
        if key not in (*CLASSES, "collectives") or not number.isdecimal():
            raise RequestError(
                f"--expect {word} must be one of {', '.join(CLASSES)} or collectives, then = and a count, as in "
                "all_gather=48. Put the files before it."
            )
        found[key] = int(number)
    return found


def _parse(words: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("files", nargs="+", type=Path, metavar="FILE", help=".sqlite, .json or .json.gz")
    parser.add_argument(
        "--expect", nargs="*", metavar="CLASS=N", help="check these counts, and those that the options below predict"
    )
    parser.add_argument("--world", type=int, metavar="N", help="ranks of the run whose arguments follow --")
    predicted = parser.add_argument_group("predicted", "what each rank did in the window; see --plan-only")
    for name, (default, text) in _STATED.items():
        option = f"--{name.replace('_', '-')}"
        predicted.add_argument(option, type=int, default=default, metavar="N", help=f"{text} (default {default})")
    return parser.parse_args(words)


def _all_steps(given: argparse.Namespace, arguments: Sequence[str], machine: Machine) -> tuple[list[Steps], int]:
    """As ``planned``; nothing is said where nothing was given."""
    if given.world is not None:
        if given.blocks:
            raise RequestError("--world takes the plan's word and --blocks another's. Give one of them.")
        return planned(arguments, given.world, machine)
    if arguments:
        raise RequestError("The arguments after -- are those of a run on several ranks. Give --world, how many.")
    return ([stated(**{name: getattr(given, name) for name in _STATED})] if given.blocks else []), 1


def main(argv: Sequence[str] | None = None) -> int:
    """Print the tables; return 1 if a count is not the expected one."""
    words = list(sys.argv[1:] if argv is None else argv)
    split = words.index("--") if "--" in words else len(words)
    given = _parse(words[:split])
    try:
        tracks = [track for path in given.files for track in read_trace(path)]
        machine = DEFAULT_MACHINE if any(track.is_device for track in tracks) else machine_of("cpu")
        steps, size = _all_steps(given, words[split + 1 :], machine)
        counts = _expected(given.expect or [])
        if given.expect is not None and not (steps or counts):
            raise RequestError(
                "--expect has nothing to check. Give counts, or --blocks, or --world, and what goes with it."
            )
        if given.expect is None and steps:
            raise RequestError("--blocks and --world predict what --expect checks. Give --expect too.")
    except LtxSpError as error:
        print(f"kernels: {error}", file=sys.stderr)
        return error.exit_code
    print("\n\n".join(map(table, tracks)))
    if given.expect is None:
        return 0
    found = [line for track in tracks for line in _check(track, steps, size, counts)]
    print("\n" + "\n".join(found or ["As expected."]))
    return 1 if found else 0


def _check(track: Track, steps: Sequence[Steps], size: int, counts: Mapping[str, int]) -> list[str]:
    if len(steps) > 1 and track.rank is not None:
        steps = [steps[track.rank // size]]
    # A report of Nsight Systems does not say which rank a process was: any that fits will do.
    possible = [deviations(track, one.counts() | dict(counts), one.blocks) for one in steps]
    return min(possible, key=len) if possible else deviations(track, counts)


if __name__ == "__main__":
    raise SystemExit(main())
