"""What every test gets: fixed seeds, one thread, the golden folder, and skips for hardware that is not there."""

from __future__ import annotations

import logging
import os
import pathlib
import random
import signal
import sys
from collections.abc import Iterator

import numpy
import pytest

# Before torch starts its threads: sums then come out alike on every machine, and test workers do not crowd each other.
os.environ.setdefault("OMP_NUM_THREADS", "1")
# Nor is a layout to depend on what was measured on this machine.
os.environ["LTX_SP_CACHE"] = os.devnull
# What is started in the background, or under nohup, ignores these, and so would all commands that tests start.
for _number, _handler in ((signal.SIGINT, signal.default_int_handler), (signal.SIGHUP, signal.SIG_DFL)):
    if signal.getsignal(_number) is signal.SIG_IGN:
        signal.signal(_number, _handler)

_TESTS = pathlib.Path(__file__).parent
_DEVICES_NEEDED = {"gpu": 1, "multigpu": 2}


@pytest.fixture(scope="session")
def golden() -> pathlib.Path:
    """Folder of the files that the reference implementation produced."""
    return _TESTS / "golden"


@pytest.fixture(scope="session")
def demo(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    """Folder of a tiny checkpoint of version 2.3 and its ``gemma``; copy before you change it."""
    from ltx_sp.demo import write_demo

    return write_demo(tmp_path_factory.mktemp("demo") / "2.3").parent


@pytest.fixture(autouse=True)
def _log() -> Iterator[None]:
    """Undo what the command line does to the package's logger, which lives as long as the test worker."""
    log = logging.getLogger("ltx_sp")
    before = log.handlers[:], log.level, log.propagate
    yield
    log.handlers[:], log.propagate = before[0], before[2]
    log.setLevel(before[1])


@pytest.fixture(autouse=True)
def _seeds() -> None:
    random.seed(0)
    numpy.random.seed(0)
    if "torch" in sys.modules:  # a test that needs no torch should not wait for it
        sys.modules["torch"].manual_seed(0)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark the tests of the folders ``gpu`` and ``multigpu``, then skip what this machine cannot run."""
    for item in items:
        folder = item.path.relative_to(_TESTS).parts[0]
        if folder in _DEVICES_NEEDED:
            item.add_marker(folder)
            # What CUDA's libraries have to say there is not ours, and differs from build to build.
            item.add_marker(pytest.mark.filterwarnings("default"))
    for mark, needed in _DEVICES_NEEDED.items():
        marked = [item for item in items if item.get_closest_marker(mark)]
        if marked and (found := _num_devices()) < needed:
            for item in marked:
                item.add_marker(pytest.mark.skip(reason=f"needs {needed} CUDA device(s), this machine has {found}"))


def _num_devices() -> int:
    import torch

    return torch.cuda.device_count() if torch.cuda.is_available() else 0
