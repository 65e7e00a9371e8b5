"""A client of S3 for many threads, configured as the fsspec file system behind a URL is.

The file system has a client of its own, on an event loop in one thread, which signs, encrypts and copies all that is
sent. This one is botocore's, which s3fs brings along: each thread has a connection, and hashes and sends without the
interpreter's lock.
"""

from __future__ import annotations

import asyncio
import copy
import random
import sys
import threading
import weakref
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

from ..system.processes import in_forked_child
from .interrupts import watch_connections
from .part_sizes import connections_of

_PIECE_NBYTES = 256 << 10
_MAX_WAIT_SECONDS = 15.0

#: S3's words for what may not happen again.
_PASSING_CODES = {
    "BadDigest",  # the body was damaged on its way
    "BandwidthLimitExceeded",
    "ConditionalRequestConflict",
    "IncompleteBody",
    "InternalError",
    "OperationAborted",
    "RequestLimitExceeded",
    "RequestTimeout",
    "RequestTimeoutException",
    "ServiceUnavailable",
    "SlowDown",
    "Throttling",
    "ThrottlingException",
    "TooManyRequestsException",
    "XAmzContentSHA256Mismatch",
}
_CONFIGURATION = (
    *("anon", "client_kwargs", "endpoint_url", "key", "kwargs", "req_kw", "retries", "s3_additional_kwargs"),
    *("secret", "storage_options", "token", "use_ssl"),
)
_EXPIRED_CODES = {"ExpiredToken", "ExpiredTokenException", "TokenRefreshRequired"}


def serves(fs: Any) -> bool:
    """Whether ``fs`` is s3fs's file system, of which a client can be made."""
    s3fs = sys.modules.get("s3fs")  # it is what has made ``fs``
    return s3fs is not None and isinstance(fs, s3fs.S3FileSystem)


def client_of(fs: Any) -> S3Client:
    """One in each process for all file systems of one configuration, which are equal, while the first of them lives."""
    with _lock:
        client = _clients.get(fs)
        if client is None:
            client = _clients[fs] = S3Client(fs)
        return client


class S3Client:
    """For any thread. Use :func:`client_of`."""

    def __init__(self, fs: Any) -> None:
        self._fs = SimpleNamespace(**{name: getattr(fs, name) for name in _CONFIGURATION})  # which may live shorter
        # botocore would change the dictionaries in it.
        self._fs.config_kwargs = copy.deepcopy(fs._prepare_config_kwargs())
        # A forked child has none of its parent's.
        self._fs.loop = fs.loop if "session" in fs.storage_options else None
        self._lock = threading.Lock()
        #: whether requests may have checksums: as configured, and until the store has been found to know of none
        self.has_checksums = True
        self._client = self._connected()

    def call(
        self,
        operation: str,
        *,
        stop: threading.Event | None = None,
        note: Callable[[Exception], object] = lambda error: None,
        **parameters: Any,
    ) -> dict[str, Any]:
        """
        Args:
            operation: of botocore's client: ``"upload_part"``.
            stop: when set, nothing is repeated any more.
            note: called with the error of each attempt.
            parameters: of the operation. A ``Body`` may be a memoryview, which is sent without a copy.

        Raises:
            OSError: what the store answered, as s3fs translates it, without a URL.
            Exception: what botocore raises for anything else.
        """
        from s3fs.errors import translate_boto_error

        num_failed = 0
        while True:
            client = self._client
            try:
                return getattr(client, operation)(**self._with_defaults(client, operation, parameters))
            except Exception as e:
                note(e)
                num_failed += 1
                is_last = num_failed >= self.num_attempts or (stop is not None and stop.is_set())
                if is_last or not (_may_pass(e) or self._is_renewed_after(e, client)):
                    found = translate_boto_error(e)
                    if found is e:  # no answer of the store
                        raise
                    raise found from e
            (stop or threading.Event()).wait(wait_seconds(num_failed))

    def _with_defaults(self, client: Any, operation: str, parameters: dict[str, Any]) -> dict[str, Any]:
        name = client.meta.method_to_api_mapping[operation]
        taken = client.meta.service_model.operation_model(name).input_shape.members
        defaults = {**self._fs.s3_additional_kwargs, **self._fs.req_kw}
        return {**{key: value for key, value in defaults.items() if key in taken}, **parameters}

    def _is_renewed_after(self, error: Exception, client: Any) -> bool:
        """Credentials that have expired may have been renewed where they came from: a file, the environment."""
        if code_of(error) not in _EXPIRED_CODES:
            return False
        with self._lock:
            if self._client is client:
                self._client = self._connected()
        return True

    def _connected(self) -> Any:
        from botocore import UNSIGNED
        from botocore.config import Config

        fs = self._fs
        secrets = {"aws_access_key_id": fs.key, "aws_secret_access_key": fs.secret, "aws_session_token": fs.token}
        options = {"use_ssl": fs.use_ssl, **fs.client_kwargs}
        options.update({} if fs.endpoint_url is None else {"endpoint_url": fs.endpoint_url})
        options.update({name: value for name, value in secrets.items() if value is not None})
        config = Config(**fs.config_kwargs)
        if "config" in options:
            config = options.pop("config").merge(config)
        ours: dict[str, Any] = {
            "max_pool_connections": connections_of(fs) + 2,
            "parameter_validation": False,  # would refuse a memoryview
            "request_checksum_calculation": "when_required",  # what is optional is made here, faster
            "retries": {"total_max_attempts": 1},  # its waits could not be cut short
        }
        if fs.anon:
            ours["signature_version"] = UNSIGNED
            options = {name: value for name, value in options.items() if name not in secrets}
        session = _session_of(fs)
        client = session.create_client("s3", config=config.merge(Config(**ours)), **options)
        client.meta.events.register("before-send.s3", _send_in_pieces)
        watch_connections(client)
        wish = config.request_checksum_calculation or session.get_config_variable("request_checksum_calculation")
        self.has_checksums = self.has_checksums and str(wish).lower() != "when_required"
        #: of requests that may pass
        self.num_attempts = int(fs.retries) + _num_repetitions(session, config)
        return client


