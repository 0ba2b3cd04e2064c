"""What a run tells. Oracle: the text on stderr, and the JSON that comes back."""

from __future__ import annotations

import json
import logging
import re
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from ltx_sp.observe import Observer, PhaseRecord, configure_logging, end_progress, log

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def _leave_the_log_as_it_was() -> Iterator[None]:
    handlers, level, propagate = log.handlers[:], log.level, log.propagate
    yield
    log.handlers[:], log.propagate = handlers, propagate
    log.setLevel(level)


def test_a_phase_is_measured_and_logged(tmp_path: Path) -> None:
    path = tmp_path / "log"
    observer = Observer(3, CPU, phase_log=path)
    with observer.phase("first"):
        time.sleep(0.05)
    with observer.phase("second"):
        pass
    records = [PhaseRecord(**json.loads(line)) for line in path.read_text().splitlines()]
    assert records == observer.records
    assert [record.phase for record in records] == ["first", "second"]
    assert {record.rank for record in records} == {3}
    assert 0.05 <= records[0].seconds < 1
    assert records[0].host_peak_bytes > 10_000_000
    assert records[0].device_peak_bytes is None


def test_a_phase_log_is_appended_to(tmp_path: Path) -> None:
    for name in ("one", "two"):
        with Observer(0, CPU, phase_log=tmp_path / "log").phase(name):
            pass
    assert [json.loads(line)["phase"] for line in (tmp_path / "log").read_text().splitlines()] == ["one", "two"]


def test_a_phase_that_fails_is_no_phase(tmp_path: Path) -> None:
    observer = Observer(0, CPU, phase_log=tmp_path / "log")
    with pytest.raises(KeyError), observer.phase("failing"):
        raise KeyError
    assert not observer.records
    assert not (tmp_path / "log").exists()


def test_progress_shows_steps_speed_and_time_left(capsys: pytest.CaptureFixture[str]) -> None:
    with Observer(0, CPU, show_progress=True).progress(4, "denoise", "step") as advance:
        for _ in range(4):
            time.sleep(0.02)
            advance(1)
    captured = capsys.readouterr()
    assert not captured.out
    assert re.search(r"denoise: 100%\S* 4/4 \[00:00<00:00, +\d+\.\d+(step/s|s/step)\]\n$", captured.err)


@pytest.mark.parametrize(("rank", "show"), [(1, True), (0, False)])
def test_nothing_is_shown(rank: int, show: bool, capsys: pytest.CaptureFixture[str]) -> None:
    with Observer(rank, CPU, show_progress=show).progress(4, "denoise", "step") as advance:
        advance(4)
    assert capsys.readouterr() == ("", "")


def test_bytes_are_scaled(capsys: pytest.CaptureFixture[str]) -> None:
    with Observer(0, CPU, show_progress=True).progress(3 * 2**20, "load", "B") as advance:
        advance(3 * 2**20)
    assert "3.00M/3.00M" in capsys.readouterr().err


def test_a_message_has_a_line_of_its_own_beside_a_bar(capsys: pytest.CaptureFixture[str]) -> None:
    configure_logging(0)
    with Observer(0, CPU, show_progress=True).progress(4, "denoise", "step") as advance:
        advance(1)
        log.warning("careful")
        advance(3)
    lines = re.split(r"[\r\n]", capsys.readouterr().err)
    assert "careful" in lines


def test_ended_progress_ends_its_line(capsys: pytest.CaptureFixture[str]) -> None:
    with Observer(0, CPU, show_progress=True).progress(4, "denoise", "step") as advance:
        advance(1)
        end_progress()
        assert re.search(r"1/4 .*\n$", capsys.readouterr().err)
        advance(1)
    assert not capsys.readouterr().err


def test_the_log_is_rank_0s_and_the_others_warnings(capsys: pytest.CaptureFixture[str]) -> None:
    for rank in (0, 2):
        configure_logging(rank)
        logging.getLogger("ltx_sp.encode").info("news of %d", rank)
        logging.getLogger("ltx_sp.encode").warning("trouble of %d", rank)
    assert capsys.readouterr() == ("", "news of 0\ntrouble of 0\nrank 2: trouble of 2\n")
