"""The slow network: nothing is lost, nothing is faster than it may be, and everything is counted."""

import http.client
import os
import socket
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import pytest
from corpus_case import filled, random_bytes
from equality import difference

import statedict_io as sio
from remote import network as slow
from remote.memory_server import KEY, MemoryServer
from remote.memory_store import MemoryStore
from remote.network import Network

SIGNED = {"Authorization": f"AWS4-HMAC-SHA256 Credential={KEY}/"}
EARLY = 0.9  #: of what is due: clocks are read at different moments


@pytest.fixture(params=["spliced", "copied"])
def net(request, monkeypatch):
    if request.param == "copied":
        monkeypatch.setattr(slow, "_SplicedLine", slow._CopiedLine)
    elif not hasattr(os, "splice"):
        pytest.skip("no splice here")
    store = MemoryStore()
    store.put("bucket", "key", memoryview(b"0123456789"))
    server = MemoryServer(store)
    with Network(server.address, latency=0.0) as between:
        yield between
    server.stop()


class Client:
    def __init__(self, net):
        self.connection = http.client.HTTPConnection(net.url.removeprefix("http://"))

    def __call__(self, method="GET", key="key", body=None, **headers):
        self.connection.request(method, f"/bucket/{key}", body, {**SIGNED, **headers})
        answer = self.connection.getresponse()
        return answer.read()


def seconds(action):
    begin = time.monotonic()
    action()
    return time.monotonic() - begin


def test_all_bytes_come_both_ways(net):
    data = random_bytes(3_000_000).numpy().tobytes()
    net.latency, net.rate = 0.02, 20e6
    client = Client(net)
    client("PUT", "large", data)
    assert client(key="large") == data
    with ThreadPoolExecutor(4) as pool:
        assert set(pool.map(lambda _: Client(net)(key="large"), range(4))) == {data}


def test_a_request_takes_a_round_trip_and_a_connection_another(net):
    net.latency = 0.1
    client = Client(net)
    assert seconds(client) >= 0.2 * EARLY
    assert 0.1 * EARLY <= seconds(client) < 2


@pytest.mark.parametrize("method", ["PUT", "GET"])
def test_a_connection_has_a_rate_and_all_together_another(net, method):
    nbytes = 400_000
    Client(net)("PUT", "large", bytes(nbytes))

    def carried():
        Client(net)(method, "large", bytes(nbytes) if method == "PUT" else None)

    def by(connections):
        with ThreadPoolExecutor(connections) as pool:
            list(pool.map(lambda _: carried(), range(connections)))

    net.rate = 2e6  # 0.2 s
    assert seconds(carried) >= (0.2 - slow.LATE_SECONDS) * EARLY
    assert (0.2 - slow.LATE_SECONDS) * EARLY <= seconds(lambda: by(3)) < 10
    net.rate, net.total_rate = None, 4e6
    assert seconds(lambda: by(3)) >= (0.3 - slow.LATE_SECONDS) * EARLY


def test_what_is_counted(net):
    first, second = Client(net), Client(net)
    first("PUT", "new", b"abc")
    first(Range="bytes=2-4")
    second("HEAD")
    traffic = net.traffic
    assert traffic.kinds == {"put": 1, "get": 1, "head": 1}
    assert [e.request.range for e in traffic.exchanges] == [None, (2, 5), None]
    assert traffic.connections == traffic.most_connections == 2
    assert traffic.nbytes_up > 3 and traffic.nbytes_down > 3
    net.reset()
    first()
    assert net.traffic.summary() == {
        "requests": 1,
        "kinds": {"get": 1},
        "connections": 0,
        "most_connections": 2,
        "used_connections": 1,
        "nbytes_up": net.traffic.nbytes_up,
        "nbytes_down": net.traffic.nbytes_down,
        "round_trips": 1,
    }


def test_round_trips_are_those_that_wait_for_one_another(net):
    net.latency = 0.2
    clients = [Client(net) for _ in range(4)]
    clients[0]("HEAD")  # and the connection
    assert net.traffic.round_trips == 2
    clients[0]()
    assert net.traffic.round_trips == 3
    with ThreadPoolExecutor(3) as pool:
        list(pool.map(lambda client: client(), clients[1:]))  # beside each other, on new connections
    assert net.traffic.round_trips == 5
    assert net.traffic.used_connections == 4


@pytest.mark.timeout(30)
def test_a_side_that_hangs_up(net):
    client = Client(net)
    client()
    client.connection.close()
    client()  # on another connection
    with socket.create_server(("127.0.0.1", 0)) as door:

        def hang_up():
            sock, _ = door.accept()
            sock.recv(10)
            sock.close()

        threading.Thread(target=hang_up).start()
        with Network(door.getsockname()) as broken, pytest.raises((http.client.HTTPException, OSError)):
            Client(broken)()


def test_a_checkpoint_goes_through(s3, backend, monkeypatch):
    import fsspec.config

    state = {"w": filled(500, 1024), "few": filled(5)}
    host, port = s3.url.removeprefix("http://").split(":")
    with Network((host, int(port)), latency=0.01, rate=100e6) as net:
        monkeypatch.setitem(fsspec.config.conf["s3"], "endpoint_url", net.url)
        sio.save(state, "s3://bucket/model.pt", backend=backend)
        assert difference(sio.load("s3://bucket/model.pt", backend=backend), state) is None
    assert not net.traffic.kinds.keys() - {"put", "create", "part", "complete", "get", "head"}
    assert net.traffic.nbytes_up > 2_000_000 and net.traffic.nbytes_down > 2_000_000
