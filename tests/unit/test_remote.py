"""Oracle: the bytes that a small object store in this process was given, and what it counted."""

from __future__ import annotations

import contextlib
import dataclasses
import http.server
import random
import sys
import threading
import time
import tracemalloc
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from email.utils import formatdate
from pathlib import Path
from typing import Any
from urllib.parse import unquote

import pytest
import torch
from safetensors.torch import save

from ltx_sp.errors import UnsupportedError, WeightsError
from ltx_sp.weights import remote
from ltx_sp.weights.index import FileStamp, read_index
from ltx_sp.weights.reader import Ring, stream
from ltx_sp.weights.remote import is_remote, read_remote, remote_stamp
from ltx_sp.weights.stripes import ByteStream

MIB = 2**20
PATH = Path("s3://weights/ltx/model.safetensors")
URL = "s3://weights/ltx/model.safetensors"
NEEDS_BOTO3 = "needs boto3, which the s3 extra installs"


@dataclasses.dataclass
class Counts:
    """What the store has seen of GET requests: ``peak`` of them at once, ``sent`` bytes of bodies."""

    requests: int = 0
    connections: int = 0
    in_flight: int = 0
    peak: int = 0
    sent: int = 0


class Request(http.server.BaseHTTPRequestHandler):
    """One connection to a ``Store``."""

    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True
    server: Store
    begin, end = 0, 0
    length: int | None = None

    def setup(self) -> None:
        super().setup()
        with self.server.lock:
            self.server.counts.connections += 1

    def do_HEAD(self) -> None:
        if not self.server.fault(self):
            content = self.server.objects.get(unquote(self.path))
            if content is None:
                self.start(404, 0)
            else:
                self.start(200, len(content))

    def do_GET(self) -> None:
        counts, lock = self.server.counts, self.server.lock
        with lock:
            counts.requests += 1
            counts.in_flight += 1
            counts.peak = max(counts.peak, counts.in_flight)
        try:
            first, _, last = self.headers["Range"].removeprefix("bytes=").partition("-")
            self.begin, self.end = int(first), int(last) + 1
            if not self.server.fault(self):
                self.answer()
        finally:
            with lock:
                counts.in_flight -= 1

    def answer(self) -> None:
        content = self.server.objects.get(unquote(self.path))
        if content is None:
            self.refuse(404, "NoSuchKey")
        elif self.begin >= len(content):
            self.refuse(416, "InvalidRange")
        else:
            end = min(self.end, len(content))
            self.start(206, end - self.begin, f"bytes {self.begin}-{end - 1}/{len(content)}")
            self.send(memoryview(content)[self.begin : end])

    def start(self, status: int, length: int, content_range: str = "") -> None:
        self.send_response(status)
        self.send_header("Content-Length", str(length))
        self.send_header("Last-Modified", formatdate(self.server.time, usegmt=True))
        self.send_header("ETag", '"0"')
        if content_range:
            self.send_header("Content-Range", content_range)
        self.end_headers()

    def send(self, data: bytes | memoryview) -> None:
        with self.server.lock:
            self.server.counts.sent += len(data)
        with contextlib.suppress(BrokenPipeError, ConnectionResetError):
            self.wfile.write(data)

    def refuse(self, status: int, code: str) -> None:
        text = f"<?xml version='1.0'?><Error><Code>{code}</Code><Message>no</Message></Error>".encode()
        self.start(status, len(text))
        if self.command == "GET":
            self.wfile.write(text)

    def log_message(self, *arguments: object) -> None:
        pass


