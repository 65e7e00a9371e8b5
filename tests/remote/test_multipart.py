"""Parts sent in any order, by any thread and by the holder of a ticket; objects that must not be replaced."""

import errno
import pickle
import random
import threading
import zlib

import pytest

from remote.conftest import BUCKET, content, uploads
from remote.s3_server import drop, error, lose_answer
from statedict_io.remote import multipart_stores
from statedict_io.remote.multipart import SentPart
from statedict_io.remote.stores import locate

NAME = "object"
URL = f"s3://{BUCKET}/{NAME}"
PIECES = [random.Random(i).randbytes(1000 + i) for i in range(20)]

pytestmark = pytest.mark.usefixtures("small_parts")


@pytest.fixture(autouse=True)
def fail_soon(monkeypatch):
    s3fs = pytest.importorskip("s3fs")
    monkeypatch.setattr(s3fs.S3FileSystem, "retries", 2)


def sent(upload, numbers):
    return [upload.put_part(number, memoryview(PIECES[number - 1])) for number in numbers]


def by_if_none_match(environ):
    return environ.get("HTTP_IF_NONE_MATCH") == "*"


def test_any_thread_and_any_holder_of_a_ticket_sends_parts_in_any_order(s3):
    place = locate(URL)
    upload = multipart_stores.begin(place)
    other = multipart_stores.join(place, pickle.loads(pickle.dumps(upload.ticket)))
    numbers = random.Random(7).sample(range(1, 21), 20)
    found: list[SentPart] = []
    threads = [
        threading.Thread(target=lambda i=i: found.extend(sent((upload, other)[i % 2], numbers[i::4]))) for i in range(4)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    upload.complete(pickle.loads(pickle.dumps(found)))
    assert content(s3, NAME) == b"".join(PIECES)
    assert [request.crc32 for request in s3.requests if request.kind == "complete"] == [zlib.crc32(b"".join(PIECES))]
    assert uploads(s3) == []


def test_numbers_may_have_gaps_and_a_part_be_sent_again(s3):
    upload = multipart_stores.begin(locate(URL))
    upload.put_part(500, memoryview(b"x" * 300))
    upload.complete([*sent(upload, [7]), upload.put_part(500, memoryview(b"y" * 300))])
    assert content(s3, NAME) == PIECES[6] + b"y" * 300


def test_abort_waits_for_parts_and_refuses_more(s3):
    upload = multipart_stores.begin(locate(URL))
    entered, leave = threading.Event(), threading.Event()

    def hold(environ, start_response, app):
        entered.set()
        assert leave.wait(60)
        return app(environ, start_response)

    hold.needs_app = True
    s3.fail(lambda request: request.kind == "part", hold)
    sending = threading.Thread(target=sent, args=(upload, [1]))
    aborting = threading.Thread(target=upload.abort)
    sending.start()
    assert entered.wait(60)
    aborting.start()
    aborting.join(0.1)
    assert aborting.is_alive() and "abort" not in s3.kinds()
    leave.set()
    sending.join(60)
    aborting.join(60)
    assert uploads(s3) == []
    with pytest.raises(OSError) as caught:
        sent(upload, [2])
    assert caught.value.errno == errno.ECANCELED and caught.value.filename == URL
    upload.abort()  # again: nothing
    assert s3.kinds().count("abort") == 1


def put_whole(place):
    multipart_stores.put(place, memoryview(b"new"), replace=False)


def put_parts(place):
    upload = multipart_stores.begin(place)
    try:
        upload.complete([upload.put_part(1, memoryview(b"new"))], replace=False)
    except BaseException:
        upload.abort()
        raise


def not_implemented(environ, start_response, app):
    if by_if_none_match(environ):
        return error(501, "NotImplemented")(environ, start_response)
    return app(environ, start_response)


def conflict(environ, start_response, app):
    return error(409, "ConditionalRequestConflict")(environ, start_response)


not_implemented.needs_app = conflict.needs_app = True


@pytest.mark.parametrize("store", [None, not_implemented, conflict], ids=["knows it", "does not", "is busy"])
@pytest.mark.parametrize("put", [put_whole, put_parts])
def test_an_object_that_must_stay(put, store, s3):
    s3.client.put_object(Bucket=BUCKET, Key=NAME, Body=b"new")  # the very bytes
    if store is not None:
        s3.fail(lambda request: request.kind in ("complete", "put"), store)
    with pytest.raises(FileExistsError) as caught:
        put(locate(URL))
    assert caught.value.errno == errno.EEXIST and caught.value.filename == URL
    assert content(s3, NAME) == b"new" and uploads(s3) == []


@pytest.mark.parametrize("fault", [None, not_implemented, drop, lose_answer, error(409, "ConditionalRequestConflict")])
@pytest.mark.parametrize("put", [put_whole, put_parts])
def test_an_object_that_is_new(put, fault, s3):
    if fault is not None:
        times = 1 << 30 if fault is not_implemented else 1
        s3.fail(lambda request: request.kind in ("complete", "put"), fault, times=times)
    put(locate(URL))
    assert content(s3, NAME) == b"new" and uploads(s3) == []
