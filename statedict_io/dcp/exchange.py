"""What ranks send each other in a save to an object: their bytes of parts that others send to the store, and CRCs.

Over TCP connections of their own. DCP has no messages between the plan and the end of all writes, and collectives would
let all ranks wait for one that has failed; a connection tells at once. Where a rank listens travels in DCP's plans,
beside a token that whoever connects has to know. Nothing is encrypted, as between ranks of gloo and NCCL.
"""

from __future__ import annotations

import contextlib
import errno
import hmac
import os
import socket
import struct
import threading
from collections.abc import Callable
from typing import NamedTuple, Protocol

_HELLO = struct.Struct("!16sI")  # token, rank
_MESSAGE = struct.Struct("!BIQQQQ")
_PIECE, _CRC, _END = 1, 2, 3
_SUCCESS = b"\1"
TOKEN_NBYTES = 16
_CONNECT_SECONDS = 60
_MAX_BLOCK_NBYTES = 256 << 10
_BACKLOG = 4096
# A machine that is gone says nothing: after two minutes it is taken for dead.
_KEEPALIVE = {"TCP_KEEPIDLE": 30, "TCP_KEEPINTVL": 10, "TCP_KEEPCNT": 9, "TCP_USER_TIMEOUT": 120_000}


class Address(NamedTuple):
    host: str
    port: int


class Rows(NamedTuple):
    """Of a part, rows of bytes at one pitch; they travel without gaps."""

    part: int  #: its number
    offset: int  #: in the part
    row_nbytes: int
    num_rows: int
    pitch: int

    @property
    def nbytes(self) -> int:
        return self.row_nbytes * self.num_rows


class Sink(Protocol):
    """Of what other ranks send. From several threads."""

    def rows(self, rows: Rows) -> memoryview:
        """Where they go: memory that reaches from the first byte to the last. May wait."""

    def arrived(self, rows: Rows) -> None:
        """All of them are there."""

    def add_crc(self, record: int, crc: int, nbytes: int) -> None:
        """What ``nbytes`` of a record, known by the offset of its payload, add to its CRC."""

    def fail(self, error: BaseException) -> object: ...


class Listener:
    """Where other ranks can reach this one. Their connections wait until :meth:`serve`."""

    def __init__(self) -> None:
        host = _host_of_this_machine()
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        self._socket = socket.create_server((host, 0), family=family, backlog=_BACKLOG)
        self.address = Address(host, self._socket.getsockname()[1])
        self._lock = threading.Lock()
        self._connections: set[socket.socket] = set()
        self._has_succeeded = False
        self._is_closed = False

    def serve(self, token: bytes, sink: Sink) -> None:
        """Has threads take what arrives, until :meth:`close`."""
        _start(self._accept, token, sink)

    def tell_success(self) -> None:
        """Whoever is connected, or will be, learns that this rank has had all that it needs and has done its own."""
        with self._lock:
            self._has_succeeded = True
            for connection in self._connections:
                _tell_success(connection)

    def close(self) -> None:
        """Whoever is connected learns that this rank has failed, unless it has succeeded before."""
        with self._lock:
            self._is_closed = True
            for each in (self._socket, *self._connections):
                _shut(each)
            self._connections.clear()

    def _accept(self, token: bytes, sink: Sink) -> None:
        while True:
            try:
                connection, _ = self._socket.accept()
            except OSError:
                return  # closed
            _start(self._receive, connection, token, sink)

    def _receive(self, connection: socket.socket, token: bytes, sink: Sink) -> None:
        rank = None
        try:
            _keep_alive(connection)
            rank = self._introduced(connection, token)
            while rank is not None and _take_message(connection, sink):
                pass
        except BaseException as e:
            if rank is not None and not self._has_succeeded:
                sink.fail(_peer_error(rank, e) if isinstance(e, (OSError, EOFError)) else e)
            rank = None
        if rank is None:
            with self._lock:
                self._connections.discard(connection)
            _shut(connection)

    def _introduced(self, connection: socket.socket, token: bytes) -> int | None:
        """Whose connection it is, which is kept; None of a stranger's."""
        hello = bytearray(_HELLO.size)
        _receive_into(connection, memoryview(hello))
        theirs, rank = _HELLO.unpack(hello)
        with self._lock:
            if self._is_closed or not hmac.compare_digest(theirs, token):
                return None
            self._connections.add(connection)
            if self._has_succeeded:
                _tell_success(connection)
        return int(rank)