class Store(http.server.ThreadingHTTPServer):
    """An object store in this process: HEAD and GET of ranges.

    ``fault`` is asked first about every request; it returns whether it has answered.
    """

    request_queue_size = 128
    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Request)
        self.lock, self.over = threading.Lock(), threading.Event()
        self.forget()

    def forget(self) -> None:
        self.over.set()  # whoever still answers shall end
        self.over = threading.Event()
        self.objects: dict[str, bytes] = {}
        self.time = 1_700_000_000
        self.counts = Counts()
        self.fault: Callable[[Request], bool] = lambda request: False

    def put(self, url: str, content: bytes) -> None:
        self.objects["/" + url.removeprefix("s3://")] = content

    def handle_error(self, request: object, client_address: object) -> None:
        pass


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Store]:
    """The store that the AWS environment of this module names; one, because a client takes half a second."""
    pytest.importorskip("boto3", reason=NEEDS_BOTO3)
    absent = str(tmp_path_factory.mktemp("aws") / "absent")
    with Store() as server, pytest.MonkeyPatch.context() as patch:
        for name in ("AWS_PROFILE", "AWS_DEFAULT_PROFILE", "AWS_SESSION_TOKEN", "AWS_ENDPOINT_URL_S3"):
            patch.delenv(name, raising=False)
        patch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{server.server_port}")
        patch.setenv("AWS_ACCESS_KEY_ID", "key")
        patch.setenv("AWS_SECRET_ACCESS_KEY", "secret")
        patch.setenv("AWS_DEFAULT_REGION", "us-east-1")
        patch.setenv("AWS_EC2_METADATA_DISABLED", "true")
        patch.setenv("AWS_CONFIG_FILE", absent)
        patch.setenv("AWS_SHARED_CREDENTIALS_FILE", absent)
        patch.setenv("NO_PROXY", "*")
        patch.setattr(remote, "_PAUSE_SECONDS", 0.01)
        remote._make_client.cache_clear()
        thread = threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True)
        thread.start()
        yield server
        server.forget()
        server.shutdown()
        thread.join()
        remote._make_client.cache_clear()


@pytest.fixture
def store(server: Store) -> Store:
    server.forget()
    return server


@pytest.fixture
def new_client() -> Iterator[None]:
    """For tests that change what a client is made from."""
    remote._make_client.cache_clear()
    yield
    remote._make_client.cache_clear()


def content_of(num_bytes: int) -> bytes:
    return random.Random(num_bytes).randbytes(num_bytes)


def read(offset: int, num_bytes: int, path: Path = PATH) -> bytes:
    content = bytearray(num_bytes)
    read_remote(path, offset, [memoryview(content)])
    return bytes(content)


def explain(action: Callable[[], object], *, seconds: float = 30, url: str = URL) -> str:
    """What an error says, which is one line about the object, soon."""
    start = time.monotonic()
    with pytest.raises(WeightsError) as caught:
        action()
    text = str(caught.value)
    assert time.monotonic() - start < seconds
    assert url in text
    assert text.isprintable()
    assert text.endswith(".")
    assert len(text) < 400
    return text


@pytest.mark.parametrize(
    ("path", "expected"),
    [
        ("s3://bucket/key", True),
        ("s3:/bucket/key", True),
        ("s3://bucket", True),
        ("/s3:/bucket/key", False),
        ("s3/bucket/key", False),
        ("s3:key", False),
        ("gs://bucket/key", False),
        ("model.safetensors", False),
        ("", False),
    ],
)
def test_remote_is_what_begins_with_s3(path: str, expected: bool) -> None:
    assert is_remote(Path(path)) is expected


@pytest.mark.parametrize("action", [lambda: read(0, 8), lambda: remote_stamp(PATH)])
def test_without_boto3_says_how_to_install_it(monkeypatch: pytest.MonkeyPatch, action: Callable[[], object]) -> None:
    monkeypatch.setitem(sys.modules, "boto3", None)
    with pytest.raises(UnsupportedError, match=rf'{URL} .*pip install "ltx-sp\[s3\]"'):
        action()


def test_every_range_has_the_bytes_of_the_object(store: Store) -> None:
    content = content_of(5 * MIB + 17)
    store.put(URL, content)
    draw = random.Random(0)
    ranges = [(0, len(content)), (1, 2 * MIB), (2 * MIB - 1, 2), (len(content) - 1, 1), (0, 1), (3 * MIB, 2 * MIB)]
    begins = draw.sample(range(len(content)), 10)
    ranges += [(begin, draw.randrange(1, len(content) - begin + 1)) for begin in begins]
    for begin, count in ranges:
        store.counts = Counts()
        assert read(begin, count) == content[begin : begin + count]
        assert store.counts.sent == count


