"""Connections between ranks: where they lead, and what each end learns of the other's failure."""

import socket
import sys
import threading

import pytest

from statedict_io.dcp import exchange
from statedict_io.dcp.exchange import Listener, Peers, Rows

TOKEN = b"0123456789abcdef"


class Part:
    """A sink of one part."""

    def __init__(self, nbytes=1000):
        self.bytes = bytearray(nbytes)
        self.crcs = []
        self.error = None
        self.event = threading.Event()

    def rows(self, rows):
        return memoryview(self.bytes)[rows.offset : rows.offset + (rows.num_rows - 1) * rows.pitch + rows.row_nbytes]

    def arrived(self, rows):
        self.event.set()

    def add_crc(self, record, crc, nbytes):
        self.crcs.append((record, crc, nbytes))
        self.event.set()

    def fail(self, error):
        self.error = error
        self.event.set()


@pytest.fixture
def ends():
    """(listener of rank 1, its part, rank 0's connections, what rank 0 hears of lost ranks)."""
    listener, part, lost = Listener(), Part(), Part()
    peers = Peers(0, [None, listener.address], TOKEN, lost.fail)
    yield listener, part, peers, lost
    peers.cut_off()
    listener.close()


def test_rows_and_crcs_arrive(ends):
    listener, part, peers, _ = ends
    rows = Rows(3, 10, row_nbytes=4, num_rows=3, pitch=100)
    peers.send_rows(1, rows, memoryview(b"aaaabbbbcccc"))  # before anybody listens
    listener.serve(TOKEN, part)
    assert part.event.wait(20)
    assert bytes(part.bytes[10:14] + part.bytes[110:114] + part.bytes[210:214]) == b"aaaabbbbcccc"
    part.event.clear()
    peers.send_crc(1, 1 << 40, 0xFFFFFFFF, 1 << 50)
    assert part.event.wait(20)
    assert part.crcs == [(1 << 40, 0xFFFFFFFF, 1 << 50)]


def test_who_sends_is_told_of_a_failure_and_not_of_a_success(ends):
    listener, part, peers, lost = ends
    listener.serve(TOKEN, part)
    peers.watch(1)
    listener.tell_success()
    peers.end()
    listener.close()
    assert not lost.event.wait(0.2) and part.error is None
    late = Peers(2, [None, listener.address, None], TOKEN, lost.fail)
    with pytest.raises(ConnectionError, match="rank 1 cannot be reached"):
        late.watch(1)


@pytest.mark.parametrize("is_served", [True, False])
def test_a_rank_that_fails_is_noticed_by_who_only_watches(ends, is_served):
    """Also where it has not even looked who is there."""
    listener, part, peers, lost = ends
    if is_served:
        listener.serve(TOKEN, part)
    peers.watch(1)
    listener.close()
    assert lost.event.wait(20) and "rank 1 has failed" in str(lost.error)


def test_who_watches_late_learns_of_the_success(ends):
    listener, part, peers, lost = ends
    listener.serve(TOKEN, part)
    listener.tell_success()
    peers.watch(1)
    peers.send_crc(1, 1, 2, 3)
    assert part.event.wait(20)
    listener.close()
    assert not lost.event.wait(0.2)


def test_a_sender_that_fails_amid_its_bytes_is_noticed(ends):
    listener, part, peers, _ = ends
    listener.serve(TOKEN, part)
    peers.send_rows(1, Rows(0, 0, 100, 1, 100), memoryview(bytes(50)))  # of 100
    peers.cut_off()
    assert part.event.wait(20) and "rank 0 has failed" in str(part.error)


def test_who_waits_for_a_busy_rank_is_woken(ends):
    """By what has failed elsewhere in its own process."""
    _, _, peers, lost = ends
    rows = Rows(0, 0, 64 << 20, 1, 64 << 20)  # more than the system takes for who does not listen
    threading.Timer(0.2, peers.cut_off).start()
    with pytest.raises(ConnectionError):
        peers.send_rows(1, rows, memoryview(bytes(rows.nbytes)))
    assert lost.error is None


def test_another_version_is_told_from_bytes(ends):
    listener, part, peers, _ = ends
    listener.serve(TOKEN, part)
    peers._send(1, exchange._MESSAGE.pack(77, 0, 0, 0, 0, 0))
    assert part.event.wait(20) and "all need the same one" in str(part.error)


def test_where_ranks_listen(monkeypatch):
    """On the interface that leads to where they met, or the one that gloo is told to use."""
    monkeypatch.delenv("GLOO_SOCKET_IFNAME", raising=False)
    monkeypatch.setenv("MASTER_ADDR", "localhost")
    assert exchange._host_of_this_machine() in ("127.0.0.1", "::1")
    monkeypatch.setenv("MASTER_ADDR", "192.0.2.7")  # nobody's; the route there is that of the default gateway, if any
    try:
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
            probe.connect(("192.0.2.7", 9))
            expected = probe.getsockname()[0]
    except OSError:
        expected = "127.0.0.1"
    assert exchange._host_of_this_machine() == expected
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "lo")
    if sys.platform == "linux":
        assert exchange._host_of_this_machine() == "127.0.0.1"
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "no such interface")
    assert exchange._host_of_this_machine() == expected