class Peers:
    """The connections to other ranks. Used by one thread, but for :meth:`cut_off`.

    Args:
        rank: this one.
        addresses: of all ranks.
        token: of this save.
        on_lost: called, in another thread, when a rank to which there is a connection has failed.
    """

    def __init__(
        self,
        rank: int,
        addresses: list[Address | None],
        token: bytes,
        on_lost: Callable[[BaseException], object] = lambda error: None,
    ) -> None:
        self._rank = rank
        self._addresses = addresses
        self._token = token
        self._on_lost = on_lost
        self._connections: dict[int, socket.socket] = {}
        self._is_cut_off = False

    def watch(self, rank: int) -> None:
        """Whether it fails. Raises as :meth:`send_rows`."""
        self._send(rank)

    def send_rows(self, rank: int, rows: Rows, data: memoryview) -> None:
        """
        Raises:
            ConnectionError: the rank has failed, or cannot be reached.
        """
        self._send(rank, _MESSAGE.pack(_PIECE, rows.part, *rows[1:]), data)

    def send_crc(self, rank: int, record: int, crc: int, nbytes: int) -> None:
        """See :meth:`Sink.add_crc`. Raises as :meth:`send_rows`."""
        self._send(rank, _MESSAGE.pack(_CRC, crc, record, nbytes, 0, 0))

    def end(self) -> None:
        """Nothing more comes."""
        for connection in self._connections.values():
            with contextlib.suppress(OSError):
                connection.sendall(_MESSAGE.pack(_END, 0, 0, 0, 0, 0))

    def cut_off(self) -> None:
        """For any thread: who sends does not wait any longer, who receives learns that this rank has failed."""
        self._is_cut_off = True
        for connection in list(self._connections.values()):
            _shut(connection)

    def _send(self, rank: int, *data: bytes | memoryview) -> None:
        try:
            connection = self._connections.get(rank)
            if connection is None:
                connection = self._connect(rank)
            for each in data:
                connection.sendall(each)
        except OSError as e:
            raise _peer_error(rank, e, self._addresses[rank]) from e

    def _connect(self, rank: int) -> socket.socket:
        address = self._addresses[rank]
        assert address is not None, "ranks of one save listen, or are alone"
        connection = socket.create_connection(address, timeout=_CONNECT_SECONDS)
        connection.settimeout(None)
        _keep_alive(connection)
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self._connections[rank] = connection
        if self._is_cut_off:
            _shut(connection)
        connection.sendall(_HELLO.pack(self._token, self._rank))
        _start(self._watch, rank, connection)
        return connection

    def _watch(self, rank: int, connection: socket.socket) -> None:
        answer, error = b"", None
        try:
            answer = connection.recv(1)
        except OSError as e:
            error = e
        if answer != _SUCCESS and not self._is_cut_off:
            self._on_lost(_peer_error(rank, error or EOFError()))


def blocks_nbytes(row_nbytes: int) -> int:
    """How much of rows of that length one message holds at most: of several rows less, because their receiver puts
    them apart."""
    return _MAX_BLOCK_NBYTES if row_nbytes < _MAX_BLOCK_NBYTES else 1 << 20


def _take_message(connection: socket.socket, sink: Sink) -> bool:
    """False after the last."""
    header = bytearray(_MESSAGE.size)
    _receive_into(connection, memoryview(header))
    kind, first, *fields = _MESSAGE.unpack(header)
    if kind == _END:
        return False
    if kind == _CRC:
        sink.add_crc(fields[0], first, fields[1])
        return True
    rows = Rows(first, *fields)
    if kind != _PIECE or (rows.num_rows > 1 and rows.nbytes > _MAX_BLOCK_NBYTES):
        raise ValueError("a rank sends what is no message of this version of statedict_io: all need the same one")
    place = sink.rows(rows)
    if rows.num_rows == 1:
        _receive_into(connection, place)
    else:
        block = bytearray(rows.nbytes)
        _receive_into(connection, memoryview(block))
        for row in range(rows.num_rows):
            at = row * rows.pitch
            place[at : at + rows.row_nbytes] = block[row * rows.row_nbytes : (row + 1) * rows.row_nbytes]
    sink.arrived(rows)
    return True


def _receive_into(connection: socket.socket, destination: memoryview) -> None:
    while destination:
        nbytes = connection.recv_into(destination)
        if nbytes == 0:
            raise EOFError
        destination = destination[nbytes:]


def _peer_error(rank: int, error: BaseException, address: Address | None = None) -> ConnectionError:
    if address is None or isinstance(error, (BrokenPipeError, ConnectionResetError)):
        return ConnectionAbortedError(errno.ECONNABORTED, f"rank {rank} has failed, which ends the save of all ranks")
    return ConnectionRefusedError(
        errno.ECONNREFUSED,
        f"rank {rank} cannot be reached at {address.host}:{address.port}, or has failed ({error}): in a save to a "
        "store ranks send each other bytes of parts by TCP; GLOO_SOCKET_IFNAME names the network interface to use",
    )


def _start(run: Callable[..., None], *arguments: object) -> None:
    threading.Thread(target=run, args=arguments, name="exchange of ranks", daemon=True).start()


def _tell_success(connection: socket.socket) -> None:
    with contextlib.suppress(OSError):
        connection.sendall(_SUCCESS)


def _shut(connection: socket.socket) -> None:
    with contextlib.suppress(OSError):
        connection.shutdown(socket.SHUT_RDWR)  # wakes whoever waits in it, which closing does not
    connection.close()


def _keep_alive(connection: socket.socket) -> None:
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    for name, value in _KEEPALIVE.items():
        option = getattr(socket, name, None)  # each system has some of them
        if option is not None:
            with contextlib.suppress(OSError):
                connection.setsockopt(socket.IPPROTO_TCP, option, value)


def _host_of_this_machine() -> str:
    """By which other ranks reach it: of the interface that gloo is told to use, else of the one that leads to the rank
    that all have met at."""
    interface = os.environ.get("GLOO_SOCKET_IFNAME", "").split(",")[0]
    if interface:
        found = _address_of_interface(interface)
        if found is not None:
            return found
    meeting_place = os.environ.get("MASTER_ADDR") or socket.gethostname()
    with contextlib.suppress(OSError):
        family, kind, protocol, _, address = socket.getaddrinfo(meeting_place, 9, type=socket.SOCK_DGRAM)[0]
        with socket.socket(family, kind, protocol) as probe:
            probe.connect(address)  # sends nothing
            return str(probe.getsockname()[0])
    return "127.0.0.1"


def _address_of_interface(name: str) -> str | None:
    """IPv4; None where it has none, or where the system is not asked this way."""
    with contextlib.suppress(ImportError, OSError), socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        import fcntl

        siocgifaddr = 0x8915
        answer = fcntl.ioctl(probe.fileno(), siocgifaddr, struct.pack("256s", name[:15].encode()))
        return socket.inet_ntoa(answer[20:24])
    return None
