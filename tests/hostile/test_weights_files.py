"""Files that are broken, or that mean harm: one sentence that names the file, and never anything else."""

from __future__ import annotations

import json
import os
import random
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from ltx_sp.errors import WeightsError
from ltx_sp.weights.index import DTYPE_BYTES, Index, read_index
from ltx_sp.weights.reader import read

GOOD: dict[str, Any] = {
    "__metadata__": {"format": "pt"},
    "a": {"dtype": "F32", "shape": [2, 2], "data_offsets": [0, 16]},
    "b": {"dtype": "U8", "shape": [3], "data_offsets": [16, 19]},
}
DATA = bytes(range(19))


def encode(header: Any, data: bytes = DATA) -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + data


def with_b(**changes: Any) -> bytes:
    return encode(GOOD | {"b": GOOD["b"] | changes})


def swap(old: bytes, new: bytes) -> bytes:
    text = json.dumps(GOOD).encode()
    assert old in text
    return encode(text.replace(old, new))


WHOLE = encode(GOOD)
DEEP = b"[" * 200_000

BROKEN: dict[str, tuple[bytes, str]] = {
    "empty": (b"", "is empty"),
    "7 bytes": (WHOLE[:7], "has 7 bytes"),
    "only a length": (WHOLE[:8], "promises a header of"),
    "header cut": (WHOLE[:60], "promises a header of"),
    "header longer than the file": ((10_000).to_bytes(8, "little") + WHOLE[8:], "promises a header of 10000 bytes"),
    "header of 2^64 - 1 bytes": (b"\xff" * 8 + WHOLE[8:], "promises a header of 18446744073709551615"),
    "no header": (encode(b""), "not a valid JSON object"),
    "git lfs": (b"version https://git-lfs.github.com/spec/v1\n", "Git LFS pointer"),
    "html": (b"<!DOCTYPE html><html>" * 9, "promises a header of"),
    "zeros": (bytes(4096), "not a valid JSON object"),
    "not JSON": (encode(b"{'a': 1}"), "not a valid JSON object"),
    "not UTF-8": (swap(b'"a"', b'"\xff"'), "not a valid JSON object"),
    "UTF-16": (encode(json.dumps(GOOD).encode("utf-16")), "not a valid JSON object"),
    "text after the object": (encode(json.dumps(GOOD).encode() + b"{}"), "not a valid JSON object"),
    "not an object": (encode([1, 2]), "is a JSON list"),
    "null": (encode(b"null"), "is a JSON NoneType"),
    "too deep": (encode(DEEP), "not a valid JSON object"),
    "deep in a tensor": (encode(b'{"a":' + DEEP), "not a valid JSON object"),
    "digits without end": (encode(b'{"a":' + b"9" * 10_000 + b"}"), "not a valid JSON object"),
    "key twice": (encode(b'{"a":1,"a":1}'), "key 'a' occurs twice"),
    "field twice": (swap(b'"dtype": "U8"', b'"dtype": "U8", "dtype": "U8"'), "key 'dtype' occurs twice"),
    "metadata a list": (encode(GOOD | {"__metadata__": []}), "metadata"),
    "metadata of numbers": (encode(GOOD | {"__metadata__": {"a": 1}}), "metadata"),
    "metadata null": (encode(GOOD | {"__metadata__": None}), "metadata"),
    "tensor null": (encode(GOOD | {"b": None}), "tensor 'b' has dtype None"),
    "tensor a list": (encode(GOOD | {"b": [1]}), "tensor 'b' has dtype None"),
    "dtype unknown": (with_b(dtype="F7"), "tensor 'b' has dtype 'F7'"),
    "dtype a list": (with_b(dtype=["U8"]), "tensor 'b' has dtype"),
    "dtype of another width": (with_b(dtype="I16"), r"tensor 'b' has 3 bytes; I16 \[3\] needs 6"),
    "shape absent": (with_b(shape=None), "tensor 'b' has shape None"),
    "shape a number": (with_b(shape=3), "tensor 'b' has shape 3"),
    "shape negative": (with_b(shape=[-1, -3]), "tensor 'b' has shape"),
    "shape of a float": (with_b(shape=[3.0]), "tensor 'b' has shape"),
    "shape of a bool": (with_b(shape=[True, 3]), "tensor 'b' has shape"),
    "shape of text": (with_b(shape=["3"]), "tensor 'b' has shape"),
    "shape of infinity": (swap(b"[3]", b"[1e999]"), "tensor 'b' has shape"),
    "shape that overflows to its size": (with_b(shape=[3, 2**32, 2**32]), "tensor 'b' has shape"),
    "shape that no stride spans": (with_b(shape=[0, 2**62, 2**62], data_offsets=[16, 16]), "tensor 'b' has shape"),
    "shape beyond 64 bits": (with_b(shape=[2**64, 0], data_offsets=[16, 16]), "tensor 'b' has shape"),
    "shape of many large sizes": (with_b(shape=[2**62] * 50_000), "tensor 'b' has shape"),
    "shape of another size": (with_b(shape=[4]), "tensor 'b' has 3 bytes"),
    "offsets absent": (with_b(data_offsets=None), "tensor 'b' has data_offsets None"),
    "one offset": (with_b(data_offsets=[16]), "tensor 'b' has data_offsets"),
    "three offsets": (with_b(data_offsets=[16, 19, 19]), "tensor 'b' has data_offsets"),
    "offsets negative": (with_b(data_offsets=[-3, 0]), "tensor 'b' has data_offsets"),
    "offsets backward": (with_b(data_offsets=[19, 16]), "tensor 'b' has data_offsets"),
    "offsets of floats": (with_b(data_offsets=[16.0, 19.0]), "tensor 'b' has data_offsets"),
    "offsets beyond 64 bits": (with_b(data_offsets=[2**70, 2**70 + 3]), "tensor 'b' has data_offsets"),
    "offsets overlapping": (with_b(data_offsets=[15, 18]), "overlaps tensor 'a'"),
    "offsets shared": (encode(GOOD | {"c": GOOD["b"]}), "overlaps tensor 'b'"),
    "offsets with a gap": (with_b(data_offsets=[17, 20]), "leaves a gap after tensor 'a'"),
    "first tensor not first": (encode({"b": GOOD["b"]}), "leaves a gap after the header"),
    "offsets out of the file": (with_b(shape=[2**40], data_offsets=[16, 16 + 2**40]), "its header promises 10995116"),
    "data cut": (WHOLE[:-1], rf"ends at byte {len(WHOLE) - 1}, its header promises {len(WHOLE)}\. Fetch it again"),
    "no data": (WHOLE[: -len(DATA)], "ends at byte"),
    "bytes after the data": (WHOLE + b"x", rf"ends at byte {len(WHOLE) + 1}, its header promises {len(WHOLE)}\."),
    "long names": (encode({"x" * 10_000: 1}), r"\(10002 characters\)"),
    "names with control characters": (encode({"\x1b[2J\n\ud800": 1}), r"'\\x1b\[2J\\n\\ud800'"),
}


