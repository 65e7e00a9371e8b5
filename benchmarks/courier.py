"""What a worker of `benchmarks.remote` does: carry a state to an object of a store, or back, by one library.

Those that upload finished files find one here: what they save is bytes that another program has written. "operations"
are S3's own, `connections` of them at a time, called through some client: what an engine could reach, without format,
checksum or retries.
"""

from __future__ import annotations

import base64
import concurrent.futures
import contextlib
import ctypes
import gc
import mmap
import os
import queue
import time
import urllib.parse
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, ClassVar

from .contenders.base import Unsupported, import_error, version_of
from .measure import cpu_seconds, peak_nbytes, reset_peak, resident_nbytes

READ_NBYTES = 1 << 20  #: at a time: what a library copies once more stays in the CPU's cache
KEY, SECRET, REGION = "the-key", "the-secret", "us-east-1"


def start(name: str, **settings: Any) -> Worker:
    return Worker(name, settings)


class Worker:
    """`settings` are those of a `Courier`."""

    def __init__(self, name: str, settings: dict[str, Any]) -> None:
        kind = COURIERS[name]
        if (reason := kind.missing()) is not None:
            raise Unsupported(reason)
        os.environ.update(
            AWS_ACCESS_KEY_ID=KEY,
            AWS_SECRET_ACCESS_KEY=SECRET,
            AWS_DEFAULT_REGION=REGION,
            AWS_REGION=REGION,
            AWS_ENDPOINT_URL=settings["url"],
        )
        self._kind, self._settings = kind, settings
        self._courier: Courier | None = None
        self._ready_nbytes: int | None = None
        self.about = version_of(kind.distribution)

    def do_begin(self, connections: int, part_nbytes: int) -> dict[str, Any]:
        """Before the first order, and when the settings change."""
        self.close()
        self._courier = self._kind(connections=connections, part_nbytes=part_nbytes, **self._settings)
        gc.collect()
        self._ready_nbytes = resident_nbytes([os.getpid()])
        return {}

    def do_carry(self, action: str, key: str) -> dict[str, Any]:
        """`save`, `load` or `first_tensor`: seconds, CPU seconds, and the greatest memory while it lasted, over what
        was resident before the first order, and over what is loaded."""
        assert self._courier is not None
        carry = getattr(self._courier, action)
        gc.collect()
        ctypes.CDLL(None).malloc_trim(0)
        me = [os.getpid()]
        is_known = reset_peak(me[0])
        cpu, begun = cpu_seconds(me), time.perf_counter()
        loaded = carry(key)
        ended = time.perf_counter()
        cpu = cpu_seconds(me) - cpu
        peak = peak_nbytes(me)
        extra = None
        if is_known and peak is not None and self._ready_nbytes is not None:
            extra = peak - self._ready_nbytes - nbytes_of(loaded)
        return {"s": ended - begun, "cpu_s": cpu, "extra_bytes": extra}

    def do_check(self, action: str, key: str) -> dict[str, Any]:
        """What is loaded is what was saved."""
        import torch

        assert self._courier is not None
        loaded, state = getattr(self._courier, action)(key), self._courier.state
        if isinstance(loaded, torch.Tensor):
            wanted = state[first_name(state)]
            return {"same": torch.equal(loaded.view(torch.uint8), wanted.view(torch.uint8))}
        if not isinstance(loaded, dict):
            with open(self._courier.path, "rb") as file:
                return {"same": bytes(loaded) == file.read()}
        equal = (torch.equal(loaded[name].view(torch.uint8), state[name].view(torch.uint8)) for name in state)
        return {"same": all(equal)}

    def close(self) -> None:
        if self._courier is not None:
            self._courier.close()


def nbytes_of(loaded: Any) -> int:
    """Of tensors by name, of one tensor, of bytes, or of nothing."""
    if loaded is None or isinstance(loaded, bytes):
        return len(loaded or b"")
    return sum(tensor.nbytes for tensor in loaded.values()) if isinstance(loaded, dict) else int(loaded.nbytes)


