"""Put what profiling/gpu_acceptance.sh left in a folder into one JSON file and one page.

python profiling/acceptance_report.py FOLDER OUT "NAMES OF THE STEPS, IF THEY ARE NOT ALL"
"""

from __future__ import annotations

import datetime
import json
import platform
import re
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from ltx_sp.parallel.mesh import device_name

ROOT = Path(__file__).resolve().parents[1]
FIELDS = ("name", "status", "seconds", "note", "command")
MAX_LINES = 400


def read_steps(folder: Path) -> list[dict[str, str]]:
    """The steps as the script noted them, each with what it printed."""
    steps = []
    for line in (folder / "steps.tsv").read_text().splitlines():
        step = dict(zip(FIELDS, line.split("\t"), strict=True))
        lines = (folder / f"{step['name']}.log").read_text(errors="replace").splitlines()
        cut = [f"({len(lines) - MAX_LINES} lines before)"] if len(lines) > MAX_LINES else []
        steps.append(step | {"output": "\n".join(cut + lines[-MAX_LINES:])})
    return steps


def facts() -> dict[str, str]:
    """What the figures belong to."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    nccl = ".".join(map(str, torch.cuda.nccl.version())) if torch.cuda.is_available() else "none"
    return {
        "hardware": f"{device_name(device)}, {platform.machine()}, {platform.release()}",
        "commit": _commit(),
        "command": "profiling/gpu_acceptance.sh",
        "versions": f"Python {platform.python_version()}, torch {torch.__version__}, CUDA {torch.version.cuda}, "
        f"cuDNN {torch.backends.cudnn.version()}, NCCL {nccl}",
    }


def _commit() -> str:
    command = ["git", "-C", str(ROOT), "describe", "--always", "--dirty"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return "unknown: no repository here"


def page(about: Mapping[str, str], steps: Sequence[Mapping[str, str]]) -> str:
    """The report for people: a summary, then the output of each step, unedited."""
    lines = ["# Acceptance on a GPU", "", "```"]
    lines += [f"{key + ':':10} {value}" for key, value in about.items()]
    lines += ["```", "", "| step | result | seconds | |", "|---|---|---|---|"]
    lines += [f"| {step['name']} | {step['status']} | {step['seconds']} | {step['note']} |" for step in steps]
    for step in steps:
        lines += ["", f"## {step['name']}", "", f"`{step['command']}`", "", "```", step["output"], "```"]
    return "\n".join(lines) + "\n"


def main(argv: Sequence[str] | None = None) -> int:
    """Write both files and say where; return 1 if a step failed."""
    words = list(sys.argv[1:] if argv is None else argv)
    if len(words) != 3:
        print((__doc__ or "").strip(), file=sys.stderr)
        return 2
    folder, out, some = Path(words[0]), Path(words[1]), words[2].split()
    about, steps = facts(), read_steps(folder)
    figures = folder / "step.json"
    content: dict[str, Any] = {"about": about, "steps": steps}
    content["figures"] = json.loads(figures.read_text()) if figures.exists() else None
    out.mkdir(parents=True, exist_ok=True)
    device = re.sub(r"[^a-z0-9]+", "-", about["hardware"].partition(",")[0].lower()).strip("-")
    name = f"{datetime.datetime.now(datetime.UTC):%Y-%m-%d}{'-'.join(['-gpu-acceptance', *some])}-{device}"
    # What was measured before stays as it is.
    names = [name, *(f"{name}-{number}" for number in range(2, 1000))]
    stem = next(out / one for one in names if not (out / f"{one}.json").exists())
    Path(f"{stem}.json").write_text(json.dumps(content, indent=1) + "\n")
    Path(f"{stem}.md").write_text(page(about, steps))
    print(f"gpu_acceptance: {stem}.md and .json")
    return 1 if any(step["status"] == "FAIL" for step in steps) else 0


if __name__ == "__main__":
    raise SystemExit(main())
