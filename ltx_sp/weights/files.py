"""Which files a folder's weights are in, and the JSON beside them.

No torch. Names and texts come from whoever made the folder, and are believed only as far as they
are checked here.
"""

from __future__ import annotations

import json
import os
import re
import reprlib
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from ltx_sp.errors import WeightsError

__all__ = [
    "FETCH_AGAIN",
    "MAX_TEXT_BYTES",
    "PICKLED_SUFFIXES",
    "access",
    "parse_object",
    "quote",
    "read_object",
    "require_content",
    "status_of",
    "weight_files",
]

# 40 000 tensors are described in 6 MB. Parsed, a text that means harm takes twenty times its size.
MAX_TEXT_BYTES = 32_000_000
PICKLED_SUFFIXES = (".bin", ".pth", ".pt")
FETCH_AGAIN = "Fetch it again."

_KINDS = ((".safetensors",), (".bin",), (".pth", ".pt"))  # the first that a folder has holds its weights
# What trainers leave beside the weights, under the same suffixes.
_NOT_WEIGHTS = ("training_args", "optimizer", "scheduler", "scaler", "rng_state", "random_states")
_MAX_NAME = 255

# Escapes of surrogates: two make a character, one alone makes text that cannot be written anywhere.
_HALF_CHARACTER = re.compile(r"\\u[dD][89a-fA-F]")

_short = reprlib.Repr()
_short.maxlevel, _short.maxlist, _short.maxtuple, _short.maxdict, _short.maxlong = 3, 8, 8, 4, 40


def weight_files(folder: Path) -> tuple[tuple[Path, ...], dict[str, Path]]:
    """Choose the files of a folder that hold its weights, with the file of each tensor if an index JSON says so.

    Safetensors before ``.bin`` before ``.pth`` and ``.pt``. Files may be links to elsewhere; what an index JSON
    names must lie beside it. Blocks the host.

    Raises:
        WeightsError: there are none, or the index JSON is damaged, names something else, or is one of several.
    """
    with access(folder):
        names = sorted(name for name in os.listdir(folder) if not name.startswith("."))
    for suffixes in _KINDS:
        index_names = [name for name in names if name.endswith(tuple(f"{suffix}.index.json" for suffix in suffixes))]
        if len(index_names) > 1:
            raise WeightsError(
                f"{folder} has {len(index_names)} index files ({', '.join(map(quote, index_names[:3]))}); it must have "
                "at most one. Keep the one of the checkpoint that you mean."
            )
        if index_names:
            weight_map = _read_weight_map(folder / _printable(index_names[0], folder))
            return tuple(sorted(set(weight_map.values()))), weight_map
        shards = [name for name in names if name.endswith(suffixes) and not name.startswith(_NOT_WEIGHTS)]
        # Some repositories hold a second, unsharded copy of the same weights.
        shards = [name for name in shards if not name.startswith("consolidated")] or shards
        if shards:
            return tuple(folder / _printable(name, folder) for name in shards), {}
    raise WeightsError(
        f"{folder} holds no .safetensors file, nor one in {', '.join(PICKLED_SUFFIXES)}; it must hold the weights. "
        "Check the path."
    )


def _printable(name: str, folder: Path) -> str:
    """Pass a name on that may stand in a message."""
    if not name.isprintable():
        raise WeightsError(f"{folder} holds {quote(name)}; the name of a file must be printable. Rename it.")
    return name


def _read_weight_map(path: Path) -> dict[str, Path]:
    names = read_object(path).get("weight_map")
    if not isinstance(names, dict) or not names:
        raise WeightsError(f"{path} has no weight_map object, which must map tensors to files. {FETCH_AGAIN}")
    folder = path.parent
    shards: dict[str, Path] = {}
    weight_map: dict[str, Path] = {}
    for name, shard in names.items():
        if not isinstance(shard, str) or (shard not in shards and not _is_file_name(shard)):
            raise WeightsError(
                f"{path} puts tensor {quote(name)} into {quote(shard)}; it must name a file beside itself. "
                f"{FETCH_AGAIN}"
            )
        if shard not in shards:
            shards[shard] = folder / shard
        weight_map[name] = shards[shard]
    return weight_map


