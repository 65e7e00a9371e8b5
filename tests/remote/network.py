"""A network between a client and a server on this machine: latency, and a rate per connection and in all.

A TCP proxy. What a side sends comes out on the other side half a round trip later, at no more than the rate, and a new
connection's first bytes wait for one round trip more, which the handshake takes. There is no loss, no slow start and
no TLS. Bytes stay in the kernel where it can splice, so that the network costs little of the CPU that is measured.

What it counts are HTTP/1.1 requests whose bodies have a Content-Length.
"""

from __future__ import annotations

import asyncio
import collections
import contextlib
import os
import socket
import sys
import threading
import time
from dataclasses import dataclass, field
from typing import Any

from .s3_request import Request, request_of_head

CHUNK_SECONDS = 0.008  #: bytes are let through in chunks of that long
MOST_IN_A_CHUNK = 1 << 20
LATE_SECONDS = 0.01  #: a timer that comes late is caught up with
PIPE_NBYTES = 1 << 20  #: what an unprivileged process may have


@dataclass
class Exchange:
    """A request, and when: on the clock of ``time.monotonic``, as the client sees it."""

    request: Request
    connection: int
    began: float
    turns: int  #: round trips that it takes: one, one more on a new connection, one more for "100 Continue"
    answers_due: int = 1
    answered: float | None = None  #: the first byte of the answer


@dataclass
class Traffic:
    """Since the last reset."""

    exchanges: list[Exchange] = field(default_factory=list)
    connections: int = 0  #: opened
    most_connections: int = 0  #: at one time
    nbytes_up: int = 0  #: with the heads of the requests
    nbytes_down: int = 0

    @property
    def kinds(self) -> dict[str, int]:
        return dict(collections.Counter(exchange.request.kind for exchange in self.exchanges))

    @property
    def round_trips(self) -> int:
        """The longest chain of requests that each began after the answer to the one before had begun to come. Requests
        that merely wait for their turn count as if they had waited for the answer."""
        depths: list[tuple[float, int]] = []
        for exchange in sorted(self.exchanges, key=lambda exchange: exchange.began):
            before = max((depth for answered, depth in depths if answered <= exchange.began), default=0)
            if exchange.answered is not None:
                depths.append((exchange.answered, before + exchange.turns))
        return max((depth for _, depth in depths), default=0)

    @property
    def used_connections(self) -> int:
        """That had requests."""
        return len({exchange.connection for exchange in self.exchanges})

    def summary(self) -> dict[str, Any]:
        return {
            "requests": len(self.exchanges),
            "kinds": self.kinds,
            "connections": self.connections,
            "most_connections": self.most_connections,
            "used_connections": self.used_connections,
            "nbytes_up": self.nbytes_up,
            "nbytes_down": self.nbytes_down,
            "round_trips": self.round_trips,
        }


