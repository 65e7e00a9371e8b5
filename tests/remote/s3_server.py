"""An S3 server in a thread of this process, behind a door that counts requests and makes them fail.

The wire is real: HTTP on loopback, multipart uploads, range requests, signatures in headers. What is behind the door is
moto's server, or a store in memory that answers as moto does and takes less time.
"""

import base64
import contextlib
import functools
import io
import socket
import threading
import time
import zlib

from werkzeug.serving import WSGIRequestHandler, make_server

from .s3_request import request_of

KEY, SECRET = "the-key", "the-secret"
ERROR = "<?xml version='1.0'?><Error><Code>{}</Code><Message>{}</Message></Error>"


def error(status, code, message="injected"):
    """A fault: the request is answered so."""

    def answer(environ, start_response):
        _drain(environ)
        body = ERROR.format(code, message).encode()
        start_response(f"{status} {code}", [("Content-Type", "application/xml"), ("Content-Length", str(len(body)))])
        return [] if environ["REQUEST_METHOD"] == "HEAD" else [body]

    return answer


def drop(environ, start_response):
    """A fault: the connection breaks before there is an answer."""
    _drain(environ, at_most=1 << 16)
    environ["werkzeug.socket"].shutdown(socket.SHUT_RDWR)
    raise ConnectionError


def cut_short(nbytes):
    """A fault: of the answer's body only the first bytes come."""

    def answer(environ, start_response, app):
        def start(status, headers, exc_info=None):
            return start_response(status, headers, exc_info)

        body = b"".join(app(environ, start))
        yield body[:nbytes]
        environ["werkzeug.socket"].shutdown(socket.SHUT_RDWR)

    answer.needs_app = True
    return answer


def late(seconds):
    """A fault: the answer takes that long."""

    def answer(environ, start_response, app):
        time.sleep(seconds)
        return app(environ, start_response)

    answer.needs_app = True
    return answer


def lose_answer(environ, start_response, app):
    """A fault: what is asked is done, and the connection breaks before the answer."""
    b"".join(app(environ, lambda *_: None))
    environ["werkzeug.socket"].shutdown(socket.SHUT_RDWR)
    raise ConnectionError


def do_twice(environ, start_response, app):
    """A fault: the request comes twice, as from a proxy that repeats it; the second answer is given."""
    body = _body(environ)
    b"".join(app({**environ, "wsgi.input": io.BytesIO(body)}, lambda *_: None))
    return app({**environ, "wsgi.input": io.BytesIO(body)}, start_response)


def damage(environ, start_response, app):
    """A fault: a bit of the body changes on its way."""
    body = bytearray(_body(environ))
    body[len(body) // 2] ^= 4
    return app({**environ, "wsgi.input": io.BytesIO(body)}, start_response)


lose_answer.needs_app = do_twice.needs_app = damage.needs_app = True


def _body(environ):
    return environ["wsgi.input"].read(int(environ.get("CONTENT_LENGTH") or 0))


def held(until):
    """A fault: there is no answer before an event, and then the connection breaks."""

    def answer(environ, start_response):
        until.wait(60)
        return drop(environ, start_response)

    return answer


def _drain(environ, at_most=None):
    left = int(environ.get("CONTENT_LENGTH") or 0)
    left = left if at_most is None else min(left, at_most)
    while left > 0 and (data := environ["wsgi.input"].read(min(left, 1 << 16))):
        left -= len(data)


def moto():
    from moto.server import DomainDispatcherApplication, create_backend_app  # takes seconds

    app = DomainDispatcherApplication(create_backend_app)

    def checked(environ, start_response):
        """moto takes bodies whatever their checksums are."""
        text = environ.get("HTTP_X_AMZ_CHECKSUM_CRC32")
        if text is not None and environ["REQUEST_METHOD"] == "PUT":
            body = _body(environ)
            environ = {**environ, "wsgi.input": io.BytesIO(body)}
            if zlib.crc32(body).to_bytes(4, "big") != base64.b64decode(text):
                return error(400, "BadDigest", "The checksum did not match what we received")(environ, start_response)
        return app(environ, start_response)

    return checked


class Quiet(WSGIRequestHandler):
    protocol_version = "HTTP/1.1"

    def log(self, *_):
        pass

    def run_wsgi(self):
        with contextlib.suppress(OSError):
            super().run_wsgi()


class S3Server:
    """``requests``: what came, in order. ``faults``: [(predicate of a request, fault, how often)]."""

    def __init__(self, app):
        """``app`` is a WSGI application."""
        self.requests = []
        self.faults = []
        self.keys = {KEY}  #: that are valid
        self.delay = 0.0  #: of each answer, seconds: a network
        self.busiest = 0  #: requests at one time
        self.num_round_trips = 0  #: one after the other: a request belongs to the next after the last that was answered
        self._num_answered = 0  #: of these
        self._now = 0
        self._lock = threading.Lock()
        self._app = app
        self._server = make_server("127.0.0.1", 0, self._door, threaded=True, request_handler=Quiet)
        self._server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self._server.server_port}"
        threading.Thread(target=self._server.serve_forever, daemon=True).start()

    def stop(self):
        self._server.shutdown()
        self._server.server_close()

    def fail(self, predicate, fault, times=1 << 30):
        self.faults.append([predicate, fault, times])

    def reset(self):
        self.faults.clear()
        self.requests.clear()
        self.keys = {KEY}
        self.delay, self.busiest = 0.0, 0
        self.num_round_trips = self._num_answered = 0

    def kinds(self):
        return [request.kind for request in self.requests]

    def _door(self, environ, start_response):
        request = request_of(
            environ["REQUEST_METHOD"],
            environ["PATH_INFO"],
            environ["QUERY_STRING"],
            functools.partial(_header, environ),
        )
        with self._lock:
            self.requests.append(request)
            self._now += 1
            self.busiest = max(self.busiest, self._now)
            round_trip = self._num_answered + 1
            self.num_round_trips = max(self.num_round_trips, round_trip)
        try:
            time.sleep(self.delay)
            if not any(f"Credential={key}/" in environ.get("HTTP_AUTHORIZATION", "") for key in self.keys):
                text = "The AWS Access Key Id you provided does not exist in our records."
                return error(403, "InvalidAccessKeyId", text)(environ, start_response)
            for fault in self.faults:
                if fault[2] > 0 and fault[0](request):
                    fault[2] -= 1
                    if getattr(fault[1], "needs_app", False):
                        return fault[1](environ, start_response, self._app)
                    return fault[1](environ, start_response)
            return self._app(environ, start_response)
        finally:
            with self._lock:
                self._now -= 1
                self._num_answered = max(self._num_answered, round_trip)


def _header(environ, name):
    name = name.upper().replace("-", "_")
    return environ.get(name if name == "CONTENT_LENGTH" else f"HTTP_{name}")