def _is_file_name(name: str) -> bool:
    inside = name not in ("", ".", "..") and "/" not in name and "\\" not in name
    return inside and len(name) <= _MAX_NAME and name.isprintable()


def read_object(path: Path) -> dict[str, Any]:
    """Read a JSON file that holds an object.

    Blocks the host.

    Raises:
        WeightsError: absent, unreadable, over 32 MB, not JSON, or not an object.
    """
    size = status_of(path).st_size
    if size > MAX_TEXT_BYTES:
        raise WeightsError(f"{path} has {size} bytes; a JSON file may have {MAX_TEXT_BYTES}. {FETCH_AGAIN}")
    with access(path), path.open("rb") as file:
        text = file.read(MAX_TEXT_BYTES)
    return parse_object(text, str(path))


def parse_object(text: bytes | str, what: str) -> dict[str, Any]:
    """Parse a JSON object in which no key occurs twice; ``what`` names it in errors.

    Raises:
        WeightsError: it is something else.
    """
    try:
        # Explicitly UTF-8: json.loads would also accept UTF-16 and UTF-32.
        decoded = text.decode("utf-8") if isinstance(text, bytes) else text
        value = json.loads(decoded, object_pairs_hook=_unique)
        if _HALF_CHARACTER.search(decoded):
            json.dumps(value, ensure_ascii=False).encode("utf-8")  # raises where one stands alone
    except (ValueError, RecursionError) as error:
        raise WeightsError(f"{what} is not a valid JSON object ({error}). {FETCH_AGAIN}") from error
    if not isinstance(value, dict):
        raise WeightsError(f"{what} is a JSON {type(value).__name__}; it must be an object. {FETCH_AGAIN}")
    return value


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    table = dict(pairs)
    if len(table) != len(pairs):
        seen: set[str] = set()
        for key, _ in pairs:
            if key in seen:
                raise ValueError(f"key {quote(key)} occurs twice")
            seen.add(key)
    return table


def quote(value: object) -> str:
    """Quote something that a file says, for a message: escaped, and short enough for one line."""
    text = repr(value) if isinstance(value, str) else _short.repr(value)
    return text if len(text) <= 120 else f"{text[:100]}... ({len(text)} characters)"


@contextmanager
def access(path: Path) -> Iterator[None]:
    """Turn what the file system answers about ``path`` into a WeightsError."""
    try:
        yield
    except FileNotFoundError as error:
        raise WeightsError(
            f"{path} does not exist; it must hold weights or their description. Check the path."
        ) from error
    except PermissionError as error:
        raise WeightsError(f"{path} may not be read by this user. Grant read access to it.") from error
    except (OSError, ValueError) as error:  # ValueError: a name that no file system can hold
        reason = error.strerror if isinstance(error, OSError) else error
        raise WeightsError(f"{path} cannot be read ({reason}). Check the path and the disk.") from error


def status_of(path: Path) -> os.stat_result:
    """Ask what ``path`` is: a file or a folder, links followed.

    Raises:
        WeightsError: neither.
    """
    with access(path):
        status = path.stat()
    # A pipe or a device would block or never end.
    if not (stat.S_ISREG(status.st_mode) or stat.S_ISDIR(status.st_mode)):
        raise WeightsError(f"{path} is neither a file nor a folder; it must be one of them. Check the path.")
    return status


def require_content(path: Path, start: bytes, kind: str) -> None:
    """Raise a WeightsError for a file of which ``start``, its first bytes, shows that its content never came."""
    if not start:
        raise WeightsError(f"{path} is empty; it must be {kind}. {FETCH_AGAIN}")
    if start.startswith(b"version "):
        raise WeightsError(f"{path} is a Git LFS pointer; it must be the file itself. Fetch it with `git lfs pull`.")