class Network:
    """Runs in a thread of its own from the start to :meth:`stop`; also a context manager.

    Args:
        server: its host and port.
        latency: seconds of a round trip.
        rate: bytes a second of each connection, in each direction; None for no limit.
        total_rate: of all connections together, in each direction.

    The three may be changed at any time, and hold for what is sent afterwards.
    """

    def __init__(
        self,
        server: tuple[str, int],
        *,
        latency: float = 0.03,
        rate: float | None = None,
        total_rate: float | None = None,
    ) -> None:
        self.server = server
        self.latency, self.rate, self.total_rate = latency, rate, total_rate
        self.traffic = Traffic()
        self._total = {"up": _Bucket(), "down": _Bucket()}
        self._now = 0
        self._numbers = 0
        self._door = socket.create_server(("127.0.0.1", 0), backlog=1024)
        self._door.setblocking(False)
        self.url = "http://{}:{}".format(*self._door.getsockname())
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._run, name="network", daemon=True)
        self._thread.start()

    def __enter__(self) -> Network:
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    def stop(self) -> None:
        with contextlib.suppress(RuntimeError):
            self._loop.call_soon_threadsafe(self._main.cancel)
        self._thread.join()

    def reset(self) -> None:
        """Counts anew. Connections that are open stay."""
        self.traffic = Traffic(most_connections=self._now)

    def _run(self) -> None:
        self._main = self._loop.create_task(self._accept())
        with contextlib.suppress(asyncio.CancelledError):
            self._loop.run_until_complete(self._main)
        tasks = asyncio.all_tasks(self._loop)
        for task in tasks:
            task.cancel()
        if tasks:
            self._loop.run_until_complete(asyncio.wait(tasks))
        self._loop.close()
        self._door.close()

    async def _accept(self) -> None:
        tasks = set()
        while True:
            client, _ = await self._loop.sock_accept(self._door)
            task = self._loop.create_task(self._connect(client))
            tasks.add(task)  # a task that nobody holds may be collected
            task.add_done_callback(tasks.discard)

    async def _connect(self, client: socket.socket) -> None:
        self._numbers += 1
        number = self._numbers
        self._now += 1
        traffic = self.traffic
        traffic.connections += 1
        traffic.most_connections = max(traffic.most_connections, self._now)
        server = socket.socket()
        try:
            for each in (client, server):
                each.setblocking(False)
                each.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            await self._loop.sock_connect(server, self.server)
            watch = _Watch(self, number)
            ways = (_Way(self, "up", client, server, watch), _Way(self, "down", server, client, watch))
            tasks = [asyncio.ensure_future(half) for way in ways for half in (way.take(), way.give())]
            try:
                await asyncio.gather(*tasks)
            finally:
                for task in tasks:
                    task.cancel()
                await asyncio.gather(*tasks, return_exceptions=True)
                for way in ways:
                    way.line.close()
        except OSError:
            pass  # a side has hung up
        finally:
            self._now -= 1
            client.close()
            server.close()


class _Bucket:
    """When the next byte may go."""

    def __init__(self) -> None:
        self.free = 0.0

    def reserve(self, nbytes: int, rate: float | None, now: float) -> float:
        if rate is None:
            return now
        if now - self.free > LATE_SECONDS:  # nothing was sent: what was not used is lost
            self.free = now
        self.free += nbytes / rate
        return self.free


class _Way:
    """One direction of one connection."""

    def __init__(
        self, network: Network, direction: str, source: socket.socket, sink: socket.socket, watch: _Watch
    ) -> None:
        self.network, self.direction, self.source, self.sink, self.watch = network, direction, source, sink, watch
        self.line = _SplicedLine() if hasattr(os, "splice") and sys.platform == "linux" else _CopiedLine()
        self._bucket = _Bucket()
        self._fresh = direction == "up"
        self._due: asyncio.Queue[tuple[float, int]] = asyncio.Queue()

    async def take(self) -> None:
        """From the source into the line, at the rate."""
        network, watch, is_up = self.network, self.watch, self.direction == "up"
        while True:
            rate = min((r for r in (network.rate, network.total_rate) if r is not None), default=None)
            limit = MOST_IN_A_CHUNK if rate is None else max(int(rate * CHUNK_SECONDS), 1 << 12)
            if is_up:
                limit = min(limit, await watch.expect(self.source))
            nbytes = await self._fill(limit) if limit else 0
            now = time.monotonic()
            paid = max(
                self._bucket.reserve(nbytes, network.rate, now),
                network._total[self.direction].reserve(nbytes, network.total_rate, now),
            )
            due = max(paid, now) + network.latency / 2 + (network.latency if self._fresh else 0.0)
            self._fresh = False
            if is_up:
                watch.sent(nbytes)
                network.traffic.nbytes_up += nbytes
            else:
                network.traffic.nbytes_down += nbytes
                if nbytes:
                    watch.answered(due)
            self._due.put_nowait((due, nbytes))
            if nbytes == 0:
                return
            if paid > now:
                await asyncio.sleep(paid - now)

    async def give(self) -> None:
        """From the line to the sink, in time."""
        while True:
            due, nbytes = await self._due.get()
            if (early := due - time.monotonic()) > 0:
                await asyncio.sleep(early)
            if nbytes == 0:
                with contextlib.suppress(OSError):
                    self.sink.shutdown(socket.SHUT_WR)
                return
            while nbytes:
                try:
                    nbytes -= self.line.give(self.sink, nbytes)
                except BlockingIOError:
                    await _ready(self.sink, writable=True)

    async def _fill(self, limit: int) -> int:
        waited = False
        while True:
            try:
                return self.line.take(self.source, limit)
            except BlockingIOError:
                if waited:  # the source has bytes: the line is full
                    await asyncio.sleep(0.001)
                await _ready(self.source)
                waited = True


