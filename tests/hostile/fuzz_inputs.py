"""What is tried on the index: files of weights and index JSONs that are whole, damaged or made up."""

from __future__ import annotations

import io
import json
import math
import pickle
import struct
import zipfile
from typing import Any

import hypothesis.strategies as st
import torch

from ltx_sp.weights.index import DTYPE_BYTES


class Raw(str):
    """JSON text that no value stands for."""


class Pairs(list[tuple[Any, Any]]):
    """A JSON object, with its keys in order and perhaps twice."""


def encode(value: Any) -> str:
    if isinstance(value, Raw):
        return str(value)
    if isinstance(value, Pairs):
        return "{" + ",".join(f"{json.dumps(key)}:{encode(item)}" for key, item in value) + "}"
    if isinstance(value, list):
        return "[" + ",".join(map(encode, value)) + "]"
    return json.dumps(value)


EDGES = [-1, 0, 1, 2, 3, 2**31 - 1, 2**31, 2**32, 2**53, 2**53 + 1, 2**61, 2**63 - 1, 2**63, 2**64, -(2**63), 10**100]
NUMBERS = st.one_of(st.integers(0, 20), st.sampled_from(EDGES), st.integers(), st.booleans(), st.floats())
NAMES = st.one_of(
    st.sampled_from(["a", "b", "c.weight", "__metadata__", "", "\ud800", "\x1b[2J", "a\nb", "\u202e", "x" * 3000]),
    st.text(max_size=8),
    st.text(st.characters(exclude_categories=()), max_size=4),
)
DEPTHS = (20, 400, 900, 3000)
RAW = st.sampled_from(
    [
        *(Raw("[" * depth + "]" * depth) for depth in DEPTHS),
        *(Raw('{"a":' * depth + "1" + "}" * depth) for depth in DEPTHS),
        *(Raw("[" * depth) for depth in (900, 100_000)),
        *(Raw("9" * digits) for digits in (30, 4300, 4301, 100_000)),
        *map(Raw, ("1e999", "-1e999", "-0", "1E2", "NaN", "Infinity", "01", "tru", "'a'", '"\\ud800"', '"\\u00', "")),
        Raw("[" + "1," * 70 + "1]"),
        Raw("[" + "0," * 50_000 + "0]"),
    ]
)  # fmt: skip
JUNK = st.recursive(
    st.one_of(st.none(), NUMBERS, NAMES, RAW),
    lambda inner: st.one_of(
        st.lists(inner, max_size=4), st.lists(st.tuples(NAMES, inner), max_size=3).map(Pairs), st.lists(NUMBERS)
    ),
    max_leaves=6,
)


@st.composite
def damaged(draw: st.DrawFn, value: Any) -> Any:
    """The value with one place in it replaced, removed, doubled or exchanged."""
    if isinstance(value, (list, Pairs)) and value and draw(st.integers(0, 9)):
        changed, at = type(value)(value), draw(st.integers(0, len(value) - 1))
        match draw(st.sampled_from(("into", "into", "into", "remove", "double", "swap", "rename"))):
            case "into" if isinstance(value, Pairs):
                key, inner = changed[at]
                changed[at] = (key, draw(damaged(inner)))
            case "into":
                changed[at] = draw(damaged(changed[at]))
            case "remove":
                del changed[at]
            case "double":
                changed.insert(at, changed[at])
            case "swap":
                other = draw(st.integers(0, len(value) - 1))
                changed[at], changed[other] = changed[other], changed[at]
            case _ if isinstance(value, Pairs):
                changed[at] = (draw(NAMES), changed[at][1])
        return changed
    return draw(st.one_of(NUMBERS, JUNK))


@st.composite
def altered(draw: st.DrawFn, content: bytes, *, most: int = 3) -> bytes:
    """The bytes with some set, cut out, doubled or put in."""
    changed = bytearray(content)
    for _ in range(draw(st.integers(0, most))):
        at = draw(st.integers(0, len(changed)))
        match draw(st.sampled_from(("set", "set", "digit", "flip", "cut", "double", "insert", "truncate"))):
            case "set":
                changed[at : at + 1] = bytes([draw(st.integers(0, 255))])
            case "digit":
                changed[at : at + 1] = draw(st.sampled_from([*'0123456789{}[]",:'])).encode()
            case "flip" if at < len(changed):
                changed[at] ^= 1 << draw(st.integers(0, 7))
            case "cut":
                del changed[at : at + draw(st.integers(1, 40))]
            case "double":
                changed[at:at] = changed[at : at + draw(st.integers(1, 40))]
            case "insert":
                changed[at:at] = draw(st.binary(max_size=9))
            case "truncate":
                del changed[at:]
    return bytes(changed)


