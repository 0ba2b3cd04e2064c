"""What a run tells. Oracle: the text on stderr, the JSON that comes back, and clocks that the test itself moves."""

from __future__ import annotations

import contextlib
import json
import logging
import re
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

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


class Clock:
    """The observer's only clock, and a device on which a stream has one of its own."""

    def __init__(self) -> None:
        self.now = self.stream = 0.0
        self.allocated = self.peak = 0
        self.names: list[str] = []
        self.num_waits = 0

    def perf_counter(self) -> float:
        return self.now

    def launch(self, seconds: float) -> None:
        """Give the stream work, which begins when what it has is done."""
        self.stream = max(self.stream, self.now) + seconds

    def allocate(self, num_bytes: int) -> None:
        self.allocated += num_bytes
        self.peak = max(self.peak, self.allocated)


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr("ltx_sp.observe.time", clock)
    return clock


@pytest.fixture
def gpu(clock: Clock, monkeypatch: pytest.MonkeyPatch) -> Observer:
    class Event:
        def __init__(self, enable_timing: bool) -> None:
            assert enable_timing

        def record(self, _: object) -> None:
            self.at = max(clock.stream, clock.now)

        def synchronize(self) -> None:
            clock.now = max(clock.now, self.at)
            clock.num_waits += 1

        def elapsed_time(self, end: Event) -> float:
            return 1000 * (end.at - self.at)

    def reset(_: object) -> None:
        clock.peak = clock.allocated

    functions = {
        "Event": Event,
        "get_device_name": lambda _: "H200",
        "current_stream": lambda _: None,
        "max_memory_allocated": lambda _: clock.peak,
        "reset_peak_memory_stats": reset,
        "nvtx": SimpleNamespace(range_push=clock.names.append, range_pop=clock.names.pop),
    }
    monkeypatch.setattr("ltx_sp.observe.torch.cuda", SimpleNamespace(**functions))
    return Observer(0, torch.device("cuda"))


def seconds_of(observer: Observer) -> dict[str, float]:
    return {"/".join(record.path): record.seconds for record in observer.records}


def table_of(observer: Observer, request: int | None = None) -> list[list[str]]:
    """Every row's name as it is indented, its seconds, and the bytes moved."""
    lines = observer.report(request).splitlines()[2:]
    return [[line[:32].rstrip(), line[32:].split()[0], re.split("  +", line)[-1]] for line in lines]


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


def test_phases_are_shown_within_each_other_in_the_order_of_their_beginning(clock: Clock) -> None:
    observer = Observer(0, CPU)
    for _ in range(2):
        with observer.phase("prepare"):
            clock.now += 1
            with observer.phase("switch weights"):
                clock.now += 2
                observer.moved(3 * 2**20)
            with observer.phase("encode images"):
                clock.now += 4
        with observer.phase("denoise"), observer.phase("switch weights"):
            clock.now += 8
    assert seconds_of(observer) == {
        "prepare/switch weights": 2,
        "prepare/encode images": 4,
        "prepare": 7,
        "denoise/switch weights": 8,
        "denoise": 8,
    }
    assert table_of(observer) == [
        ["prepare x2", "14.0000", "6.0 MiB"],
        ["  switch weights x2", "4.0000", "6.0 MiB"],
        ["  encode images x2", "8.0000", "-"],
        ["denoise x2", "16.0000", "-"],
        ["  switch weights x2", "16.0000", "-"],
        ["not in a phase", "0.0000", "-"],
        ["total", "30.0000", "6.0 MiB"],
    ]


def test_what_an_iterator_takes_is_set_apart(clock: Clock) -> None:
    observer = Observer(0, CPU)

    def frames() -> Iterator[int]:
        for i in range(3):
            clock.now += 2
            with observer.phase("copy"):
                clock.now += 0.5
                observer.moved(2**10)
            yield i
        clock.now += 1

    decoded = observer.timed(frames(), "decode")
    clock.now += 0.25
    with observer.phase("output"), observer.phase("mux"):
        for _ in decoded:
            clock.now += 16
    assert seconds_of(observer) == {
        "output/decode/copy": 0.5,
        "output/decode": 3 * 2.5 + 1,
        "output/mux": 3 * 16,
        "output": 3 * 16 + 3 * 2.5 + 1,
    }
    assert table_of(observer) == [
        ["output", "56.5000", "3.0 KiB"],
        ["  decode", "8.5000", "3.0 KiB"],
        ["    copy x3", "1.5000", "3.0 KiB"],
        ["  mux", "48.0000", "-"],
        ["not in a phase", "0.2500", "-"],
        ["total", "56.7500", "3.0 KiB"],
    ]


