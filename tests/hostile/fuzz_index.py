"""Searches for files of weights that break the index: ``python -m tests.hostile.fuzz_index --minutes 5``.

Whatever a file says, reading its header ends soon, in little memory, in an index that the file bears out or in one
line that names the file. Prints how many inputs were tried and accepted; exits 1 with the first input that breaks the
rule. An input that kills or stops the process itself stays in the folder that is printed at the beginning.
"""

from __future__ import annotations

import argparse
import collections
import contextlib
import faulthandler
import json
import math
import os
import resource
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path

import hypothesis
import hypothesis.strategies as st
import safetensors
import torch
from hypothesis import HealthCheck

from ltx_sp.errors import UnsupportedError, WeightsError
from ltx_sp.weights.index import DTYPE_BYTES, Index, read_index
from tests.hostile import fuzz_inputs

MAX_SECONDS = 5.0  # a busy machine needs most of it
MAX_BYTES = 2**29
TORCH_DTYPES = {torch.int64: "I64", torch.float32: "F32", torch.bfloat16: "BF16", torch.uint8: "U8"}


@contextlib.contextmanager
def little_memory() -> Iterator[None]:
    """Let the address space grow by ``MAX_BYTES`` at most."""
    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (used + MAX_BYTES, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, (soft, hard))


def index_or_refusal(path: Path) -> Index | None:
    """Index what is at ``path`` and assert that it is sound; None if it is refused as it must be."""
    began = time.perf_counter()
    try:
        with little_memory():
            index = read_index(path)
    except (WeightsError, UnsupportedError) as error:
        message = str(error)
        assert str(path) in message, f"the path is not in: {message}"
        assert message.isprintable(), f"not one printable line: {message!r}"
        assert message.endswith("."), f"no sentence: {message}"
        assert len(message) - message.count(str(path)) * len(str(path)) < 800, f"{len(message)} characters: {message}"
        return None
    finally:
        seconds = time.perf_counter() - began
        assert seconds < MAX_SECONDS, f"took {seconds:.1f} s"
    for file in index.files:
        require_sound(index, file)
    return index


def require_sound(index: Index, file: Path) -> None:
    entries = [entry for entry in index.entries.values() if entry.file == file]
    size, end, before = file.stat().st_size, 0, None
    for entry in sorted(entries, key=lambda entry: (entry.start, entry.end)):
        assert 8 <= entry.start <= entry.end <= size, f"{entry} is outside of its file"
        assert math.prod(entry.shape) * DTYPE_BYTES[entry.dtype] == entry.num_bytes, f"{entry} has other bytes"
        assert all(type(size) is int and 0 <= size < 2**63 for size in entry.shape)
        assert entry.stamp is not None
        assert entry.stamp.size == size
        tied = file.suffix == ".bin" and before == (entry.start, entry.end)
        assert entry.start >= end or tied or not entry.num_bytes, f"{entry} overlaps what ends at {end}"
        if entry.num_bytes:
            end, before = entry.end, (entry.start, entry.end)
    assert all(index.entries[name].name == name for name in index.entries)


def write_and_index(path: Path, content: bytes) -> tuple[Path, Index | None]:
    path.write_bytes(content)
    return path, index_or_refusal(path)


def check_safetensors(folder: Path, content: bytes) -> bool:
    _, index = write_and_index(folder / "model.safetensors", content)
    if index is None:
        return False
    ends = [entry.end for entry in sorted(index.entries.values(), key=lambda entry: (entry.start, entry.end))]
    starts = sorted(entry.start for entry in index.entries.values())
    assert [*starts, len(content)] == [8 + int.from_bytes(content[:8], "little"), *ends], "gaps or overlaps"
    try:
        stored = dict(safetensors.deserialize(content))  # type: ignore[no-untyped-call]
    except safetensors.SafetensorError:
        # White space before the object is JSON, and not for the library; it also reads fields that nobody needs.
        table = json.loads(content[8 : starts[0] if starts else None])
        tensors = [fields for name, fields in table.items() if name != "__metadata__"]
        assert not content[8:].startswith(b"{") or any(len(fields) > 3 for fields in tensors)
        return True
    assert stored.keys() == index.entries.keys()
    for name, entry in index.entries.items():
        assert stored[name]["dtype"] == entry.dtype
        assert tuple(stored[name]["shape"]) == entry.shape
        assert bytes(stored[name]["data"]) == content[entry.start : entry.end]
    return True


