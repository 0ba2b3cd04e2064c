"""Loads that run beside the main thread, and what happens on all ranks when one of them fails."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager

import torch

from ltx_sp.parallel.collectives import Axis
from ltx_sp.parallel.mesh import together

__all__ = ["Job", "Loading"]


@dataclasses.dataclass(frozen=True)
class Job:
    """Something to be loaded.

    Args:
        crew: the ranks that do it together; all of them must have the job.
        after: the job that must be done before; for a job of a thread of its own.
        is_late: begins when the main thread is done.
    """

    name: str
    crew: Axis
    work: Callable[[], None]
    after: str | None = None
    is_late: bool = False


class Loading:
    """Loads under way: what each waits for is what it raises."""

    def __init__(self) -> None:
        self.done: dict[str, Future[None]] = {}
        self.failure: Exception | None = None

    def wait(self, *names: str) -> None:
        """Wait until these are loaded. Blocks the host."""
        for name in names:
            if name in self.done:
                self.done[name].result()

    def finish(self) -> None:
        """Wait for everything; of several failures the first is raised. Blocks the host."""
        self.wait(*self.done)

    def check(self) -> None:
        """Raise what has failed anywhere."""
        if self.failure is not None:
            raise self.failure

    @contextmanager
    def running(self, jobs: Sequence[Job], device: torch.device) -> Iterator[None]:
        """Run jobs one after the other, and those with an ``after`` beside them; on leaving wait for their end.

        Collective along each job's crew. An exception that leaves the block stops the jobs on all ranks.
        """
        loader = ThreadPoolExecutor(1, "ltx_sp-load", _enter_thread, (device,))
        merger = ThreadPoolExecutor(1, "ltx_sp-merge", _enter_thread, (device,))

        def submit(job: Job) -> None:
            self.done[job.name] = (loader if job.after is None else merger).submit(self._run, job)

        late, can_end = [job for job in jobs if job.is_late], True
        try:
            for job in jobs:
                if not job.is_late:
                    submit(job)
            yield
            for job in late:
                submit(job)
            self.finish()
        except Exception as error:
            self.failure = self.failure or error
            for job in late:
                if job.name not in self.done:
                    submit(job)  # to which ranks that have not failed come too
            raise
        except BaseException:
            self.failure = self.failure or RuntimeError("The run was stopped.")
            can_end = False  # it may be in an exchange that others have left
            raise
        finally:
            for executor in (loader, merger):
                executor.shutdown(wait=can_end)

    def _run(self, job: Job) -> None:
        try:
            # Every job begins so, or a rank that failed between two of them would be waited for.
            with together(job.crew):
                self.check()
            if job.after is not None:
                self.wait(job.after)
            job.work()
        except Exception as error:
            self.failure = self.failure or error
            raise


def _enter_thread(device: torch.device) -> None:
    """Make the device this thread's own; a new thread begins on the first, whatever the others use."""
    if device.type == "cuda":
        torch.cuda.set_device(device)
