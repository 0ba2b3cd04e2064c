"""The harness itself: answers come back in order, and every way to fail is told apart and told soon."""

from __future__ import annotations

import os
import pathlib
import signal
import textwrap
import time
from typing import Any

import pytest
import torch
import torch.distributed as dist

from tests.support.ranks import RankError, run_cli, run_ranks


def _reduce(rank: int, num_ranks: int, start: torch.Tensor) -> dict[str, Any]:
    total = start + rank
    dist.all_reduce(total)
    return {"rank": rank, "num_ranks": num_ranks, "total": total, "threads": torch.get_num_threads()}


def _environment(rank: int, num_ranks: int, *names: str) -> list[str | None]:
    return [os.environ.get(name) for name in names]


def _start_own_group(rank: int, num_ranks: int) -> int:
    assert not dist.is_initialized()
    dist.init_process_group("gloo")
    total = torch.tensor(rank)
    dist.all_reduce(total)
    dist.destroy_process_group()
    return int(total)


def _answer_late(rank: int, num_ranks: int) -> int:
    time.sleep(0.2 * (num_ranks - rank))
    return rank


def _raise_on_one(rank: int, num_ranks: int) -> None:
    if rank == 1:
        raise ValueError("this rank has had enough")
    dist.barrier()


def _die_on_one(rank: int, num_ranks: int, how: int) -> None:
    if rank == 2:
        os.kill(os.getpid(), how)
    dist.barrier()


def _exit_on_one(rank: int, num_ranks: int) -> None:
    if rank == 0:
        os._exit(9)


def _hang_on_two(rank: int, num_ranks: int) -> int:
    if rank in (1, 3):
        time.sleep(600)
    return os.getpid()


def _raise_while_the_other_sleeps(rank: int, num_ranks: int) -> None:
    if rank == 1:
        raise ValueError("this rank has had enough")
    time.sleep(600)


def _return_a_function(rank: int, num_ranks: int) -> Any:
    return lambda: rank


def test_results_come_in_rank_order_with_their_tensors() -> None:
    results = run_ranks(_reduce, 4, torch.arange(3.0))
    assert [result["rank"] for result in results] == [0, 1, 2, 3]
    assert all(result["num_ranks"] == 4 and result["threads"] == 1 for result in results)
    assert all(torch.equal(result["total"], torch.tensor([6.0, 10.0, 14.0])) for result in results)


def test_order_does_not_depend_on_who_answers_first() -> None:
    assert run_ranks(_answer_late, 3) == [0, 1, 2]


def test_a_large_result_survives_its_rank() -> None:
    zeros = run_ranks(_zeros, 2, 4_000_000)
    assert [value.numel() for value in zeros] == [4_000_000, 4_000_000]


def _zeros(rank: int, num_ranks: int, count: int) -> torch.Tensor:
    return torch.zeros(count)


def test_one_rank_is_a_group_too() -> None:
    assert run_ranks(_reduce, 1, torch.zeros(1))[0]["total"].item() == 0


def test_ranks_see_torchrun_variables_and_this_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    run_ranks(_answer_late, 1)  # the fork server is up before the variable is
    monkeypatch.setenv("LTX_SP_TEST_VARIABLE", "set late")
    monkeypatch.delenv("OMP_NUM_THREADS")
    seen = run_ranks(_environment, 2, "RANK", "LOCAL_RANK", "WORLD_SIZE", "LTX_SP_TEST_VARIABLE", "OMP_NUM_THREADS")
    assert seen == [["0", "0", "2", "set late", None], ["1", "1", "2", "set late", None]]


def test_a_function_may_start_the_group_itself() -> None:
    assert run_ranks(_start_own_group, 3, init_group=False) == [3, 3, 3]


def test_four_ranks_start_quickly() -> None:
    run_ranks(_answer_late, 1)
    start = time.monotonic()
    run_ranks(_reduce, 4, torch.zeros(1))
    assert time.monotonic() - start < 5  # 0.3 s alone on two cores; this catches the 3 s per rank of a fresh start


def test_an_exception_names_its_rank_and_keeps_its_traceback() -> None:
    with pytest.raises(RankError, match="this rank has had enough") as caught:
        run_ranks(_raise_on_one, 3)
    assert next(iter(caught.value.failures)) == 1, "the cause comes first"
    assert "in _raise_on_one" in caught.value.failures[1]
    assert "ValueError" in caught.value.failures[1]