@st.composite
def headers(draw: st.DrawFn) -> tuple[Pairs, bytes]:
    """A valid header, and its data."""
    table, end = Pairs(), 0
    for name in draw(st.lists(NAMES.filter(lambda name: name != "__metadata__"), max_size=4, unique=True)):
        dtype = draw(st.sampled_from(list(DTYPE_BYTES)))
        shape = draw(st.lists(st.integers(0, 4), max_size=3))
        start, end = end, end + math.prod(shape) * DTYPE_BYTES[dtype]
        table.append((name, Pairs([("dtype", dtype), ("shape", shape), ("data_offsets", [start, end])])))
    if draw(st.booleans()):
        table.append(("__metadata__", Pairs([("format", "pt")])))
    return Pairs(draw(st.permutations(table))), bytes(i % 251 for i in range(end))


@st.composite
def moved(draw: st.DrawFn, table: Pairs) -> Pairs:
    """The header with the offsets of some tensors moved, or the tensors away."""
    changed = Pairs()
    for name, fields in table:
        by = draw(st.sampled_from([0, 0, 0, 1, -1, 2, 8, None]))
        if by is None:
            continue
        offsets = dict(fields).get("data_offsets")
        first, last = (0, 0) if offsets is None else offsets
        moved_fields = [(key, [first + by, last + by] if key == "data_offsets" else item) for key, item in fields]
        changed.append((name, Pairs(moved_fields)))
    return changed


@st.composite
def safetensors_files(draw: st.DrawFn) -> bytes:
    table, data = draw(headers())
    if draw(st.booleans()):
        table = draw(moved(table))
    for _ in range(draw(st.integers(0, 2))):
        table = draw(damaged(table))
    text = encode(table).encode(draw(st.sampled_from(["utf-8"] * 9 + ["utf-16"])), "surrogatepass")
    text += b" " * draw(st.sampled_from([0, 0, 0, 7]))
    edges = (len(text) + 1, len(text) - 1, 0, 32_000_001, 2**31, 2**63, 2**64 - 1)
    length = draw(st.sampled_from([len(text)] * 20 + [edge for edge in edges if edge >= 0]))
    content = length.to_bytes(8, "little") + text + data
    return draw(altered(content, most=1)) if draw(st.integers(0, 3)) == 0 else content


@st.composite
def raw_safetensors(draw: st.DrawFn) -> bytes:
    table, data = draw(headers())
    text = encode(table).encode("utf-8", "surrogatepass")
    whole = len(text).to_bytes(8, "little") + text + data
    return draw(st.one_of(altered(whole), altered(whole), st.binary(max_size=200)))


SHARDS = ["a.safetensors", "b.safetensors"]
TENSORS = {"a.safetensors": ["a", "b"], "b.safetensors": ["c"]}


def shard(names: list[str]) -> bytes:
    table = Pairs(
        (name, Pairs([("dtype", "U8"), ("shape", [2]), ("data_offsets", [2 * i, 2 * i + 2])]))
        for i, name in enumerate(names)
    )
    text = encode(table).encode()
    return len(text).to_bytes(8, "little") + text + bytes(2 * len(names))


@st.composite
def index_texts(draw: st.DrawFn) -> bytes:
    shards = st.one_of(
        st.sampled_from(SHARDS),
        st.sampled_from(
            ["../a.safetensors", "/etc/passwd", "folder", "link", "pipe", "absent", ".", "..", "a\0", "a\n"]
        ),
        NAMES,
        JUNK,
    )
    weight_map = Pairs((name, file) for file, names in TENSORS.items() for name in names)
    for _ in range(draw(st.integers(0, 2))):
        weight_map.append((draw(NAMES), draw(shards)))
    table = Pairs([("metadata", Pairs([("total_size", draw(NUMBERS))])), ("weight_map", weight_map)])
    if draw(st.booleans()):
        table = draw(damaged(table))
    text = encode(table).encode("utf-8", "surrogatepass")
    return draw(st.one_of(st.just(text), st.just(text), altered(text, most=2), st.binary(max_size=100)))


def saved(value: Any) -> bytes:
    buffer = io.BytesIO()
    torch.save(value, buffer)
    return buffer.getvalue()


WEIGHT = torch.arange(6.0).reshape(2, 3)
SAVED = [
    saved({"a": WEIGHT, "b": torch.arange(4), "c": WEIGHT[1]}),
    saved({"state_dict": torch.nn.Linear(2, 3).state_dict(), "epoch": 3}),
    saved({"a": torch.nn.Parameter(WEIGHT.bfloat16()), "tied": WEIGHT, "b": WEIGHT, "empty": torch.empty(0)}),
]


def archive(records: dict[str, bytes]) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as file:
        for name, content in records.items():
            file.writestr(f"x/{name}", content)
    return buffer.getvalue()


def instructions(value: Any) -> bytes:
    return pickle.dumps(value, 2)[2:-1]


