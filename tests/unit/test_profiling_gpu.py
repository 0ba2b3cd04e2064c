"""What measures on a GPU runs here at small sizes, counts what the formulas count, and reports what came of its steps.

Oracles: the plan's prediction for the operations; an interpreter made for the test, which fails, hangs or passes as
told.
"""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest
import torch

from ltx_sp.cost import DEFAULT_MACHINE, Prediction
from ltx_sp.recipes import Guidance
from ltx_sp.request import Request, Settings
from ltx_sp.spec import LatentShape, ModelSpec
from ltx_sp.stage import Walk, make_stage
from profiling import acceptance_report, gpu_bench
from profiling.gpu_bench import SIZES, Case, Size, Work, checks, count_work
from profiling.steps import UNGUIDED, guided

ROOT = Path(__file__).parents[2]
SCRIPT = ROOT / "profiling" / "gpu_acceptance.sh"
STEPS = ["nccl", "tests", "step", "load", "rates", "compiled", "residency"]


def _predicted(size: Size, shape: LatentShape, guidance: Guidance) -> Prediction:
    model = ModelSpec((2, 3), "published", size.spec, {})
    settings = Settings(checkpoint_path=Path("none"), max_batch_size=1)
    walk = Walk("denoise", (1.0, 0.0), "euler", guidance, guidance)
    return make_stage(walk, shape, Request("a fox"), model, settings, 1, DEFAULT_MACHINE).prediction


def test_operations_of_a_step_are_those_of_the_plan() -> None:
    size = SIZES["22b"]
    for shape in size.clips.values():
        for guidance in (UNGUIDED, guided(size.stg_block)):
            cost, work = _predicted(size, shape, guidance), count_work(size, shape, guidance)
            assert work.products + work.attention == pytest.approx(cost.flops, rel=5e-3)
            # To the video's own attention come the audio's, the text's and that between video and audio.
            assert 1 < work.attention / cost.attention_flops < 1.1


@pytest.mark.parametrize(("num_layers", "block"), [(6, 4), (4, 0)])
def test_a_count_of_few_blocks_reaches_all_others(num_layers: int, block: int) -> None:
    small = SIZES["small"]
    size = dataclasses.replace(small, spec=dataclasses.replace(small.spec, num_layers=num_layers), stg_block=block)
    (shape,) = size.clips.values()
    for guidance in (UNGUIDED, guided(block)):
        counted = Work(*gpu_bench._count(size, shape, guidance, num_layers, block))
        assert count_work(size, shape, guidance) == counted