class _SplicedLine:
    """Bytes on their way, which the kernel holds."""

    def __init__(self) -> None:
        import fcntl

        self._end, self._begin = os.pipe2(os.O_NONBLOCK)  # type: ignore[attr-defined]
        with contextlib.suppress(OSError):
            fcntl.fcntl(self._begin, fcntl.F_SETPIPE_SZ, PIPE_NBYTES)  # type: ignore[attr-defined]

    def take(self, source: socket.socket, nbytes: int) -> int:
        return int(os.splice(source.fileno(), self._begin, nbytes, flags=os.SPLICE_F_MOVE | os.SPLICE_F_NONBLOCK))  # type: ignore[attr-defined]

    def give(self, sink: socket.socket, nbytes: int) -> int:
        return int(os.splice(self._end, sink.fileno(), nbytes, flags=os.SPLICE_F_MOVE | os.SPLICE_F_NONBLOCK))  # type: ignore[attr-defined]

    def close(self) -> None:
        os.close(self._begin)
        os.close(self._end)


class _CopiedLine:
    """Bytes on their way, in memory."""

    def __init__(self) -> None:
        self._pieces: collections.deque[memoryview] = collections.deque()

    def take(self, source: socket.socket, nbytes: int) -> int:
        data = source.recv(nbytes)
        if data:
            self._pieces.append(memoryview(data))
        return len(data)

    def give(self, sink: socket.socket, nbytes: int) -> int:
        piece = self._pieces[0]
        sent = sink.send(piece[:nbytes])
        if sent == len(piece):
            self._pieces.popleft()
        else:
            self._pieces[0] = piece[sent:]
        return sent

    def close(self) -> None:
        self._pieces.clear()


class _Watch:
    """Finds the requests in what the client sends."""

    def __init__(self, network: Network, connection: int) -> None:
        self._network, self._connection = network, connection
        self._left: int | None = 0  #: of the request that is on its way; None: nobody knows
        self._first = True
        self._open: collections.deque[Exchange] = collections.deque()

    async def expect(self, client: socket.socket) -> int:
        """How much may be taken; 0 at the end."""
        while self._left == 0:
            try:
                seen = client.recv(1 << 16, socket.MSG_PEEK)
            except BlockingIOError:
                await _ready(client)
                continue
            if not seen:
                return 0
            head, end, _ = seen.partition(b"\r\n\r\n")
            if not end:
                await asyncio.sleep(0.001)
                continue
            self._begin(head)
        return MOST_IN_A_CHUNK if self._left is None else self._left

    def _begin(self, head: bytes) -> None:
        request, headers = request_of_head(head)
        asks = "100-continue" in headers.get("expect", "").lower()
        exchange = Exchange(request, self._connection, time.monotonic(), 1 + self._first + asks, answers_due=1 + asks)
        self._first = False
        self._open.append(exchange)
        self._network.traffic.exchanges.append(exchange)
        self._left = None if "transfer-encoding" in headers else len(head) + 4 + request.nbytes

    def sent(self, nbytes: int) -> None:
        if self._left is not None:
            self._left -= nbytes

    def answered(self, when: float) -> None:
        """Bytes come back: the beginning of an answer where one is waited for."""
        if self._open:
            exchange = self._open[0]
            exchange.answers_due -= 1
            exchange.answered = when
            if exchange.answers_due == 0:
                self._open.popleft()


async def _ready(sock: socket.socket, *, writable: bool = False) -> None:
    loop = asyncio.get_running_loop()
    add, remove = (loop.add_writer, loop.remove_writer) if writable else (loop.add_reader, loop.remove_reader)
    ready = loop.create_future()
    add(sock, lambda: ready.done() or ready.set_result(None))
    try:
        await ready
    finally:
        remove(sock)