PICKLED_VALUES = st.recursive(
    st.one_of(st.none(), st.integers(-3, 9), st.sampled_from(EDGES), st.floats(), st.text(max_size=5)),
    lambda inner: st.one_of(
        st.lists(inner, max_size=3), st.lists(inner, max_size=3).map(tuple), st.dictionaries(st.text(max_size=3), inner)
    ),
    max_leaves=5,
)
FRAGMENTS = st.one_of(
    st.sampled_from([bytes([code]) for code in b"()}]tRQbsuae012.\x85\x86\x87\x88\x89N"]),
    st.sampled_from([b"q\0", b"q\1", b"h\0", b"h\1", b"r\xff\xff\xff\xff", b"j\xff\xff\xff\xff", b"M\xff\xff", b"K\3"]),
    st.sampled_from([b"q\0h\0\x86" * 40, b"\x85" * 20_000, b"]q\0h\0a", b"}q\0X\1\0\0\0ah\0s", b"(" * 2000]),
    st.sampled_from(
        ["torch FloatStorage", "torch.storage UntypedStorage", "torch._utils _rebuild_tensor_v2", "torch bfloat16",
         "torch._utils _rebuild_tensor_v3", "torch._utils _rebuild_parameter", "collections OrderedDict",
         "os system", "builtins eval", "torch load"]
    ).map(lambda text: b"c" + text.replace(" ", "\n").encode() + b"\n"),
    st.just(b"(X\7\0\0\0storagectorch\nFloatStorage\nX\1\0\0\0\x30X\3\0\0\0cpuK\3tQ"),
    PICKLED_VALUES.map(instructions),
    st.binary(max_size=4),
)  # fmt: skip


WIDTHS = {"Float": 4, "Half": 2, "BFloat16": 2, "Byte": 1, "Bool": 1, "Int": 4, "QInt8": 1}


@st.composite
def described(draw: st.DrawFn) -> bytes:
    """A tensor in a storage of twelve bytes, with most of its fields right."""

    def field(right: Any) -> bytes:
        return instructions(draw(PICKLED_VALUES) if draw(st.integers(0, 19)) == 0 else right)

    kind = draw(st.sampled_from(list(WIDTHS)))
    count = 12 // WIDTHS[kind]
    shape = draw(st.sampled_from([(count,), (1, count), (count, 1), (count, 1, 1), (), (2,), (0, 4), (count + 1,)]))
    strides = tuple(math.prod(shape[i + 1 :]) for i in range(len(shape)))
    before = (field("storage"), f"ctorch\n{kind}Storage\n".encode(), field("0"), field("cpu"), field(count))
    after = (field(0), field(shape), field(strides), field(False), field({}))
    return b"".join([b"ctorch._utils\n_rebuild_tensor_v2\n((", *before, b"tQ", *after, b"tR"])


@st.composite
def pickled_files(draw: st.DrawFn) -> bytes:
    """An archive whose pickle is put together from instructions."""
    tensors = draw(st.lists(described(), min_size=1, max_size=2))
    items = b"".join(f"X\1\0\0\0{i}".encode() + tensor + b"s" for i, tensor in enumerate(tensors))
    parts = draw(st.lists(FRAGMENTS, max_size=draw(st.sampled_from([0, 0, 2, 12]))))
    program = draw(st.sampled_from([b"}" + items + b"".join(parts), b"".join(parts) + b"}" + items, b"".join(parts)]))
    records = {"data.pkl": b"\x80\2" + program + b".", "byteorder": b"little", "data/0": bytes(range(12))}
    if draw(st.integers(0, 9)) == 0:
        records[draw(st.sampled_from(["byteorder", "data/0"]))] = draw(st.binary(max_size=24))
    return archive(records)


@st.composite
def raw_pickled(draw: st.DrawFn) -> bytes:
    whole = draw(st.sampled_from(SAVED))
    if draw(st.booleans()):
        return draw(st.one_of(altered(whole), altered(whole), st.binary(max_size=300)))
    # Numbers in the directory and its end, which single bytes seldom reach.
    changed = bytearray(whole)
    first = whole.index(b"PK\1\2")
    ends = [len(whole) - back for back in (6, 10, 12, 34, 50, 58, 66)]
    for _ in range(draw(st.integers(1, 2))):
        at = draw(st.one_of(st.sampled_from(ends), st.integers(first, len(whole) - 8)))
        form = draw(st.sampled_from(["<H", "<I", "<Q"] if at + 8 <= len(whole) else ["<H", "<I"]))
        edges = [edge for edge in (*EDGES, len(whole)) if 0 <= edge < 256 ** struct.calcsize(form)]
        struct.pack_into(form, changed, at, draw(st.sampled_from(edges)))
    return bytes(changed)