def test_buffers_are_filled_one_after_the_other_and_nothing_else_is(store: Store) -> None:
    content = content_of(3 * MIB)
    store.put(URL, content)
    draw = random.Random(1)
    for _ in range(5):
        memory = bytearray(b"\xa5" * (4 * MIB))
        expected, buffers, at, offset = bytearray(memory), list[memoryview](), 0, draw.randrange(MIB)
        begin = offset
        while len(buffers) < 40:
            at += draw.randrange(3)  # neighbours and gaps
            count = draw.choice([0, 1, 7, draw.randrange(100_000)])
            buffers.append(memoryview(memory)[at : at + count])
            expected[at : at + count] = content[offset : offset + count]
            at, offset = at + count, offset + count
        read_remote(PATH, begin, buffers)
        assert memory == expected


def test_keys_with_marks_of_urls(store: Store) -> None:
    url = "s3://weights/a b+c%20/\u00e9?d#e&f=.safetensors"
    store.put(url, b"0123456789")
    assert read(3, 4, Path(url)) == b"3456"


def test_no_bytes_are_no_request(store: Store) -> None:
    read_remote(PATH, 0, [])
    read_remote(PATH, 0, [memoryview(b"")])
    assert store.counts.requests == 0


def test_threads_read_at_once_and_every_byte_comes_once(store: Store) -> None:
    content = content_of(24 * MIB)
    store.put(URL, content)
    begins = range(0, len(content), 3 * MIB)
    with ThreadPoolExecutor(4) as threads:
        parts = list(threads.map(lambda begin: read(begin, 3 * MIB), begins))
    assert b"".join(parts) == content
    assert store.counts.sent <= 1.05 * len(content)


def test_one_call_has_many_requests_in_flight(store: Store) -> None:
    content = content_of(16 * MIB)
    store.put(URL, content)
    together = threading.Barrier(8)  # nobody is answered before eight have asked

    def hold(request: Request) -> bool:
        together.wait(5)
        return False

    store.fault = hold
    assert read(0, len(content)) == content
    assert store.counts.peak == 8


def test_requests_in_flight_are_bounded(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(remote, "_PART_BYTES", 1000)
    content = content_of(100_000)
    store.put(URL, content)

    def hold(request: Request) -> bool:
        return store.over.wait(0.05)

    store.fault = hold
    with ThreadPoolExecutor(4) as threads:
        assert list(threads.map(lambda _: read(0, len(content)), range(4))) == [content] * 4
    assert 16 < store.counts.peak <= 32
    assert store.counts.requests == 400
    assert store.counts.connections <= 64  # they are used again


def test_memory_does_not_grow_with_the_request(store: Store) -> None:
    content = bytes(96 * MIB)
    store.put(URL, content)
    memory = memoryview(bytearray(b"\1" * len(content)))
    tracemalloc.start()
    try:
        read_remote(PATH, 0, [memory])
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert memory == content
    assert peak < 48 * MIB


def test_stamp_is_size_and_time_of_change(store: Store) -> None:
    store.put(URL, b"0123456789")
    assert remote_stamp(PATH) == remote_stamp(Path("s3:/weights/ltx/model.safetensors"))
    assert remote_stamp(PATH) == FileStamp(10, 1_700_000_000 * 10**9)
    store.time += 1
    assert remote_stamp(PATH) == FileStamp(10, 1_700_000_001 * 10**9)


def test_object_is_read_like_a_file(store: Store) -> None:
    generator = torch.Generator().manual_seed(0)
    tensors = {f"{i}": torch.randn(i, 300, generator=generator) for i in range(20)}
    store.put(URL, save(tensors))
    source = ByteStream(list(read_index(PATH).entries.values()))
    got = bytearray()
    for chunk in stream(source, Ring(2, 2**16), source.chunks(0, source.num_bytes, 2**16)):
        for _, data in chunk.parts:
            got += data.numpy().tobytes()
    expected = bytearray(source.num_bytes)
    for piece in source.pieces(0, source.num_bytes):
        name = source.entries[piece.place].name
        expected[piece.position : piece.position + piece.end - piece.begin] = tensors[name].numpy().tobytes()
    assert got == expected


@pytest.mark.parametrize("url", [URL, "s3://other/ltx/model.safetensors"])
def test_absent_object(store: Store, url: str) -> None:
    store.put("s3://weights/ltx/another", b"0")
    assert "does not exist" in explain(lambda: read(0, 8, Path(url)), url=url)
    assert "does not exist" in explain(lambda: remote_stamp(Path(url)), url=url)


@pytest.mark.parametrize("path", ["s3:", "s3://weights", "s3://weights/", "s3://we ights/key", "s3://w!/key"])
def test_path_that_names_no_object(store: Store, path: str) -> None:
    assert "names no object" in explain(lambda: read(0, 8, Path(path)), url="s3://")
    assert "names no object" in explain(lambda: remote_stamp(Path(path)), url="s3://")
    assert store.counts.requests == 0


@pytest.mark.parametrize("code", ["AccessDenied", "InvalidAccessKeyId", "ExpiredToken", "a\nb" * 1000])
def test_no_permission(store: Store, code: str) -> None:
    def refuse(request: Request) -> bool:
        request.refuse(403, code)
        return True

    store.fault = refuse
    assert "may not be read" in explain(lambda: read(0, 8))
    assert "may not be read" in explain(lambda: remote_stamp(PATH))
    assert store.counts.requests == 1


@pytest.mark.usefixtures("store", "new_client")
def test_no_credentials(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("AWS_ACCESS_KEY_ID")
    monkeypatch.delenv("AWS_SECRET_ACCESS_KEY")
    assert "needs AWS credentials" in explain(lambda: read(0, 8))
    assert "needs AWS credentials" in explain(lambda: remote_stamp(PATH))


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("AWS_ENDPOINT_URL", "nonsense"),
        ("AWS_ENDPOINT_URL", "http://127.0.0.1:1"),  # nobody listens there
        ("AWS_PROFILE", "absent"),
    ],
)
@pytest.mark.usefixtures("store", "new_client")
def test_settings_that_cannot_work(monkeypatch: pytest.MonkeyPatch, name: str, value: str) -> None:
    monkeypatch.setenv(name, value)
    assert "AWS settings" in explain(lambda: read(0, 8))
    assert "AWS settings" in explain(lambda: remote_stamp(PATH))


