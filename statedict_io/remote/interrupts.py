"""Ending a request that another thread is waiting for."""

from __future__ import annotations

import contextlib
import socket
import threading
from collections.abc import Iterator
from typing import Any

_of_thread = threading.local()


class Interrupt(threading.Event):
    """Of one request, possibly repeated, in one thread; :meth:`set` it from another."""

    def __init__(self) -> None:
        super().__init__()
        self._lock = threading.Lock()
        self._connection: Any = None
        self.is_writing = False  #: into memory that the caller of the request gets: it has to be waited for

    def set(self) -> None:
        """Whoever waits for the connection finds it closed."""
        with self._lock:
            super().set()
            found = getattr(self._connection, "sock", None)
            if found is not None:
                with contextlib.suppress(OSError):
                    found.shutdown(socket.SHUT_RDWR)

    def begin_writing(self) -> bool:
        """False where it is too late."""
        with self._lock:
            self.is_writing = not self.is_set()
            return self.is_writing

    def uses(self, connection: Any) -> None:
        """``connection``: with a ``sock``; None when the request is over.

        Raises:
            ConnectionAbortedError: it is too late.
        """
        with self._lock:
            self._connection = connection
            if connection is not None and self.is_set():
                raise ConnectionAbortedError("interrupted")

    @contextlib.contextmanager
    def of_this_thread(self) -> Iterator[None]:
        """Connections that send requests in the block can be interrupted, where they are :func:`watched`."""
        _of_thread.interrupt = self
        try:
            yield
        finally:
            _of_thread.interrupt = None
            self.uses(None)


def watch_connections(client: Any) -> None:
    """Those of a botocore client that has not been used yet. Where botocore is built otherwise, its requests end by
    their time limits."""
    with contextlib.suppress(AttributeError, TypeError):
        session = client._endpoint.http_session
        classes = {scheme: _watched_pool(pool) for scheme, pool in session._pool_classes_by_scheme.items()}
        session._pool_classes_by_scheme.update(classes)
        session._manager.pool_classes_by_scheme = session._pool_classes_by_scheme


def _watched_pool(pool: type) -> type:
    class Watched(pool.ConnectionCls):  # type: ignore[name-defined, misc]
        def connect(self) -> None:
            super().connect()
            _note(self)

        def request(self, *args: Any, **kwargs: Any) -> Any:
            _note(self)
            return super().request(*args, **kwargs)

    return type(pool.__name__, (pool,), {"ConnectionCls": Watched})


def _note(connection: Any) -> None:
    interrupt = getattr(_of_thread, "interrupt", None)
    if interrupt is not None:
        interrupt.uses(connection)