def check_index_text(folder: Path, content: bytes) -> bool:
    inside = folder / "folder"
    if not inside.exists():
        inside.mkdir()
        for name, names in fuzz_inputs.TENSORS.items():
            (inside / name).write_bytes(fuzz_inputs.shard(names))
        (inside / "folder").mkdir()
        (inside / "link").symlink_to("absent")
        os.mkfifo(inside / "pipe")
    (inside / "model.safetensors.index.json").write_bytes(content)
    index = index_or_refusal(inside)
    assert index is None or all(file.parent == inside for file in index.files)
    return index is not None


def check_program(folder: Path, content: bytes) -> bool:
    _, index = write_and_index(folder / "model.bin", content)
    return index is not None


def check_pickled(folder: Path, content: bytes) -> bool:
    """Not for programs: torch does not survive them all."""
    path, index = write_and_index(folder / "model.bin", content)
    if index is None:
        return False
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            loaded = torch.load(path, weights_only=True)
    except Exception:  # torch has its own reasons, such as checksums, and its own errors
        return True
    for name, entry in index.entries.items():
        tensor = loaded["state_dict"][name] if isinstance(loaded.get("state_dict"), dict) else loaded[name]
        assert TORCH_DTYPES[tensor.dtype] == entry.dtype
        assert tuple(tensor.shape) == entry.shape
        stored = tensor.detach().reshape(-1).view(torch.uint8).numpy().tobytes() if tensor.numel() else b""
        assert stored == content[entry.start : entry.end]
    return True


Check = Callable[[Path, bytes], bool]
KINDS: dict[str, tuple[st.SearchStrategy[bytes], Check]] = {
    "headers": (fuzz_inputs.safetensors_files(), check_safetensors),
    "safetensors bytes": (fuzz_inputs.raw_safetensors(), check_safetensors),
    "index JSON": (fuzz_inputs.index_texts(), check_index_text),
    "pickle programs": (fuzz_inputs.pickled_files(), check_program),
    "pickle bytes": (fuzz_inputs.raw_pickled(), check_pickled),
}


def search(kind: str, folder: Path, num_examples: int, seed: int | None = None) -> collections.Counter[bool]:
    """Try inputs of one kind: how many were accepted (True) and refused.

    Raises:
        Exception: of the smallest input found that breaks the rule, which Hypothesis adds to it.
    """
    strategy, check = KINDS[kind]
    outcomes: collections.Counter[bool] = collections.Counter()

    @hypothesis.settings(
        max_examples=num_examples, deadline=None, database=None, derandomize=seed is None, print_blob=False,
        suppress_health_check=list(HealthCheck),
    )  # fmt: skip
    @hypothesis.given(content=strategy)
    def property_(content: bytes) -> None:
        if seed is not None:
            faulthandler.dump_traceback_later(60, exit=True)
        outcomes[check(folder, content)] += 1

    (property_ if seed is None else hypothesis.seed(seed)(property_))()
    return outcomes


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=5.0)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    faulthandler.enable()
    began, seed, found = time.monotonic(), arguments.seed, 0
    outcomes: dict[str, collections.Counter[bool]] = {kind: collections.Counter() for kind in KINDS}
    with tempfile.TemporaryDirectory(prefix="fuzz_index-") as name:
        print(f"seed {seed}, inputs in {name}", flush=True)
        while time.monotonic() - began < arguments.minutes * 60 and not found:
            for kind in KINDS:
                try:
                    outcomes[kind] += search(kind, Path(name), 200, seed)
                except Exception as error:
                    found += 1
                    print(f"{kind}, seed {seed}: {type(error).__name__}: {error}", *error.__notes__, sep="\n")
            seed += 1
        faulthandler.cancel_dump_traceback_later()
    for kind, counts in outcomes.items():
        print(f"{kind:18} {counts.total():8} tried {counts[True]:8} accepted {counts[False]:8} refused")
    total = sum(counts.total() for counts in outcomes.values())
    print(f"{total} inputs in {time.monotonic() - began:.0f} s, {found} findings")
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main())