def test_the_others_are_not_waited_for_once_a_rank_has_failed() -> None:
    start = time.monotonic()
    with pytest.raises(RankError) as caught:
        run_ranks(_raise_while_the_other_sleeps, 2, timeout=30.0, grace=0.5)
    assert time.monotonic() - start < 15
    assert list(caught.value.failures) == [1, 0], "the cause comes first"
    assert "did not answer 0.5 s after that" in caught.value.failures[0]


def test_a_result_that_does_not_pickle_is_its_ranks_failure() -> None:
    with pytest.raises(RankError, match="rank 0 raised") as caught:
        run_ranks(_return_a_function, 1)
    assert "ickl" in caught.value.failures[0]


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGSEGV])
def test_a_killed_rank_is_named_with_its_signal(how: signal.Signals) -> None:
    with pytest.raises(RankError) as caught:
        run_ranks(_die_on_one, 3, how.value)
    assert caught.value.failures[2] == f"was killed by {how.name}"
    assert next(iter(caught.value.failures)) == 2, "the cause comes first"


def test_a_rank_that_leaves_without_a_word_is_named() -> None:
    with pytest.raises(RankError, match="rank 0 ended with exit code 9"):
        run_ranks(_exit_on_one, 2)


def test_a_timeout_names_the_silent_ranks_and_where_they_hang() -> None:
    run_ranks(_answer_late, 1)  # the fork server is up
    start = time.monotonic()
    with pytest.raises(RankError) as caught:
        run_ranks(_hang_on_two, 4, timeout=2.0)
    assert time.monotonic() - start < 10
    assert sorted(caught.value.failures) == [1, 3]
    assert "did not answer within 2 s" in caught.value.failures[1]
    assert "in _hang_on_two" in caught.value.failures[3]


def _module(folder: pathlib.Path, source: str) -> dict[str, str]:
    (folder / "planted.py").write_text(textwrap.dedent(source))
    return {"PYTHONPATH": str(folder)}


def test_command_line_brings_back_both_streams_and_the_exit_code(tmp_path: pathlib.Path) -> None:
    env = _module(tmp_path, "import sys; print(sys.argv[1:]); print('oh', file=sys.stderr); sys.exit(3)")
    result = run_cli(["--seed", "a b", tmp_path], env=env, module="planted")
    assert (result.returncode, result.stdout, result.stderr) == (3, f"['--seed', 'a b', '{tmp_path}']\n", "oh\n")
    assert 0 < result.seconds < 60


def test_command_line_of_two_ranks_runs_under_torchrun(tmp_path: pathlib.Path) -> None:
    env = _module(tmp_path, "import os; print(f\"rank {os.environ['RANK']} of {os.environ['WORLD_SIZE']}\\n\", end='')")
    result = run_cli([], num_ranks=2, env=env, module="planted")
    assert result.returncode == 0, result.stderr
    assert sorted(result.stdout.splitlines()) == ["rank 0 of 2", "rank 1 of 2"]


def _starts_another(folder: pathlib.Path, then: str, output: str) -> dict[str, str]:
    """A program that starts another in a session of its own, as torchrun starts its ranks."""
    source = f"""
        import os, pathlib, subprocess, time
        apart = subprocess.Popen(["sleep", "600"], start_new_session=True, stdout={output}, stderr={output})
        pathlib.Path({str(folder)!r}, "pids").write_text(f"{{os.getpid()}} {{apart.pid}}")
        print("still here", flush=True)
        {then}
    """
    return _module(folder, source)


def _assert_nothing_runs(folder: pathlib.Path) -> None:
    pids = [int(pid) for pid in (folder / "pids").read_text().split()]
    assert len(pids) == 2
    assert not any(_runs(pid) for pid in pids)


def test_a_command_that_hangs_is_killed_with_what_it_started(tmp_path: pathlib.Path) -> None:
    env = _starts_another(tmp_path, "time.sleep(600)", output="None")
    with pytest.raises(AssertionError, match=r"still running after 3 s(.|\n)*still here"):
        run_cli([], timeout=3.0, env=env, module="planted")
    _assert_nothing_runs(tmp_path)


def test_what_a_command_leaves_behind_is_killed(tmp_path: pathlib.Path) -> None:
    env = _starts_another(tmp_path, "os._exit(0)", output="subprocess.DEVNULL")
    assert run_cli([], env=env, module="planted").returncode == 0
    _assert_nothing_runs(tmp_path)


def _runs(pid: int) -> bool:
    try:
        return " Z " not in pathlib.Path(f"/proc/{pid}/stat").read_text()
    except FileNotFoundError:
        return False
