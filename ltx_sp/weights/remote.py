"""Ranges of bytes of files that an object store holds, as ``s3://bucket/key``.

No torch. Needs boto3, which only the ``s3`` extra installs. Region, endpoint, addressing style and
credentials are what the AWS environment variables and files say; there are no options of our own.
"""

from __future__ import annotations

import dataclasses
import functools
import threading
import time
from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed, wait
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any

from ltx_sp.errors import UnsupportedError, WeightsError
from ltx_sp.weights.files import quote
from ltx_sp.weights.index import FileStamp

__all__ = ["is_remote", "read_remote", "remote_stamp"]

_SCHEME = "s3:"
# A store sends 50 to 100 MB/s per connection, after some 30 ms: a chunk of the reader must be several requests.
# Smaller ones measured slower, each costs about a millisecond of Python.
_PART_BYTES = 2 * 2**20
_NUM_CONNECTIONS = 32
_PIECE_BYTES = 256 * 2**10

_CONNECT_SECONDS = 10
_SILENCE_SECONDS = 20
_PART_SECONDS = 120
_ATTEMPTS = 3
_PAUSE_SECONDS = 0.2

_pool = ThreadPoolExecutor(_NUM_CONNECTIONS, thread_name_prefix="ltx_sp-s3")  # starts threads as they are needed
_making_client = threading.Lock()


@dataclasses.dataclass(frozen=True)
class _Place:
    bucket: str
    key: str

    def __str__(self) -> str:
        return f"s3://{self.bucket}/{self.key}"


class _Part:
    """Bytes ``begin`` to ``end`` of an object, and where they shall go; shrinks from the front as they come."""

    def __init__(self, begin: int, views: Sequence[memoryview]):
        self.begin, self.end = begin, begin + sum(map(len, views))
        self._views = deque(views)

    def take(self, data: bytes) -> None:
        rest = memoryview(data)
        while rest:
            view = self._views.popleft()
            count = min(len(view), len(rest))
            view[:count] = rest[:count]
            rest = rest[count:]
            self.begin += count
            if count < len(view):
                self._views.appendleft(view[count:])


def is_remote(path: Path) -> bool:
    """Whether a path means an object in a store, and no file: it begins with ``s3://``, or ``s3:/`` as Path has it."""
    return path.parts[:1] == (_SCHEME,)


def remote_stamp(path: Path) -> FileStamp:
    """Ask the store for the size and the time of change of an object. Blocks the host.

    Stores keep the time in whole seconds.

    Raises:
        WeightsError: it is absent or may not be read, or the store cannot be reached.
        UnsupportedError: boto3 is not installed.
    """
    place = _place(path)
    client = _client(place)
    with _access(place):
        answer = client.head_object(Bucket=place.bucket, Key=place.key)
        if "ContentLength" not in answer or "LastModified" not in answer:
            raise WeightsError(f"The store of {place} does not tell its size and time of change, as it must.")
        return FileStamp(answer["ContentLength"], int(answer["LastModified"].timestamp()) * 10**9)


def read_remote(path: Path, offset: int, buffers: Sequence[memoryview]) -> None:
    """Fill the buffers, one after the other, with the bytes of an object from ``offset`` on. Blocks the host.

    May be called by several threads. Asks for 2 MiB at a time, up to 32 times at once over all calls of the
    process, and needs no memory but the buffers. After an error nothing writes into them any more.

    Raises:
        WeightsError: the object is absent, too short or may not be read, or the store fails, is too slow, or
            cannot be reached.
        UnsupportedError: boto3 is not installed.
    """
    place = _place(path)
    client = _client(place)
    stop = threading.Event()
    jobs = [_pool.submit(_fetch, client, place, part, stop) for part in _split(offset, buffers)]
    try:
        for job in as_completed(jobs):
            job.result()
    finally:
        stop.set()
        wait([job for job in jobs if not job.cancel()])


def _place(path: Path) -> _Place:
    bucket, _, key = "/".join(path.parts[1:]).partition("/")
    place = _Place(bucket, key)
    if not place.key:
        raise _no_place(place)
    return place


def _no_place(place: _Place) -> WeightsError:
    return WeightsError(f"{place} names no object; it must be s3://bucket/key, as S3 allows them. Check the path.")