def test_the_bench_runs_on_a_cpu(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "step.json"
    words = ["--device", "cpu", "--size", "small", "--rounds", "2", "--ways", "eager", "graph", "--json", str(path)]
    assert gpu_bench.main(words) == 0
    content = json.loads(path.read_text())
    eager, guided_, graph, _ = content["cases"]
    assert (eager["guidance"], guided_["guidance"], graph["way"]) == ("unguided", "guided", "graph")
    assert len(eager["seconds"]) == 2
    assert guided_["seconds"][0] > 0
    assert 0 < eager["busy"] <= eager["window"]
    assert "gemm" in eager["classes"]
    assert graph["failure"] == "left out: graphs need CUDA"
    assert "64x96x17       guided    eager" in capsys.readouterr().out


def test_without_time_nothing_is_timed_and_that_is_no_success(capsys: pytest.CaptureFixture[str]) -> None:
    words = ["--device", "cpu", "--size", "small", "--ways", "eager", "--time-limit", "1e-6"]
    assert gpu_bench.main(words) == 1
    assert capsys.readouterr().out.count("left out: the time limit") == 2


def test_what_a_full_step_is_held_to() -> None:
    case = Case("clip", "guided", "compile + graph", (1.0, 1.2, 1.1), roof=1.0, busy=0.99, window=1.0)
    slow = dataclasses.replace(case, seconds=(1.2,), busy=0.97)
    theirs = dataclasses.replace(case, way="diffusers compiled", seconds=(1.15,))
    failed = Case("clip", "guided", "graph", failure="no memory")
    assert list(checks([case, theirs, failed]).values()) == [True] * 3
    assert list(checks([slow, theirs]).values()) == [False] * 3
    assert checks([failed]) == {}


@pytest.fixture
def tools(tmp_path: Path) -> Path:
    """An interpreter: it has every module but av, and what it is to run passes, fails or hangs by its name."""
    path = tmp_path / "python"
    path.write_text(
        f"""#!/bin/sh
case "$*" in
*"import sys, torch"*) exit "${{NO_CUDA:-0}}" ;;
*"find_spec('av')"*) exit 1 ;;
*find_spec*) exit 0 ;;
*acceptance_report.py*) exec '{sys.executable}' "$@" ;;
*"durations=10 tests/gpu/test_graph_cuda.py::"*) echo "4 skipped in 0.1s" ;;
*calibrate.py*) echo "Traceback (most recent call last):"; exit 1 ;;
*pytest*) echo "7 passed, 1 skipped in 0.1s" ;;
*gpu_bench.py*) for last; do :; done; echo '{{"cases": [1]}}' >"$last"; echo "a table"; exit 0 ;;
*load.py*) echo "a limit is broken"; exit 1 ;;
*) exit 3 ;;
esac
"""
    )
    path.chmod(0o755)
    return path


def run(tmp_path: Path, tools: Path, *words: str, **environment: str) -> subprocess.CompletedProcess[str]:
    given = {"PYTHON": str(tools), "OUT": str(tmp_path / "out"), **environment}
    return subprocess.run(
        [str(SCRIPT), *words], capture_output=True, text=True, check=False, env=os.environ | given, cwd=tmp_path
    )


def test_a_dry_run_names_the_steps_and_runs_none(tmp_path: Path, tools: Path) -> None:
    ended = run(tmp_path, tools, "--dry-run", NO_CUDA="1")
    assert ended.returncode == 0, ended.stderr
    assert [line.partition(",")[0] for line in ended.stdout.splitlines()] == STEPS
    for line in ended.stdout.splitlines():
        words = [word.partition("::")[0] for word in line.split()]
        named = [word for word in words if word.endswith((".py", "tests/gpu"))]
        assert named
        assert all((ROOT / word.removeprefix("--ignore=")).exists() for word in named), line
    assert not (tmp_path / "out").exists()


def test_every_step_is_told_and_one_that_fails_stops_none(tmp_path: Path, tools: Path) -> None:
    ended = run(tmp_path, tools)
    assert ended.returncode == 1, ended.stderr
    rows = [line.split()[:2] for line in ended.stdout.splitlines()[:-1]]
    assert rows == [
        list(row) for row in zip(STEPS, ["PASS", "PASS", "PASS", "FAIL", "FAIL", "SKIPPED", "SKIPPED"], strict=True)
    ]
    report, page = sorted((tmp_path / "out").iterdir())
    content = json.loads(report.read_text())
    assert content["figures"] == {"cases": [1]}
    assert [step["note"] for step in content["steps"]] == [
        "",
        "",
        "",
        "exit code 1",
        "crashed, exit code 1",
        "nothing ran",
        "needs diffusers av transformers",
    ]
    assert content["steps"][3]["output"] == "a limit is broken"
    text = page.read_text()
    assert "| load | FAIL |" in text
    assert "a table" in text
    assert tempfile.gettempdir() not in text, "temporary folders mean nothing to who reads it"


def test_a_step_without_time_is_skipped(tmp_path: Path, tools: Path) -> None:
    ended = run(tmp_path, tools, TIME_LIMIT="2")
    assert ended.returncode == 0
    assert ended.stdout.count("no time left") == len(STEPS)


def test_some_steps_have_all_of_the_time(tmp_path: Path, tools: Path) -> None:
    ended = run(tmp_path, tools, STEPS="step")
    assert ended.returncode == 0, ended.stderr
    assert [line.split()[0] for line in ended.stdout.splitlines()[:-1]] == ["step"]
    (report, _) = sorted((tmp_path / "out").iterdir())
    assert "-gpu-acceptance-step-" in report.name
    (step,) = json.loads(report.read_text())["steps"]
    assert "--time-limit 490" in step["command"]
    ended = run(tmp_path, tools, STEPS="steps")
    assert ended.returncode == 2
    assert "none of the steps is called steps" in ended.stderr


def test_a_step_that_hangs_is_ended(tmp_path: Path, tools: Path) -> None:
    tools.write_text(tools.read_text().replace('echo "a limit is broken"; exit 1', "exec sleep 100"))
    ended = run(tmp_path, tools, TIME_LIMIT="8")
    assert ended.returncode == 1
    assert "ran out of time" in ended.stdout


def test_without_a_gpu_nothing_is_started(tmp_path: Path, tools: Path) -> None:
    ended = run(tmp_path, tools, NO_CUDA="1")
    assert ended.returncode == 2
    assert "no PyTorch that sees a CUDA device" in ended.stderr
    assert run(tmp_path, tools, "--fast").returncode == 2


@pytest.mark.skipif(shutil.which("shellcheck") is None, reason="shellcheck is not installed")
def test_shellcheck_is_content() -> None:
    subprocess.run(["shellcheck", "-x", str(SCRIPT)], check=True, cwd=ROOT)


def test_a_report_says_what_it_belongs_to() -> None:
    about = acceptance_report.facts()
    assert torch.__version__ in about["versions"]
    assert list(about) == ["hardware", "commit", "command", "versions"]


def test_a_second_report_of_a_day_leaves_the_first(tmp_path: Path) -> None:
    (tmp_path / "steps.tsv").write_text("load\tPASS\t1\t\tpython profiling/load.py\n")
    (tmp_path / "load.log").write_text("a table\n")
    for _ in range(2):
        assert acceptance_report.main([str(tmp_path), str(tmp_path / "out"), ""]) == 0
    names = sorted(path.name for path in (tmp_path / "out").iterdir())
    assert len(names) == 4
    assert [name.endswith(("-2.json", "-2.md")) for name in names].count(True) == 2