def refused(path: Path, match: str, named: str = "model.safetensors") -> None:
    tracemalloc.start()
    with pytest.raises(WeightsError, match=match) as caught:
        read_index(path)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    message = str(caught.value)
    assert named in message
    assert message.endswith(".")
    assert message.isprintable()
    assert len(message) < 1000
    assert peak < 32e6, "a file must not decide how much memory is taken"


@pytest.mark.parametrize("fault", BROKEN)
def test_a_broken_file_is_refused(tmp_path: Path, fault: str) -> None:
    content, match = BROKEN[fault]
    (tmp_path / "model.safetensors").write_bytes(content)
    refused(tmp_path / "model.safetensors", match)
    refused(tmp_path, match)


def test_the_whole_file_is_accepted(tmp_path: Path) -> None:
    (tmp_path / "model.safetensors").write_bytes(WHOLE)
    assert sorted(read_index(tmp_path).entries) == ["a", "b"]
    (tmp_path / "model.safetensors").write_bytes(encode({}, b""))
    assert read_index(tmp_path).entries == {}


def test_a_header_over_the_limit_is_not_read(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    with path.open("wb") as file:
        file.write((100_000_001).to_bytes(8, "little"))
        file.truncate(200_000_000)
    refused(path, "promises a header of 100000001 bytes")


def test_random_damage_is_refused_or_harmless(tmp_path: Path) -> None:
    """Two thousand files with one to four bytes changed, removed or doubled."""
    path = tmp_path / "model.safetensors"
    chance = random.Random(0)
    accepted = 0
    for _ in range(2000):
        content = bytearray(WHOLE)
        for _ in range(chance.randint(1, 4)):
            at = chance.randrange(len(content) - len(DATA))
            action = chance.choice(("set", "set", "cut", "double"))
            if action == "set":
                content[at] = chance.choice((chance.randrange(256), *b'0123456789[]{}",:'))
            else:
                content[at : at + 1] = b"" if action == "cut" else bytes(content[at : at + 1]) * 2
        path.write_bytes(content)
        try:
            index = read_index(path)
        except WeightsError:
            continue
        accepted += 1
        check_readable(index, len(content))
    assert 0 < accepted < 1000


def check_readable(index: Index, size: int) -> None:
    for entry, tensor in read(list(index.entries.values()), num_threads=1):
        assert 8 <= entry.start <= entry.end <= size
        assert tensor.nbytes == entry.num_bytes
        assert entry.dtype in DTYPE_BYTES


def shard_index(weight_map: Any) -> str:
    return json.dumps({"weight_map": weight_map})


@pytest.mark.parametrize(
    ("text", "match"),
    [
        ("", "not a valid JSON object"),
        ("[" * 100_000, "not a valid JSON object"),
        ("[]", "is a JSON list"),
        ("{}", "no weight_map"),
        (shard_index([]), "no weight_map"),
        (shard_index({}), "no weight_map"),
        ('{"weight_map": {"a": "x", "a": "y"}}', "key 'a' occurs twice"),
        (shard_index({"a": "../model.safetensors"}), r"puts tensor 'a' into '\.\./model\.safetensors'"),
        (shard_index({"a": "/etc/passwd"}), "beside itself"),
        (shard_index({"a": "sub/model.safetensors"}), "beside itself"),
        (shard_index({"a": "..\\model.safetensors"}), "beside itself"),
        (shard_index({"a": ".."}), "beside itself"),
        (shard_index({"a": ""}), "beside itself"),
        (shard_index({"a": "x\0y"}), "beside itself"),
        (shard_index({"a": 3}), "beside itself"),
        (shard_index({"a": None}), "beside itself"),
        (shard_index({"a": ["x"]}), "beside itself"),
        (shard_index({"a": "absent.safetensors"}), r"absent\.safetensors does not exist"),
        (shard_index({"a": "\ud800"}), "cannot be read"),
        (shard_index({"a": "x" * 300}), "cannot be read"),
        (shard_index({"a": "folder"}), "folder is a folder"),
        (shard_index({"c": "model.safetensors"}), r"model\.safetensors lacks tensor 'c'"),
    ],
)
def test_a_broken_index_json_is_refused(tmp_path: Path, text: str, match: str) -> None:
    (tmp_path / "model.safetensors").write_bytes(WHOLE)
    (tmp_path / "folder").mkdir()
    (tmp_path / "model.safetensors.index.json").write_text(text)
    with pytest.raises(WeightsError, match=match) as caught:
        read_index(tmp_path)
    assert str(tmp_path) in str(caught.value)


def test_two_index_files_are_refused(tmp_path: Path) -> None:
    for name in ("a", "b"):
        (tmp_path / f"{name}.safetensors.index.json").write_text("{}")
    refused(tmp_path, r"has 2 index files \(a\.safetensors\.index\.json, b", named=str(tmp_path))


def make_loop(path: Path) -> None:
    path.symlink_to(path)


def make_dangling_link(path: Path) -> None:
    path.symlink_to(path.parent / "absent")


@pytest.mark.parametrize(
    ("make", "match"),
    [
        (lambda path: None, "does not exist"),
        (os.mkfifo, "neither a file nor a folder"),
        (make_loop, "cannot be read"),
        (make_dangling_link, "does not exist"),
        (Path.mkdir, r"holds no \.safetensors file"),
    ],
    ids=["nothing", "pipe", "loop", "dangling link", "empty folder"],
)
def test_what_is_not_a_file_is_refused(tmp_path: Path, make: Callable[[Path], None], match: str) -> None:
    make(tmp_path / "model.safetensors")
    refused(tmp_path / "model.safetensors", match)


def test_a_pipe_among_the_shards_does_not_block(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "model.safetensors")
    refused(tmp_path, "neither a file nor a folder")


def test_a_file_that_may_not_be_read_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "model.safetensors"
    path.write_bytes(WHOLE)
    path.chmod(0)
    if os.access(path, os.R_OK):  # root may read everything

        def deny(path: Path, mode: str) -> None:
            raise PermissionError(13, "Permission denied")

        monkeypatch.setattr(Path, "open", deny)
    refused(path, r"model\.safetensors may not be read by this user\. Grant read access")