def first_name(state: dict[str, Any]) -> str:
    """The tensor that is read alone: in the middle of the file."""
    return list(state)[len(state) // 2]


class Courier:
    label: ClassVar[str]
    module: ClassVar[str] = "s3fs"
    distribution: ClassVar[str] = "s3fs"
    actions: ClassVar[tuple[str, ...]]
    needs: ClassVar[str] = "file"  #: what it saves: the state, a finished file, or its bytes in memory
    one_connection: ClassVar[bool] = False  #: whatever is allowed

    def __init__(self, url: str, bucket: str, path: str, connections: int, part_nbytes: int) -> None:
        self.url, self.bucket, self.path = url, bucket, path
        self.connections, self.part_nbytes = connections, part_nbytes
        self.nbytes = os.path.getsize(path)
        self.prepare()
        self.state = self._mapped_state()
        self.data = self._mapped_bytes() if self.needs == "memory" else memoryview(b"")

    @classmethod
    def missing(cls) -> str | None:
        """Why it cannot run here, or None."""
        return import_error(cls.module)

    def prepare(self) -> None:
        """What a program would set up once."""

    def save(self, key: str) -> Any:
        raise NotImplementedError

    def load(self, key: str) -> Any:
        raise NotImplementedError

    def first_tensor(self, key: str) -> Any:
        raise NotImplementedError

    def close(self) -> None:
        pass

    # Both are mapped, so that all workers hold them once, and have been seen before anything is measured.

    def _mapped_state(self) -> dict[str, Any]:
        import torch

        state: dict[str, Any] = torch.load(self.path, mmap=True, weights_only=True)
        for tensor in state.values():
            tensor.view(torch.uint8).view(-1)[::4096].sum(dtype=torch.int64)
        return state

    def _mapped_bytes(self) -> memoryview:
        with open(self.path, "rb") as file:
            data = memoryview(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ))
        sum(data[::4096])
        return data

    def ranges(self, nbytes: int | None = None) -> list[tuple[int, int]]:
        each = nbytes or self.part_nbytes
        return [(at, min(at + each, self.nbytes)) for at in range(0, self.nbytes, each)]


class OfFsspec(Courier):
    def prepare(self) -> None:
        import fsspec.config

        self.options = {
            "max_concurrency": self.connections,
            "config_kwargs": {
                "max_pool_connections": max(self.connections, 10),
                "s3": {"payload_signing_enabled": False},
            },
        }
        fsspec.config.conf["s3"] = self.options

    def fs(self) -> Any:
        import fsspec

        return fsspec.filesystem("s3")


class StatedictIO(OfFsspec):
    label = "statedict_io"
    distribution = "statedict_io"
    actions = ("save", "load", "first_tensor")
    needs = "state"

    def prepare(self) -> None:
        super().prepare()
        import statedict_io

        self.sio = statedict_io

    def save(self, key: str) -> None:
        self.sio.save(self.state, f"s3://{self.bucket}/{key}")

    def load(self, key: str) -> Any:
        return self.sio.load(f"s3://{self.bucket}/{key}")

    def first_tensor(self, key: str) -> Any:
        with self.sio.open_checkpoint(f"s3://{self.bucket}/{key}") as checkpoint:
            return checkpoint[first_name(self.state)]


class FsspecTorch(OfFsspec):
    """`with fsspec.open(url, "wb") as file: torch.save(state, file)`"""

    label = "fsspec.open + torch.save / torch.load"
    actions = ("save", "load")
    needs = "state"
    one_connection = True

    def save(self, key: str) -> None:
        import fsspec
        import torch

        with fsspec.open(f"s3://{self.bucket}/{key}", "wb") as file:
            torch.save(self.state, file)

    def load(self, key: str) -> Any:
        import fsspec
        import torch

        with fsspec.open(f"s3://{self.bucket}/{key}", "rb") as file:
            return torch.load(file, weights_only=True)