def test_an_iterator_that_fails_or_is_left_is_no_phase() -> None:
    observer = Observer(0, CPU)

    def failing() -> Iterator[int]:
        yield 1
        raise KeyError

    with pytest.raises(KeyError), observer.phase("mux"):
        list(observer.timed(failing(), "decode"))
    assert next(observer.timed(failing(), "decode")) == 1
    with observer.phase("next"):
        pass
    assert [record.path for record in observer.records] == [("next",)]


def test_requests_have_tables_of_their_own_and_the_first_what_came_before(clock: Clock) -> None:
    observer = Observer(0, CPU)
    for name in ("validate input", "denoise", "denoise", "denoise"):
        if name == "denoise":
            clock.now += 100  # nobody asks for anything
            observer.begin()
        with observer.phase(name):
            clock.now += 2
        copy = threading.Thread(target=observer.moved, args=(2**10,))
        with observer.phase("switch weights"):
            copy.start()
            copy.join()
            clock.now += 1
        clock.now += 0.5
        with observer.phase("mux"):
            observer.moved(2**10)
        clock.now += 50
        observer.record("load", 1.5, moved_bytes=2**10, bytes=3)
    assert table_of(observer, 1) == [
        ["validate input", "2.0000", "-"],
        ["switch weights x2", "2.0000", "-"],
        ["mux x2", "0.0000", "2.0 KiB"],
        ["denoise", "2.0000", "-"],
        ["not in a phase", "1.0000", "-"],
        ["total", "7.0000", "6.0 KiB"],
        ["beside: load x2", "3.0000", "2.0 KiB"],
        ["beside: other copies", "-", "2.0 KiB"],
    ]
    assert table_of(observer) == table_of(observer, 3) == table_of(observer, 2)
    assert table_of(observer)[3:] == [
        ["not in a phase", "0.5000", "-"],
        ["total", "3.5000", "3.0 KiB"],
        ["beside: load", "1.5000", "1.0 KiB"],
        ["beside: other copies", "-", "1.0 KiB"],
    ]
    assert [record.request for record in observer.records] == [0] * 4 + [1] * 4 + [2] * 4 + [3] * 4


def test_the_columns_stand_below_each_other() -> None:
    observer = Observer(0, CPU)
    observer.note(ranks=2, residency="snapshot")
    with observer.phase("denoise"):
        pass
    first, *lines = observer.report().splitlines()
    assert first == f"request 0 | torch {torch.__version__} | device cpu | ranks 2 | residency snapshot"
    assert lines[0].split("  ")[-1].strip() == "moved"
    assert len({len(line) for line in lines}) == 1
    assert re.fullmatch(r"denoise +0\.00\d\d +- +\d+\.\d [MG]iB +- +-", lines[1])


def test_a_device_has_its_own_time_and_peaks(clock: Clock, gpu: Observer) -> None:
    clock.allocate(100)
    with gpu.phase("prepare"):
        clock.allocate(900)
        clock.allocate(-900)
        clock.now += 1
        with gpu.phase("switch weights"):
            clock.allocate(50)
            clock.launch(4)
            clock.now += 1
            assert clock.names == ["prepare", "switch weights"]
        clock.allocate(-50)
        assert clock.now == 5
    with gpu.phase("denoise"):
        clock.allocate(10)
        clock.allocate(-10)
    phases = {record.phase: record for record in gpu.records}
    assert {name: record.device_peak_bytes for name, record in phases.items()} == {
        "switch weights": 150,
        "prepare": 1000,
        "denoise": 110,
    }
    assert {name: (record.seconds, record.device_seconds) for name, record in phases.items()} == {
        "switch weights": (4, 4),
        "prepare": (5, 5),
        "denoise": (0, 0),
    }
    assert gpu.report().splitlines()[2].split()[:3] == ["prepare", "5.0000", "5.0000"]
    assert not clock.names