def _split(begin: int, buffers: Sequence[memoryview]) -> Iterator[_Part]:
    views, room = list[memoryview](), _PART_BYTES
    for buffer in buffers:
        rest = buffer
        while rest:
            views.append(rest[:room])
            room -= len(views[-1])
            rest = rest[len(views[-1]) :]
            if room == 0:
                yield _Part(begin, views)
                begin, views, room = begin + _PART_BYTES, [], _PART_BYTES
    if views:
        yield _Part(begin, views)


def _fetch(client: Any, place: _Place, part: _Part, stop: threading.Event) -> None:
    """Bring one part, asking again for the rest of it when the connection breaks."""
    from botocore.exceptions import BotoCoreError
    from urllib3.exceptions import HTTPError

    deadline = time.monotonic() + _PART_SECONDS
    with _access(place):
        for attempt in range(1, _ATTEMPTS + 1):
            with closing(_open(client, place, part)) as body:
                try:
                    while part.begin < part.end and not stop.is_set():
                        if time.monotonic() > deadline:
                            raise WeightsError(
                                f"{place} came too slowly: less than {_PART_BYTES} bytes in {_PART_SECONDS} s. "
                                "Check the network."
                            )
                        part.take(body.read(min(_PIECE_BYTES, part.end - part.begin)))
                    return
                except (BotoCoreError, HTTPError):  # HTTPError: encryption that ends in the middle
                    if attempt == _ATTEMPTS:
                        raise
            stop.wait(_PAUSE_SECONDS)


def _open(client: Any, place: _Place, part: _Part) -> Any:
    last = part.end - 1
    answer = client.get_object(Bucket=place.bucket, Key=place.key, Range=f"bytes={part.begin}-{last}")
    # Some stores and proxies ignore a range and send the object from its start.
    sent, length = answer.get("ContentRange", "everything"), answer.get("ContentLength")
    if not sent.startswith(f"bytes {part.begin}-{last}/") or length != part.end - part.begin:
        answer["Body"].close()
        raise WeightsError(
            f"{place} was asked for bytes {part.begin} to {last} and sent {quote(sent)} ({length} bytes); it must hold "
            "them, and its store must send what is asked. Upload it again, or copy it to a disk."
        )
    return answer["Body"]


def _client(place: _Place) -> Any:
    try:
        import boto3  # takes a second
    except ImportError as error:
        raise UnsupportedError(
            f'{place} cannot be read without boto3, which is not installed. Install it: pip install "ltx-sp[s3]".'
        ) from error
    with _making_client, _access(place):
        return _make_client(boto3)


@functools.cache
def _make_client(boto3: Any) -> Any:
    from botocore.config import Config

    config = Config(
        connect_timeout=_CONNECT_SECONDS,
        read_timeout=_SILENCE_SECONDS,
        max_pool_connections=_NUM_CONNECTIONS,
        retries={"mode": "standard", "total_max_attempts": _ATTEMPTS},
    )
    # Not the default session of boto3, which is not for several threads.
    return boto3.Session().client("s3", config=config)


@contextmanager
def _access(place: _Place) -> Iterator[None]:
    from botocore.exceptions import BotoCoreError, ClientError, NoCredentialsError, ParamValidationError
    from urllib3.exceptions import HTTPError

    try:
        yield
    except ClientError as error:
        raise _refused(place, error.response) from error
    except ParamValidationError as error:
        raise _no_place(place) from error
    except NoCredentialsError as error:
        raise WeightsError(
            f"{place} needs AWS credentials and none were found. Set them in the environment, or run `aws configure`."
        ) from error
    # ValueError: a bad endpoint. RecursionError: botocore follows a redirect, and the next, without end.
    except (BotoCoreError, HTTPError, ValueError, RecursionError) as error:
        raise WeightsError(
            f"{place} cannot be read ({quote(str(error))}). Check the network and the AWS settings."
        ) from error


def _refused(place: _Place, answer: Any) -> WeightsError:
    status = answer.get("ResponseMetadata", {}).get("HTTPStatusCode")
    code = quote(str(answer.get("Error", {}).get("Code")))
    if status == 404:
        return WeightsError(f"{place} does not exist; it must be one file of a bucket. Check the bucket and the key.")
    if status in (401, 403):
        return WeightsError(
            f"{place} may not be read with these AWS credentials ({code}). Grant them s3:GetObject, or use others."
        )
    if status == 416:
        return WeightsError(f"{place} ends before the bytes that shall be read. Upload it again.")
    return WeightsError(f"{place} cannot be read: its store answered {status} {code}. Check the store, and try again.")