def test_a_store_that_fails_is_asked_three_times(store: Store) -> None:
    def fail(request: Request) -> bool:
        request.refuse(500, "InternalError")
        return True

    store.fault = fail
    assert "500 'InternalError'" in explain(lambda: read(0, 8))
    assert store.counts.requests == 3


def test_a_busy_store_is_asked_again(store: Store) -> None:
    def busy_once(request: Request) -> bool:
        if store.counts.requests == 1:
            request.refuse(503, "SlowDown")
        return store.counts.requests == 1

    store.put(URL, b"0123456789")
    store.fault = busy_once
    assert read(2, 3) == b"234"


def test_broken_connection_goes_on_where_it_broke(store: Store) -> None:
    content = content_of(2 * MIB)
    store.put(URL, content)

    def cut(request: Request) -> bool:
        if store.counts.requests > 1:
            return False
        request.start(206, len(content), f"bytes 0-{len(content) - 1}/{len(content)}")
        request.send(content[: MIB + 5])
        request.close_connection = True
        return True

    store.fault = cut
    assert read(0, len(content)) == content
    assert store.counts.requests == 2
    assert store.counts.sent <= 1.3 * len(content)  # the last piece of 256 KiB is asked for again


def test_connection_that_breaks_every_time(store: Store) -> None:
    def cut(request: Request) -> bool:
        request.start(206, request.end - request.begin, f"bytes {request.begin}-{request.end - 1}/100")
        request.close_connection = True
        return True

    store.fault = cut
    assert "cannot be read" in explain(lambda: read(0, 100))
    assert store.counts.requests == 3