def test_an_iterator_does_not_wait_for_the_device_before_its_end(clock: Clock, gpu: Observer) -> None:
    def frames() -> Iterator[int]:
        for i in range(2):
            clock.allocate(7)
            clock.launch(2)
            clock.allocate(-7)
            yield i

    decoded = gpu.timed(frames(), "decode")
    with gpu.phase("output"), gpu.phase("mux"):
        for _ in decoded:
            assert not clock.num_waits
            clock.launch(1)
            clock.allocate(3)
            clock.allocate(-3)
    phases = {"/".join(record.path): record for record in gpu.records}
    assert {name: (record.device_seconds, record.device_peak_bytes) for name, record in phases.items()} == {
        "output/decode": (4, 7),
        "output/mux": (2, 3),
        "output": (6, 7),
    }


def test_a_failed_phase_leaves_its_peak_to_the_one_around(clock: Clock, gpu: Observer) -> None:
    with gpu.phase("prepare"):
        with contextlib.suppress(KeyError), gpu.phase("failing"):
            clock.allocate(9)
            gpu.moved(5)
            clock.allocate(-9)
            raise KeyError
        clock.now += 1
    (prepare,) = gpu.records
    assert (prepare.device_peak_bytes, prepare.moved_bytes, prepare.seconds, prepare.within) == (9, 5, 1, "")


def test_a_report_comes_back_as_json(tmp_path: Path, clock: Clock) -> None:
    observer = Observer(1, CPU, phase_log=tmp_path / "log")
    observer.note(ranks=2)
    with observer.phase("plan"):
        clock.now += 1
    observer.begin()
    observer.record("load transformer", 0.5, bytes=7, cached=None)
    with observer.phase("denoise"), observer.phase("refine"):
        clock.now += 2
        observer.moved(2**20)
    observer.write_report(tmp_path / "report.json")
    report = json.loads((tmp_path / "report.json").read_text())
    assert report["facts"] == {"torch": torch.__version__, "device": "cpu", "ranks": 2}
    phases = [phase for request in report["requests"] for phase in request["phases"]]
    assert phases == [json.loads(line) for line in (tmp_path / "log").read_text().splitlines()]
    assert [phase["phase"] for phase in phases] == ["plan", "load transformer", "refine", "denoise"]
    assert phases[1]["cached"] is None
    assert phases[2]["within"] == "denoise"
    totals = [{name: value for name, value in request.items() if name != "phases"} for request in report["requests"]]
    assert totals[1] == {
        "request": 1,
        "seconds": 2,
        "seconds_in_phases": 2,
        "device_seconds": None,
        "host_peak_bytes": max(phase["host_peak_bytes"] for phase in phases),
        "device_peak_bytes": None,
        "moved_bytes": 2**20,
    }
    assert [total["seconds"] for total in totals] == [1, 2]


def test_a_report_is_written_whole_or_not_at_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise OSError("quota")

    path = tmp_path / "report.json"
    path.write_text("older")
    monkeypatch.setattr("os.replace", refuse)
    with pytest.raises(OSError, match="quota"):
        Observer(0, CPU).write_report(path)
    assert path.read_text() == "older"
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.gpu
def test_phases_on_a_real_device() -> None:
    """Oracle: a kernel of known length, and allocations of known size."""
    device = torch.device("cuda")
    observer = Observer(0, device)
    side = torch.cuda.Stream(device)
    with observer.phase("outer"):
        large = torch.empty(2**28, dtype=torch.uint8, device=device)
        del large
        with observer.phase("inner"):
            kept = torch.ones(2**26, dtype=torch.uint8, device=device)
            torch.cuda._sleep(10**8)
            with torch.cuda.stream(side):
                torch.cuda._sleep(4 * 10**9)
        assert not side.query()  # was not waited for
    inner, outer = observer.records
    assert inner.device_seconds is not None
    assert outer.device_seconds is not None
    assert 0.02 < inner.device_seconds <= outer.device_seconds <= outer.seconds + 0.01
    assert inner.device_peak_bytes is not None
    assert outer.device_peak_bytes is not None
    assert 2**26 <= inner.device_peak_bytes < 2**28 <= outer.device_peak_bytes
    assert kept.sum() == 2**26
