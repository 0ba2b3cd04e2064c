"""The demo's script, with an interpreter that only plays. Oracle: what that was asked to do, and what lies there."""

from __future__ import annotations

import os
import pathlib
import shutil
import subprocess

import pytest

LAUNCH = pathlib.Path(__file__).parents[2] / "launch"


@pytest.fixture
def root(tmp_path: pathlib.Path) -> pathlib.Path:
    """A copy with a setup of its own; like the real demo, this one wants a folder that is new or empty."""
    root = tmp_path / "a copy"
    shutil.copytree(LAUNCH, root / "launch")
    (root / "ltx_sp").mkdir()
    (root / "ltx_sp" / "demo.py").write_text("one version\n")
    (root / "launch" / "setup.sh").write_text(f'ROOT="{root}"\nVENV_PYTHON="{root}/python"\n')
    python = root / "python"
    python.write_text(
        """#!/bin/bash
echo "$*" >>"$NOTES"
case "$*" in
"-m ltx_sp.demo "*)
    if [[ -n "$(ls -A "$3" 2>/dev/null)" ]]; then exit 3; fi
    mkdir -p "$3"; echo weights >"$3/ltx-2.3-demo.safetensors"; exit "${DEMO_FAILS:-0}" ;;
*torch.distributed.run*) echo clip >demo.mp4 ;;
*) exit 1 ;;
esac
"""
    )
    python.chmod(0o755)
    return root


def run(root: pathlib.Path, **environment: str) -> tuple[int, str, str]:
    """Exit code, what was written to the error stream, and what the interpreter was asked to do."""
    notes = root / "notes"
    notes.write_text("")
    given = {"LTX_SP_CACHE": str(root / "cache"), "NOTES": str(notes), **environment}
    ended = subprocess.run(
        [str(root / "launch" / "demo.sh")],
        capture_output=True, text=True, check=False, cwd=root, env=os.environ | given, stdin=subprocess.DEVNULL,
    )  # fmt: skip
    return ended.returncode, ended.stderr, notes.read_text()


def test_the_checkpoint_is_written_once_and_anew_for_another_version(root: pathlib.Path) -> None:
    code, errors, notes = run(root)
    assert code == 0, errors
    assert notes.count("-m ltx_sp.demo ") == 1
    assert f"{root}/cache/demo/ltx-2.3-demo.safetensors" in notes
    assert "-m ltx_sp.demo " not in run(root)[2]
    (root / "ltx_sp" / "demo.py").write_text("another version\n")
    (root / "cache" / "demo" / "of the first version").touch()
    code, errors, notes = run(root)
    assert code == 0, errors
    assert notes.count("-m ltx_sp.demo ") == 1
    assert sorted(path.name for path in (root / "cache" / "demo").iterdir()) == [".stamp", "ltx-2.3-demo.safetensors"]


def test_what_was_not_finished_is_written_anew(root: pathlib.Path) -> None:
    assert run(root, DEMO_FAILS="1")[0] == 1
    assert not (root / "cache" / "demo").exists()
    code, errors, _ = run(root)
    assert code == 0, errors