class S3fs(OfFsspec):
    label = "s3fs put_file / cat_ranges"
    actions = ("save", "load")

    def save(self, key: str) -> None:
        self.fs().put_file(
            self.path, f"{self.bucket}/{key}", chunksize=self.part_nbytes, max_concurrency=self.connections
        )

    def load(self, key: str) -> Any:
        ranges = self.ranges()
        path = f"{self.bucket}/{key}"
        starts, ends = zip(*ranges, strict=True)
        found = self.fs().cat_ranges(
            [path] * len(ranges), list(starts), list(ends), batch_size=self.connections, on_error="raise"
        )
        return b"".join(found)


class Boto3(Courier):
    label = "boto3 upload_fileobj / download_fileobj"
    module = distribution = "boto3"
    actions = ("save", "load")

    def prepare(self) -> None:
        import boto3
        from boto3.s3.transfer import TransferConfig

        self.client = boto3.client("s3", config=botocore_config(self.connections))
        self.config = TransferConfig(
            multipart_threshold=self.part_nbytes,
            multipart_chunksize=self.part_nbytes,
            max_concurrency=self.connections,
        )

    def save(self, key: str) -> None:
        with open(self.path, "rb") as file:
            self.client.upload_fileobj(file, self.bucket, key, Config=self.config)

    def load(self, key: str) -> Any:
        import io

        target = io.BytesIO()
        self.client.download_fileobj(self.bucket, key, target, Config=self.config)
        return target.getbuffer()


class Obstore(Courier):
    label = "obstore put, of a file / get_range in threads"
    module = distribution = "obstore"
    actions = ("save", "load")

    def prepare(self) -> None:
        self.store = self.new_store()

    def new_store(self) -> Any:
        from obstore.store import S3Store

        return S3Store(
            self.bucket,
            endpoint=self.url,
            access_key_id=KEY,
            secret_access_key=SECRET,
            region=REGION,
            unsigned_payload=True,
            client_options={"allow_http": True, "timeout": "300s"},
        )

    def save(self, key: str) -> None:
        import obstore

        obstore.put(
            self.store,
            key,
            Path(self.path),
            use_multipart=True,
            chunk_size=self.part_nbytes,
            max_concurrency=self.connections,
        )

    def load(self, key: str) -> Any:
        import obstore

        target = memoryview(mmap.mmap(-1, self.nbytes))

        def fetch(asked: tuple[int, int]) -> None:
            target[slice(*asked)] = memoryview(obstore.get_range(self.store, key, start=asked[0], end=asked[1]))

        with concurrent.futures.ThreadPoolExecutor(self.connections) as pool:
            list(pool.map(fetch, self.ranges()))
        return target


class ObstoreIterator(Obstore):
    """Ranges that touch get_ranges makes one request."""

    label = "obstore put, of an iterator / get_ranges"
    needs = "memory"

    def save(self, key: str) -> None:
        import obstore

        obstore.put(
            self.store,
            key,
            (self.data[start:end] for start, end in self.ranges(4 << 20)),
            use_multipart=True,
            chunk_size=self.part_nbytes,
            max_concurrency=self.connections,
        )

    def load(self, key: str) -> Any:
        import obstore

        starts, ends = zip(*self.ranges(), strict=True)
        found = obstore.get_ranges(self.store, key, starts=list(starts), ends=list(ends))
        return b"".join(map(memoryview, found))


class S3TorchConnector(Courier):
    label = "s3torchconnector + torch.save / torch.load"
    module = distribution = "s3torchconnector"
    actions = ("save", "load")
    needs = "state"

    def prepare(self) -> None:
        from s3torchconnector import S3Checkpoint, S3ClientConfig

        gbps = self.connections * 40e6 * 8 / 1e9
        self.checkpoint = S3Checkpoint(
            region=REGION,
            endpoint=self.url,
            s3client_config=S3ClientConfig(
                throughput_target_gbps=gbps, part_size=self.part_nbytes, force_path_style=True
            ),
        )

    def save(self, key: str) -> None:
        import torch

        with self.checkpoint.writer(f"s3://{self.bucket}/{key}") as writer:
            torch.save(self.state, writer)

    def load(self, key: str) -> Any:
        import torch

        with self.checkpoint.reader(f"s3://{self.bucket}/{key}") as reader:
            return torch.load(reader, weights_only=True)


