"""Files that are broken, or that mean harm: one sentence that names the file, and never anything else."""

from __future__ import annotations

import io
import json
import math
import os
import pickle
import random
import struct
import time
import tracemalloc
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from ltx_sp.errors import WeightsError
from ltx_sp.weights.index import DTYPE_BYTES, Index, read_index

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
    "shape of many small sizes": (with_b(shape=[1] * 64 + [3]), "a list of at most 64 sizes"),
    "shape of deep lists": (swap(b"[3]", b"[" * 300 + b"]" * 300), r"tensor 'b' has shape \[\[\[\[\.\.\.\]\]\]\];"),
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
    "names with control characters": (encode({"\x1b[2J\n": 1}), r"'\\x1b\[2J\\n'"),
    "names of half characters": (encode({"\ud800": GOOD["a"]}), "can't encode character '.ud800'"),
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
    (tmp_path / "model.safetensors").write_bytes(encode({"\U0001f3ac": GOOD["a"]}, DATA[:16]))
    assert list(read_index(tmp_path).entries) == ["\U0001f3ac"]
    (tmp_path / "model.safetensors").write_bytes(encode({}, b""))
    assert read_index(tmp_path).entries == {}


def test_a_header_over_the_limit_is_not_read(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    with path.open("wb") as file:
        file.write((100_000_000).to_bytes(8, "little"))
        file.truncate(200_000_000)
    refused(path, "promises a header of 100000000 bytes .* has at most 32000000 bytes")


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
    for entry in index.entries.values():
        assert 8 <= entry.start <= entry.end <= size
        assert math.prod(entry.shape) * DTYPE_BYTES[entry.dtype] == entry.num_bytes


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
        (shard_index({"a": "\ud800"}), "can't encode character"),
        (shard_index({"a": "x" * 256}), "beside itself"),
        (shard_index({"a": "x\ny.safetensors"}), r"into 'x\\ny\.safetensors'; it must name a file beside itself"),
        (shard_index({"a": "\x1b[2J.safetensors"}), "beside itself"),
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
    refused(tmp_path, r"has 2 index files \('a\.safetensors\.index\.json', 'b", named=str(tmp_path))


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

        def deny(path: Path, mode: str, buffering: int) -> None:
            raise PermissionError(13, "Permission denied")

        monkeypatch.setattr(Path, "open", deny)
    refused(path, r"model\.safetensors may not be read by this user\. Grant read access")


def test_a_file_with_a_name_that_no_message_can_show_is_refused(tmp_path: Path) -> None:
    (tmp_path / "x\n\x1b[2J.safetensors").write_bytes(WHOLE)
    refused(tmp_path, r"holds 'x\\n\\x1b\[2J\.safetensors'; the name of a file must be printable", str(tmp_path))


@pytest.mark.parametrize("name", ["model.safetensors", "model.bin"])
def test_a_file_that_is_cut_while_it_is_read_is_refused(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, pread = tmp_path / name, os.pread
    path.write_bytes(WHOLE if name.endswith("s") else saved())

    def cut_after_reading(descriptor: int, length: int, offset: int) -> bytes:
        content = pread(descriptor, length, offset)
        os.truncate(path, 8)
        return content

    monkeypatch.setattr(os, "pread", cut_after_reading)
    refused(path, "ended while its header was read|is cut short", name)


def test_a_shard_without_permission_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("a", "b"):
        (tmp_path / f"{name}.safetensors").write_bytes(encode({name: GOOD["a"] | {"shape": [4]}}, DATA[:16]))
    stat = Path.stat

    def deny(path: Path, **options: Any) -> os.stat_result:
        if path.name == "b.safetensors":
            raise PermissionError(13, "Permission denied")
        return stat(path, **options)

    monkeypatch.setattr(Path, "stat", deny)
    refused(tmp_path, r"b\.safetensors may not be read by this user", "b.safetensors")


def saved() -> bytes:
    buffer = io.BytesIO()
    torch.save({"a": torch.arange(4), "b": torch.ones(3)}, buffer)
    return buffer.getvalue()


def archive(records: dict[str, bytes], method: int = zipfile.ZIP_STORED) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", method) as file:
        for name, content in records.items():
            file.writestr(f"model/{name}", content)
    return buffer.getvalue()


def records_of(content: bytes) -> dict[str, bytes]:
    with zipfile.ZipFile(io.BytesIO(content)) as file:
        return {name.partition("/")[2]: file.read(name) for name in file.namelist()}


SAVED = saved()
RECORDS = records_of(SAVED)


def pickled(*instructions: bytes) -> bytes:
    return archive(RECORDS | {"data.pkl": b"\x80\x02" + b"".join(instructions)})


def described(**changes: Any) -> bytes:
    """A state dict of one tensor, described by hand."""
    fields = {
        "typename": "storage", "kind": b"ctorch\nFloatStorage\n", "key": "1", "location": "cpu", "count": 3,
        "offset": 0, "shape": (3,), "strides": (1,), "flags": b"", "end": b"s.",
    } | changes  # fmt: skip
    before = ("typename", "kind", "key", "location", "count")
    after = ("offset", "shape", "strides")
    return pickled(
        b"}X\1\0\0\0bctorch._utils\n_rebuild_tensor_v2\n((", *(put(fields[name]) for name in before),
        b"tQ", *(put(fields[name]) for name in after), b"\x89}", put(fields["flags"]), b"tR", put(fields["end"]),
    )  # fmt: skip


def put(value: Any) -> bytes:
    """The instructions that put a value onto the stack; bytes are such instructions."""
    return value if isinstance(value, bytes) else pickle.dumps(value, 2)[2:-1]


def with_size(change: int) -> bytes:
    """The central directory's size of record data/1, 12 bytes, changed."""
    at = SAVED.rindex(b"/data/1") - SAVED[: SAVED.rindex(b"/data/1")][::-1].index(b"PK\1\2"[::-1]) - 4
    assert struct.unpack_from("<I", SAVED, at + 24) == (12,)
    content = bytearray(SAVED)
    struct.pack_into("<2I", content, at + 20, 12 + change, 12 + change)
    return bytes(content)


HASH_BOMB = b"})" + b"q\0h\0\x86" * 60 + b"Ns."

PICKLES: dict[str, tuple[bytes, str]] = {
    "empty": (b"", "is empty"),
    "git lfs": (b"version https://git-lfs.github.com/spec/v1\n", "Git LFS pointer"),
    "html": (b"<!DOCTYPE html><html>" * 9, "does not end with the directory of a zip"),
    "zeros": (bytes(4096), "does not end with the directory of a zip"),
    "safetensors": (WHOLE, "does not end with the directory of a zip"),
    "bare pickle": (pickle.dumps({"a": 1}), "does not end with the directory of a zip"),
    "end cut": (SAVED[:-1], "does not end with the directory of a zip"),
    "beginning cut": (SAVED[100:], "it is cut short"),
    "half": (SAVED[: len(SAVED) // 2], "does not end with the directory of a zip"),
    "bytes after the end": (SAVED + b"x", "does not end with the directory of a zip"),
    "directory at 2^64 - 1": (SAVED[:-34] + b"\xff" * 8 + SAVED[-26:], "it is cut short"),
    "directory of 2^63 bytes": (SAVED[:-58] + (2**63).to_bytes(8, "little") + SAVED[-50:], "its zip directory ends at"),
    "directory over the limit": (
        bytes(32_000_001) + struct.pack("<4s4H2IH", b"PK\5\6", 0, 0, 1, 1, 32_000_001, 0, 0),
        "its directory has 32000001 bytes",
    ),
    "record twice": (SAVED.replace(b"/data/1", b"/data/0"), "data/0' occurs twice"),
    "record not counted": (SAVED[:-66] + b"\1" + SAVED[-65:], r"has \d+ records and promises 1"),
    "no records": (archive({}), "it has no record 'data.pkl'"),
    "no pickle": (archive({"data/0": b"x"}), "it has no record 'data.pkl'"),
    "compressed": (archive(RECORDS, zipfile.ZIP_DEFLATED), "data.pkl.* is not stored as it is"),
    "zip bomb": (archive({"data.pkl": bytes(50_000_000)}, zipfile.ZIP_DEFLATED), "is not stored as it is"),
    "pickle over the limit": (archive({"data.pkl": bytes(16_000_001)}), "at most 16000000 are read"),
    "big-endian": (archive(RECORDS | {"byteorder": b"big"}), "its byte order is b'big', not little"),
    "byte order unknown": (archive(RECORDS | {"byteorder": b"\n" * 99}), "its byte order is"),
    "storage absent": (archive({"data.pkl": RECORDS["data.pkl"]}), "it has no record 'data/0'"),
    "storage shorter": (with_size(-4), "of 12 bytes, which has 8"),
    "storage longer": (with_size(4), "of 12 bytes, which has 16"),
    "storage beyond the records": (with_size(2**30), "is not where its directory says"),
    "pickle empty": (pickled(), "its pickle is cut short"),
    "pickle cut": (archive(RECORDS | {"data.pkl": RECORDS["data.pkl"][:-9]}), "its pickle is cut short"),
    "stack empty": (pickled(b"."), "takes more than it has put down"),
    "stack below a mark": (pickled(b"}(NNs."), "takes more than it has put down"),
    "mark absent": (pickled(b"}u."), "takes more than it has put down"),
    "memo absent": (pickled(b"h\7."), "takes more than it has put down"),
    "number": (pickled(b"K\1."), "it holds a int and must hold a dict"),
    "list filled": (pickled(b"]NNs."), "fills something that is no dict"),
    "key twice": (pickled(b"}X\1\0\0\0aNsX\1\0\0\0aNs."), "key 'a' occurs twice"),
    "stack of a million": (pickled(b"N" * 10**6), "puts down more than 100000 things"),
    "record under another name": (SAVED.replace(b"/data/1", b"/data/7", 1), "is not where its directory says"),
    "text cut": (pickled(b"X\xff\xff\xff\xffa."), "its pickle is cut short"),
    "text not UTF-8": (pickled(b"X\1\0\0\0\xff."), "text that is not UTF-8"),
    "name without end": (pickled(b"c" + b"a" * 5000), "its pickle is cut short"),
    "name with control characters": (pickled(b"c\x1b[2J\r\nx\n."), r"asks for '\\x1b\[2J\\r x'"),
    "os.system": (pickled(b"cos\nsystem\nX\4\0\0\0true\x85R."), "asks for 'os system', and nothing but plain tensors"),
    "bytearray(2 GB)": (pickled(b"cbuiltins\nbytearray\nJ\0\0\0\x7f\x85R."), "asks for 'builtins bytearray'"),
    "name by STACK_GLOBAL": (pickled(b"X\2\0\0\0osX\6\0\0\0system\x93."), r"has instruction b'\\x93'"),
    "instance by INST": (pickled(b"(ios\nsystem\n."), "has instruction b'i'"),
    "instance by NEWOBJ": (pickled(b"ctorch\nFloatStorage\n)\x81."), r"has instruction b'\\x81'"),
    "extension": (pickled(b"\x82\1."), r"has instruction b'\\x82'"),
    "call of a storage": (pickled(b"ctorch\nFloatStorage\nJ\0\0\0\x7f\x85R."), "rebuilds something that is no plain"),
    "call of a number": (pickled(b"K\1)R."), "rebuilds something that is no plain"),
    "call with a dict": (pickled(b"ccollections\nOrderedDict\n}R."), "rebuilds something that is no plain"),
    "state for a name": (pickled(b"ctorch\nFloatStorage\n}b."), "gives a state to something that is no dict"),
    "reference to a path": (pickled(b"X\1\0\0\0xQ."), "refers to 'x', which is no storage"),
    "reference to a module": (described(typename="module"), r"refers to \('module'"),
    "key that takes 2^60 steps to hash": (pickled(HASH_BOMB), "no value of its dict is a tensor"),
    "key nested deep": (pickled(b"})" + b"\x85" * 100_000 + b"Ns."), "no value of its dict is a tensor"),
    "shape that takes 2^60 steps to print": (
        described(shape=b")" + b"q\0h\0\x86" * 60),
        "tensor 'b' has shape",
    ),
    "tensor that takes 2^60 steps to print": (
        described(shape=b")" + b"q\0h\0\x86" * 60, end=b"Q."), "which is no storage"
    ),
    "itself": (pickled(b"}q\0X\1\0\0\0ah\0s."), "no value of its dict is a tensor"),
    "storage key a path": (described(key="../../data.pkl"), "it has no record 'data/../../data.pkl'"),
    "storage key with control characters": (described(key="\n\x1b"), r"it has no record 'data/\\n\\x1b'"),
    "storage of another size": (described(count=4), "of 16 bytes, which has 12"),
    "storage huge": (described(count=2**70), "which has 12"),
    "storage negative": (described(count=-3), "which is no storage"),
    "storage of 2^2000": (described(count=2**2000), "which has 12"),
    "shape of another size": (described(shape=(4,)), "has 16 bytes from element 0 of a storage of 12 bytes"),
    "shape huge": (described(shape=(2**62,)), r"has shape \(4611686018427387904,\), which is none"),
    "shape negative": (described(shape=(-1, -3), strides=(1, 1)), "which is none"),
    "shape of floats": (described(shape=(3.0,)), "which is none"),
    "shape a list": (described(shape=[3]), "which is none"),
    "shape of 65 sizes": (described(shape=(1,) * 65, strides=(1,) * 65), "which is none"),
    "strides of another number": (described(strides=(3, 1)), "must be contiguous"),
    "strides negative": (described(strides=(-1,)), "must be contiguous"),
    "strides a number": (described(strides=1), "must be contiguous"),
    "offset negative": (described(offset=-1), "from element -1 of"),
    "offset beyond the storage": (described(offset=1), "from element 1 of a storage of 12 bytes"),
    "offset huge": (described(offset=2**64), "from element 18446744073709551616 of"),
    "offset a float": (described(offset=0.0), "from element 0.0 of"),
    "flags": (described(flags=put({"conj": True})), "rebuilds something that is no plain tensor"),
}  # fmt: skip


@pytest.mark.parametrize("fault", PICKLES)
def test_a_broken_pickle_is_refused(tmp_path: Path, fault: str) -> None:
    content, match = PICKLES[fault]
    path = tmp_path / "model.bin"
    path.write_bytes(content)
    began = time.perf_counter()
    refused(path, match, "model.bin")
    assert time.perf_counter() - began < 60


def test_what_is_described_by_hand_is_accepted(tmp_path: Path) -> None:
    """Else the faults above would not be what is refused."""
    path = tmp_path / "model.bin"
    for content in (SAVED, archive(RECORDS), described(), described(flags=put({})), with_size(0)):
        path.write_bytes(content)
        index = read_index(path)
        check_readable(index, len(content))
        assert content[index.entries["b"].start :][:12] == struct.pack("<3f", 1, 1, 1)


class Payload:
    """Creates a file when it is unpickled by whoever runs what a pickle asks for."""

    def __init__(self, made: Path):
        self.made = made

    def __reduce__(self) -> tuple[Any, ...]:
        return (open, (str(self.made), "w"))


@pytest.mark.parametrize("name", ["model.bin", "model.pth", "model.pt"])
@pytest.mark.parametrize("legacy", [False, True])
def test_code_in_a_pickle_is_not_run(tmp_path: Path, name: str, legacy: bool) -> None:
    made, path = tmp_path / "made", tmp_path / name
    state = {"a": torch.ones(2), "b": Payload(made)}
    torch.save(state, path, _use_new_zipfile_serialization=not legacy)
    torch.load(path, weights_only=False)
    assert made.exists(), "the payload must work, or this shows nothing"
    made.unlink()
    refused(path, "in the format from before 2020" if legacy else "asks for 'io open'", name)
    refused(tmp_path, "is not a plain state dict", name)
    assert not made.exists()