def wait_seconds(num_failed: int) -> float:
    """Before a request is repeated that has failed so many times."""
    return min(0.1 * 1.7**num_failed, _MAX_WAIT_SECONDS) * random.uniform(0.5, 1)


def status_of(error: BaseException | None) -> int | None:
    """Of the answer that became ``error``; None: there was none."""
    response = _response_of(error)
    return None if response is None else response.get("ResponseMetadata", {}).get("HTTPStatusCode")


def code_of(error: BaseException | None) -> str:
    """S3's word for it, "" where there was no answer."""
    response = _response_of(error)
    return "" if response is None else str(response.get("Error", {}).get("Code", ""))


def _response_of(error: BaseException | None) -> dict[str, Any] | None:
    while error is not None:
        response = getattr(error, "response", None)
        if isinstance(response, dict):
            return response
        error = error.__cause__
    return None


def _may_pass(error: Exception) -> bool:
    from botocore.exceptions import ClientError, HTTPClientError, IncompleteReadError
    from botocore.parsers import ResponseParserError

    if isinstance(error, ClientError):
        status = status_of(error) or 0
        return code_of(error) in _PASSING_CODES or status == 429 or (status >= 500 and status != 501)
    return isinstance(error, (HTTPClientError, IncompleteReadError, ResponseParserError, ConnectionError, TimeoutError))


def _session_of(fs: Any) -> Any:
    from botocore.session import Session

    given = fs.storage_options.get("session")
    if given is None:
        return Session(**fs.kwargs)
    session = Session(profile=given.profile)
    session._credentials = _CredentialsOfSession(given, fs.loop)
    return session


class _CredentialsOfSession:
    """Those of a session that the caller has given the file system: they are to be had on its event loop alone."""

    method = "the file system's session"
    account_id = None

    def __init__(self, session: Any, loop: asyncio.AbstractEventLoop) -> None:
        self._session = session
        self._loop = loop

    def get_frozen_credentials(self) -> Any:
        return asyncio.run_coroutine_threadsafe(self._get(), self._loop).result()

    async def _get(self) -> Any:
        return await (await self._session.get_credentials()).get_frozen_credentials()


def _num_repetitions(session: Any, config: Any) -> int:
    """That botocore would make of a request."""
    wanted = config.retries or {}
    if "total_max_attempts" in wanted:
        return int(wanted["total_max_attempts"]) - 1
    if "max_attempts" in wanted:
        return int(wanted["max_attempts"])
    attempts = session.get_config_variable("max_attempts")
    return 4 if attempts is None else int(attempts) - 1


def _send_in_pieces(request: Any, **_: Any) -> None:
    if isinstance(request.body, memoryview):
        request.body = _Pieces(request.body)


class _Pieces:
    """A body for urllib3: the time limit of a socket is that of one call of send, which a whole part can exceed."""

    def __init__(self, data: memoryview) -> None:
        self._data = data
        self._position = 0

    def read(self, _nbytes: int | None = None) -> memoryview:
        piece = self._data[self._position : self._position + _PIECE_NBYTES]
        self._position += len(piece)
        return piece

    def seek(self, position: int) -> None:
        self._position = position


_lock = threading.Lock()
_clients: weakref.WeakKeyDictionary[Any, S3Client] = weakref.WeakKeyDictionary()


def _start_anew() -> None:
    """In a forked child: the connections are its parent's."""
    global _lock, _clients
    _lock = threading.Lock()
    _clients = weakref.WeakKeyDictionary()


in_forked_child(_start_anew)