class Operations(Courier):
    """Parts are copied from memory, as a saver has to put them together; ranges go into final memory."""

    actions = ("save", "load")
    needs = "memory"

    def save(self, key: str) -> None:
        upload = self.create(key)

        def put(part: tuple[int, tuple[int, int]]) -> str:
            number, (start, end) = part
            return self.put_part(key, upload, number, bytearray(self.data[start:end]))

        with concurrent.futures.ThreadPoolExecutor(self.connections) as pool:
            tags = list(pool.map(put, enumerate(self.ranges(), 1)))
        self.complete(key, upload, [{"PartNumber": number, "ETag": tag} for number, tag in enumerate(tags, 1)])

    def load(self, key: str) -> Any:
        target = memoryview(mmap.mmap(-1, self.nbytes))
        with concurrent.futures.ThreadPoolExecutor(self.connections) as pool:
            list(pool.map(lambda r: self.get_range(key, r[0], target[r[0] : r[1]]), self.ranges()))
        return target

    def create(self, key: str) -> str:
        raise NotImplementedError

    def put_part(self, key: str, upload: str, number: int, data: bytearray) -> str:
        raise NotImplementedError

    def complete(self, key: str, upload: str, parts: list[dict[str, Any]]) -> None:
        raise NotImplementedError

    def get_range(self, key: str, start: int, target: memoryview) -> None:
        raise NotImplementedError


class FsspecOperations(OfFsspec, Operations):
    label = "operations, by the client of s3fs"
    needs = "memory"

    def create(self, key: str) -> str:
        answer = self.fs().call_s3("create_multipart_upload", Bucket=self.bucket, Key=key, ChecksumAlgorithm="CRC32")
        return str(answer["UploadId"])

    def put_part(self, key: str, upload: str, number: int, data: bytearray) -> str:
        how = {"Key": key, "UploadId": upload, "PartNumber": number, "ChecksumCRC32": checksum(data)}
        return str(self.fs().call_s3("upload_part", Bucket=self.bucket, Body=data, **how)["ETag"])

    def complete(self, key: str, upload: str, parts: list[dict[str, Any]]) -> None:
        how = {"Key": key, "UploadId": upload, "MultipartUpload": {"Parts": parts}}
        self.fs().call_s3("complete_multipart_upload", Bucket=self.bucket, **how)

    def get_range(self, key: str, start: int, target: memoryview) -> None:
        target[:] = self.fs().cat_file(f"{self.bucket}/{key}", start=start, end=start + len(target))


class BotocoreOperations(Operations):
    """With the CRC-32 of each part, as fast as this package makes it; left to itself botocore makes one with zlib."""

    label = "operations, by botocore in threads"
    module = distribution = "botocore"

    def prepare(self) -> None:
        self.client = botocore_client(self.connections)

    def create(self, key: str) -> str:
        answer = self.client.create_multipart_upload(Bucket=self.bucket, Key=key, ChecksumAlgorithm="CRC32")
        return str(answer["UploadId"])

    def put_part(self, key: str, upload: str, number: int, data: bytearray) -> str:
        how = {"Key": key, "UploadId": upload, "PartNumber": number}
        answer = self.client.upload_part(Bucket=self.bucket, Body=data, ChecksumCRC32=checksum(data), **how)
        return str(answer["ETag"])

    def complete(self, key: str, upload: str, parts: list[dict[str, Any]]) -> None:
        how = {"Key": key, "UploadId": upload, "MultipartUpload": {"Parts": parts}}
        self.client.complete_multipart_upload(Bucket=self.bucket, **how)

    def get_range(self, key: str, start: int, target: memoryview) -> None:
        asked = f"bytes={start}-{start + len(target) - 1}"
        body = self.client.get_object(Bucket=self.bucket, Key=key, Range=asked)["Body"]
        while target:
            got = body.readinto(target[:READ_NBYTES])
            if not got:
                raise EOFError
            target = target[got:]