def test_broken_encryption_is_a_broken_connection(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    from urllib3.exceptions import SSLError

    store.put(URL, b"0123456789")
    opened: list[Any] = []

    class Broken:
        def read(self, num_bytes: int) -> bytes:
            raise SSLError("end of file")

        def close(self) -> None:
            pass

    def open_broken(*arguments: Any, real: Any = remote._open) -> Any:
        opened.append(real(*arguments) if opened else Broken())
        return opened[-1]

    monkeypatch.setattr(remote, "_open", open_broken)
    assert read(2, 3) == b"234"
    assert len(opened) == 2


def test_object_that_is_too_short(store: Store) -> None:
    store.put(URL, b"0123456789")
    assert "bytes 5-9/10" in explain(lambda: read(5, 6))
    assert "ends before" in explain(lambda: read(10, 1))


@pytest.mark.parametrize(
    ("status", "length", "content_range"),
    [
        (200, 10, ""),  # the range ignored
        (206, 3, ""),
        (206, 3, "bytes 0-2/10"),
        (206, 2, "bytes 2-4/10"),
        (206, 3, "bytes \x1b[31m" + "x" * 1000),
    ],
)
def test_store_that_sends_something_else(store: Store, status: int, length: int, content_range: str) -> None:
    def wrong(request: Request) -> bool:
        request.start(status, length, content_range)
        request.send(b"0123456789"[:length])
        return True

    store.fault = wrong
    assert "asked for bytes 2 to 4" in explain(lambda: read(2, 3))


@pytest.mark.parametrize(
    "answer",
    [
        b"no HTTP at all\r\n\r\n",
        b"HTTP/1.1 206 OK\r\nContent-Length: -1\r\nContent-Range: bytes 0-7/8\r\n\r\n",
        b"HTTP/1.1 206 OK\r\nContent-Length: many\r\nContent-Range: bytes 0-7/8\r\n\r\n",
        b"HTTP/1.1 400 No\r\nContent-Length: 6\r\n\r\n<Error",
        b"HTTP/1.1 301 Moved\r\nContent-Length: 0\r\nLocation: /else\r\n\r\n",
        b"HTTP/1.1 200 OK\r\nContent-Length: 8\r\nLast-Modified: someday\r\n\r\n",
        b"HTTP/1.1 200 OK\r\nContent-Length: 8\r\n\r\n",
        b"",
    ],
)
def test_answer_that_makes_no_sense(store: Store, answer: bytes) -> None:
    def babble(request: Request) -> bool:
        request.wfile.write(answer)
        request.close_connection = True
        return True

    store.fault = babble
    explain(lambda: read(0, 8))
    explain(lambda: remote_stamp(PATH))


@pytest.mark.usefixtures("new_client")
def test_silent_store(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(remote, "_SILENCE_SECONDS", 0.3)
    store.fault = lambda request: store.over.wait(30)
    explain(lambda: read(0, 8))
    explain(lambda: remote_stamp(PATH))


@pytest.mark.usefixtures("new_client")
def test_store_that_falls_silent(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(remote, "_SILENCE_SECONDS", 0.3)

    def stall(request: Request) -> bool:
        request.start(206, request.end - request.begin, f"bytes {request.begin}-{request.end - 1}/{MIB}")
        request.send(b"0")
        return store.over.wait(30)

    store.fault = stall
    explain(lambda: read(0, MIB))


def test_store_that_is_too_slow(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(remote, "_PART_SECONDS", 0.5)
    monkeypatch.setattr(remote, "_PIECE_BYTES", 10)

    def drip(request: Request) -> bool:
        request.start(206, request.end - request.begin, f"bytes {request.begin}-{request.end - 1}/1000")
        for _ in range(100):
            request.send(bytes(10))
            store.over.wait(0.1)
        return True

    store.fault = drip
    assert "too slowly" in explain(lambda: read(0, 1000), seconds=8)


def test_nothing_writes_into_the_buffers_after_an_error(store: Store) -> None:
    content = content_of(16 * MIB)
    store.put(URL, content)

    def refuse_one(request: Request) -> bool:
        if request.begin == 0:
            request.refuse(403, "AccessDenied")
            return True
        request.start(206, request.end - request.begin, f"bytes {request.begin}-{request.end - 1}/{len(content)}")
        for at in range(request.begin, request.end, MIB // 4):
            store.over.wait(0.05)
            request.send(memoryview(content)[at : at + MIB // 4])
        return True

    store.fault = refuse_one
    memory = bytearray(len(content))
    explain(lambda: read_remote(PATH, 0, [memoryview(memory)]))
    memory[:] = bytes(len(content))
    time.sleep(0.4)
    assert memory == bytes(len(content))


def test_an_error_in_one_thread_leaves_the_others_alone(store: Store) -> None:
    content = content_of(8 * MIB)
    store.put(URL, content)
    with ThreadPoolExecutor(4) as threads:
        good = [threads.submit(read, 0, len(content)) for _ in range(3)]
        bad = threads.submit(read, 0, 8, Path("s3://weights/absent"))
        assert all(job.result() == content for job in good)
        assert isinstance(bad.exception(), WeightsError)
