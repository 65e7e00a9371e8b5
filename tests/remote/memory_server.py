"""A :class:`MemoryStore` at a door of its own: HTTP/1.1 with as little CPU as Python can.

Bodies go from the socket into the memory where they stay, and from there to the socket. Signatures are not checked,
only whose they are.
"""

from __future__ import annotations

import contextlib
import socket
import sys
import threading

from .memory_store import MemoryStore
from .s3_answers import Answer, refused
from .s3_request import Request, request_of_head

KEY, SECRET = "the-key", "the-secret"
MOST_HEAD_NBYTES = 1 << 16
REUSED_FROM_NBYTES = 1 << 20
MOST_REUSED_NBYTES = 4 << 30


class MemoryServer:
    """Serves from threads of its own, one a connection, until :meth:`stop`.

    ``requests``: what came, in order.
    """

    def __init__(self, store: MemoryStore) -> None:
        self.store = store
        self.requests: list[Request] = []
        self._lock = threading.Lock()
        self._buffers = _Buffers()
        self._door = socket.create_server(("127.0.0.1", 0), backlog=1024)
        self.address: tuple[str, int] = self._door.getsockname()
        self.url = "http://{}:{}".format(*self.address)
        threading.Thread(target=self._accept, name="memory server", daemon=True).start()

    def stop(self) -> None:
        with contextlib.suppress(OSError):
            self._door.shutdown(socket.SHUT_RDWR)
        self._door.close()

    def _accept(self) -> None:
        with contextlib.suppress(OSError):
            while True:
                client, _ = self._door.accept()
                client.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
                threading.Thread(target=self._serve, args=(client,), daemon=True).start()

    def _serve(self, client: socket.socket) -> None:
        with client, contextlib.suppress(OSError):
            rest = b""
            while (head_and_rest := _head(client, rest)) is not None:
                head, rest = head_and_rest
                request, headers = request_of_head(head)
                with self._lock:
                    self.requests.append(request)
                if "100-continue" in headers.get("expect", "").lower():
                    client.sendall(b"HTTP/1.1 100 Continue\r\n\r\n")
                body, rest = self._body(client, rest, request.nbytes)
                signed = headers.get("authorization") or f"Credential={_query_value(request, 'X-Amz-Credential')}"
                if f"Credential={KEY}/" in signed:
                    answer = self.store.answer(request, headers, body)
                else:
                    answer = refused("InvalidAccessKeyId", request)
                _send(client, request, answer)
                if headers.get("connection", "").lower() == "close":
                    return

    def _body(self, client: socket.socket, rest: bytes, nbytes: int) -> tuple[memoryview, bytes]:
        target = self._buffers.take(nbytes)
        have = min(len(rest), nbytes)
        target[:have] = rest[:have]
        while have < nbytes:
            received = client.recv_into(target[have:], nbytes - have, socket.MSG_WAITALL)
            if received == 0:
                raise ConnectionResetError
            have += received
        return target, rest[nbytes:]


class _Buffers:
    """Large ones are used again when nobody sees them any more: fresh memory costs the kernel as much as the copy."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._known: list[bytearray] = []

    def take(self, nbytes: int) -> memoryview:
        if nbytes < REUSED_FROM_NBYTES:
            return memoryview(bytearray(nbytes))
        with self._lock:
            free = [index for index in range(len(self._known)) if sys.getrefcount(self._known[index]) == 2]
            for index in free:
                if len(self._known[index]) == nbytes:
                    return memoryview(self._known[index])
            if sum(map(len, self._known)) > MOST_REUSED_NBYTES:
                for index in reversed(free):
                    del self._known[index]
            fresh = bytearray(nbytes)
            self._known.append(fresh)
            return memoryview(fresh)


def _head(client: socket.socket, rest: bytes) -> tuple[bytes, bytes] | None:
    """The next request's, and what came after it; None at the end."""
    while b"\r\n\r\n" not in rest:
        data = client.recv(MOST_HEAD_NBYTES)
        if not data or len(rest) > MOST_HEAD_NBYTES:
            return None
        rest += data
    head, _, rest = rest.partition(b"\r\n\r\n")
    return head, rest


def _send(client: socket.socket, request: Request, answer: Answer) -> None:
    lines = [f"HTTP/1.1 {answer.status} {answer.reason}"]
    lines += [f"{name}: {value}" for name, value in answer.headers_to_send().items()]
    head = ("\r\n".join(lines) + "\r\n\r\n").encode("latin-1")
    if request.method == "HEAD":
        client.sendall(head)
        return
    client.sendall(head + answer.body.encode())
    for piece in answer.pieces or ():
        client.sendall(piece)


def _query_value(request: Request, name: str) -> str:
    return request.query.get(name, [""])[0]