class BotocoreOperationsRaw(BotocoreOperations):
    label = "operations, by botocore in threads; CRC-32 by botocore; read past urllib3"

    def create(self, key: str) -> str:
        return str(self.client.create_multipart_upload(Bucket=self.bucket, Key=key)["UploadId"])

    def put_part(self, key: str, upload: str, number: int, data: bytearray) -> str:
        how = {"Key": key, "UploadId": upload, "PartNumber": number}
        return str(self.client.upload_part(Bucket=self.bucket, Body=data, **how)["ETag"])

    def get_range(self, key: str, start: int, target: memoryview) -> None:
        asked = f"bytes={start}-{start + len(target) - 1}"
        raw = self.client.get_object(Bucket=self.bucket, Key=key, Range=asked)["Body"]._raw_stream
        while target:
            got = raw._fp.readinto(target)
            if not got:
                raise EOFError
            target = target[got:]
        raw.release_conn()


class PresignedOperations(Operations):
    """URLs that botocore has signed, and Python's own HTTP: nothing between the memory and the socket."""

    label = "operations, presigned, by http.client in threads"
    module = distribution = "botocore"

    def prepare(self) -> None:
        import http.client

        self.client = botocore_client(self.connections)
        host = urllib.parse.urlsplit(self.url).netloc
        self.free: queue.LifoQueue[Any] = queue.LifoQueue()
        for _ in range(self.connections):
            self.free.put(http.client.HTTPConnection(host))

    @contextlib.contextmanager
    def answer(
        self, operation: str, method: str, body: Any, headers: dict[str, str], **arguments: Any
    ) -> Iterator[Any]:
        url = self.client.generate_presigned_url(operation, {"Bucket": self.bucket, **arguments})
        target = url[url.index("/", len("https://")) :]
        connection = self.free.get()
        try:
            connection.request(method, target, body, headers)
            answer = connection.getresponse()
            if answer.status not in {200, 206}:
                raise OSError(f"{operation}: {answer.status} {answer.read()!r}")
            yield answer
        finally:
            self.free.put(connection)

    create = BotocoreOperations.create  # type: ignore[assignment]
    complete = BotocoreOperations.complete  # type: ignore[assignment]

    def put_part(self, key: str, upload: str, number: int, data: bytearray) -> str:
        how: dict[str, Any] = {"Key": key, "UploadId": upload, "PartNumber": number}
        with self.answer("upload_part", "PUT", data, {"Content-Length": str(len(data))}, **how) as answer:
            answer.read()
            return str(answer.getheader("ETag"))

    def get_range(self, key: str, start: int, target: memoryview) -> None:
        headers = {"Range": f"bytes={start}-{start + len(target) - 1}"}
        with self.answer("get_object", "GET", None, headers, Key=key) as answer:
            while target:
                got = answer.readinto(target)
                if not got:
                    raise EOFError
                target = target[got:]


def botocore_config(connections: int) -> Any:
    from botocore.config import Config

    unsigned = {"payload_signing_enabled": False}
    return Config(signature_version="s3v4", max_pool_connections=max(connections, 10), s3=unsigned)


def botocore_client(connections: int) -> Any:
    import botocore.session

    return botocore.session.get_session().create_client("s3", config=botocore_config(connections))


def checksum(data: bytearray) -> str:
    from statedict_io import _core

    return base64.b64encode(_core.crc32(data, 0).to_bytes(4, "big")).decode()


COURIERS: dict[str, Callable[..., Courier] | Any] = {
    "statedict_io": StatedictIO,
    "fsspec+torch": FsspecTorch,
    "s3fs": S3fs,
    "boto3": Boto3,
    "obstore": Obstore,
    "obstore_iterator": ObstoreIterator,
    "s3torchconnector": S3TorchConnector,
    "operations_s3fs": FsspecOperations,
    "operations_botocore": BotocoreOperations,
    "operations_botocore_raw": BotocoreOperationsRaw,
    "operations_presigned": PresignedOperations,
}
