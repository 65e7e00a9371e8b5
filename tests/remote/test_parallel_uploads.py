"""Objects sent in parts, many at once: what is asked of the store, and what becomes of faults with others under way."""

import _thread
import errno
import itertools
import threading
import time
import zlib
from types import SimpleNamespace

import fsspec.config
import pytest
from corpus_case import filled, random_bytes

import statedict_io as sio
from remote.conftest import BUCKET, content, keys, uploads
from remote.s3_server import KEY, damage, do_twice, drop, error, late, lose_answer

KIB = 1 << 10
NAME = "model.pt"
URL = f"s3://{BUCKET}/{NAME}"
PART_NBYTES = 64 * KIB
COUNT = itertools.count()
NUM_PARTS = 13

pytestmark = pytest.mark.usefixtures("small_parts")


@pytest.fixture(scope="module")
def state():
    return {"w": random_bytes(12 * PART_NBYTES), "few": filled(5)}


@pytest.fixture
def configured(monkeypatch, s3):
    """configured(name=value, but=names): options of fsspec's configuration for s3, with others than before but some."""

    def configure(**options):
        config = {**fsspec.config.conf["s3"]["config_kwargs"], **options.pop("config_kwargs", {})}
        config["retries"] = {"total_max_attempts": 2, "mode": "legacy"}  # as botocore would spell it, in our dictionary
        config["user_agent_extra"] = f"test/{next(COUNT)}"  # no file system has had these options before
        without = options.pop("but", ())
        old = {name: value for name, value in fsspec.config.conf["s3"].items() if name not in without}
        monkeypatch.setitem(fsspec.config.conf, "s3", {**old, **options, "config_kwargs": config})

    return configure


@pytest.fixture(autouse=True)
def fail_soon(monkeypatch):
    """What may be bad luck is tried three times."""
    s3fs = pytest.importorskip("s3fs")
    monkeypatch.setattr(s3fs.S3FileSystem, "retries", 2)


@pytest.fixture(autouse=True)
def no_thread_is_left(s3):
    yield
    assert [thread.name for thread in threading.enumerate() if thread.name.startswith("upload ")] == []


def is_part(number):
    return lambda request: request.part == number


def is_kind(kind):
    return lambda request: request.kind == kind


def parts(s3):
    return [request for request in s3.requests if request.kind == "part"]


class Gate:
    """A fault: requests wait until it is opened, or so many are there."""

    needs_app = True

    def __init__(self, opens_at=1 << 30):
        self.opens_at = opens_at
        self.num_waiting = 0
        self.open = threading.Event()
        self.somebody_waits = threading.Event()
        self._lock = threading.Lock()

    def __call__(self, environ, start_response, app):
        with self._lock:
            self.num_waiting += 1
            if self.num_waiting >= self.opens_at:
                self.open.set()
        self.somebody_waits.set()
        assert self.open.wait(60)
        return app(environ, start_response)


# --- what is sent


@pytest.mark.parametrize("connections", [4, None])
def test_so_many_parts_are_sent_at_once(connections, s3, state, backend, configured):
    if connections is not None:
        configured(max_concurrency=connections)
    at_once = connections or 12  # of the 13 parts; 16 are allowed
    s3.fail(is_kind("part"), Gate(opens_at=at_once))
    sio.save(state, URL, backend=backend)
    assert sio.verify(URL).ok
    assert connections is None or s3.busiest == connections


def test_parts_are_of_one_size_and_the_object_of_their_bytes(s3, state, backend):
    sio.save(state, URL, backend=backend)
    sent = sorted(parts(s3), key=lambda request: request.part)
    assert [request.part for request in sent] == [*range(1, NUM_PARTS + 1)]
    assert {request.nbytes for request in sent[:-1]} == {PART_NBYTES}
    assert sum(request.nbytes for request in sent) == len(content(s3, NAME))
    kinds = s3.kinds()
    assert [kinds.count(kind) for kind in ("create", "complete", "put", "abort")] == [1, 1, 0, 0]


def test_a_small_object_is_one_request(s3, backend):
    sio.save({"few": filled(5)}, URL, backend=backend, digest="sha256")
    assert [(request.kind, request.path) for request in s3.requests if request.kind == "put"] == [
        ("put", f"/{BUCKET}/{NAME}"),
        ("put", f"/{BUCKET}/{NAME}.sha256"),
    ]
    assert "create" not in s3.kinds() and sio.verify(URL).ok


def test_the_part_size_is_configured_as_fsspec_does(s3, state, configured):
    configured(default_block_size=2 * PART_NBYTES)
    sio.save(state, URL)
    assert {request.nbytes for request in parts(s3) if request.part < 7} == {2 * PART_NBYTES}


def test_an_object_of_unknown_size(s3, state, monkeypatch):
    from statedict_io.remote import part_sizes

    monkeypatch.setattr(part_sizes, "_PART_NBYTES_OF_UNKNOWN_SIZE", 4 * PART_NBYTES)
    for obj, kind in ((state, "part"), ({"few": filled(5)}, "put")):
        s3.requests.clear()
        sio.save(obj, URL, _use_new_zipfile_serialization=False)
        assert kind in s3.kinds() and len({"part", "put"} & {*s3.kinds()}) == 1
        assert sio.load(URL).keys() == obj.keys()


def test_progress_counts_what_the_store_has_acknowledged(s3, state, backend):
    acknowledged = []

    def note(environ, start_response, app):
        answer = b"".join(app(environ, start_response))
        acknowledged.append(int(environ["CONTENT_LENGTH"]))
        return [answer]

    note.needs_app = True
    s3.fail(is_part(2), late(0.2))
    s3.fail(is_kind("part"), note)
    reported = []

    def report(done, total):
        reported.append((done, total, sum(acknowledged)))

    sio.save(state, URL, backend=backend, progress=report)
    nbytes = len(content(s3, NAME))
    assert {total for _, total, _ in reported} == {nbytes} and reported[-1][0] == nbytes
    assert [done for done, _, _ in reported] == sorted({done for done, _, _ in reported})
    second = PART_NBYTES  # acknowledged without the door's note, for it was late
    assert all(done <= known + second for done, _, known in reported)


def test_a_rate_is_kept(s3, state):
    start = time.perf_counter()
    sio.save_async(state, URL, max_bytes_per_second=12 * PART_NBYTES / 0.5).result()
    assert time.perf_counter() - start >= 0.45
    assert sio.verify(URL).ok


# --- checksums


def test_each_part_and_the_object_have_a_checksum(s3, state, backend):
    sio.save(state, URL, backend=backend)
    data = content(s3, NAME)
    assert all(
        request.crc32 == zlib.crc32(data[(request.part - 1) * PART_NBYTES : request.part * PART_NBYTES])
        for request in parts(s3)
    )
    assert [request.crc32 for request in s3.requests if request.kind == "complete"] == [zlib.crc32(data)]
    said = s3.client.head_object(Bucket=BUCKET, Key=NAME, ChecksumMode="ENABLED")
    assert said["ChecksumType"] == "FULL_OBJECT"
    sio.save({"few": 1}, URL, backend=backend)
    assert [request.crc32 for request in s3.requests if request.kind == "put"] == [zlib.crc32(content(s3, NAME))]


@pytest.mark.parametrize("kind", ["part", "put"])
@pytest.mark.parametrize("times", [1, 100])
def test_what_is_damaged_on_its_way_is_refused(kind, times, s3, state):
    obj = state if kind == "part" else {"few": filled(5)}
    number = 5 if kind == "part" else None
    s3.fail(lambda request: request.kind == kind and request.part == number, damage, times=times)
    if times == 1:
        sio.save(obj, URL)
        assert sio.verify(URL).ok
    else:
        with pytest.raises(OSError, match="checksum") as caught:
            sio.save(obj, URL)
        assert caught.value.filename == URL and keys(s3) == []
    assert uploads(s3) == []


def test_no_checksums_where_the_configuration_wants_none(s3, state, configured):
    configured(config_kwargs={"request_checksum_calculation": "when_required"})
    sio.save(state, URL)
    sio.save(1, f"{URL}.small")
    assert {request.crc32 for request in s3.requests} == {None} and sio.verify(URL).ok
    s3.fail(is_part(5), damage)  # which is what the tests above would otherwise be worth
    sio.save(state, URL)
    assert not sio.verify(URL).ok


@pytest.mark.parametrize("status", [(501, "NotImplemented"), (400, "InvalidRequest")])
def test_a_store_that_knows_no_checksums(status, s3, state, configured):
    def refuse(environ, start_response, app):
        if any(name.startswith("HTTP_X_AMZ_CHECKSUM_") and name != "HTTP_X_AMZ_CHECKSUM_MODE" for name in environ):
            return error(*status, "A header you provided implies functionality that is not implemented")(
                environ, start_response
            )
        return app(environ, start_response)

    refuse.needs_app = True
    s3.fail(lambda request: True, refuse)
    configured()
    sio.save({"few": 1}, URL)
    assert [kind for kind in s3.kinds() if kind != "get"] == ["put", "put"]
    sio.save(state, URL)
    assert sio.verify(URL).ok
    assert s3.kinds().count("create") == 1  # it is known by now
    configured()
    sio.save(state, URL)
    assert sio.verify(URL).ok and s3.kinds().count("create") == 3


# --- faults that pass, and that do not

PASSING = {
    "refused": error(400, "BadDigest"),
    "the server fails": error(500, "InternalError"),
    "slow down": error(503, "SlowDown"),
    "too many": error(429, "TooManyRequests"),
    "dropped": drop,
    "the answer is lost": lose_answer,
    "late": late(0.3),
    "comes twice": do_twice,
}


@pytest.mark.parametrize("name", PASSING)
def test_a_part_is_repeated_by_itself(name, s3, state, backend):
    s3.fail(is_part(6), PASSING[name], times=1)
    sio.save(state, URL, backend=backend)
    numbers = [request.part for request in parts(s3)]
    num_sent = 1 if name in ("late", "comes twice") else 2
    assert {number: numbers.count(number) for number in numbers} == {
        number: num_sent if number == 6 else 1 for number in range(1, NUM_PARTS + 1)
    }
    assert sio.verify(URL).ok and uploads(s3) == []


@pytest.mark.parametrize("name", [name for name in PASSING if name not in ("late", "comes twice")])
def test_a_part_that_always_fails_ends_everything(name, s3, state):
    gate = Gate(opens_at=12)
    s3.fail(is_part(6), PASSING[name])
    s3.fail(is_kind("part"), gate)  # the others are all under way
    with pytest.raises(OSError) as caught:
        threading.Timer(0.3, gate.open.set).start()
        sio.save(state, URL)
    assert caught.value.filename == URL
    numbers = [request.part for request in parts(s3)]
    assert numbers.count(6) == 3 and max(numbers.count(number) for number in {*numbers} - {6}) == 1
    kinds = s3.kinds()
    assert "complete" not in kinds and kinds.count("abort") == 1
    assert "part" not in kinds[kinds.index("abort") :]  # parts that arrive later would stay
    assert keys(s3) == [] and uploads(s3) == []


def test_what_cannot_pass_is_not_repeated(s3, state):
    s3.fail(is_part(6), error(403, "AccessDenied"))
    with pytest.raises(PermissionError):
        sio.save(state, URL)
    assert [request.part for request in parts(s3)].count(6) == 1
    assert keys(s3) == [] and uploads(s3) == []


@pytest.mark.parametrize("kind", ["complete", "put"])
@pytest.mark.parametrize("times", [1, 100], ids=["once", "always"])
def test_the_answer_to_the_end_is_lost(kind, times, s3, state, backend):
    s3.fail(is_kind(kind), lose_answer, times=times)
    obj = state if kind == "complete" else {"few": filled(5)}
    sio.save(obj, URL, backend=backend)
    assert s3.kinds().count(kind) == min(times + 1, 3)
    assert keys(s3) == [NAME] and uploads(s3) == [] and sio.verify(URL).ok


@pytest.mark.parametrize("fault", [drop, error(500, "InternalError"), error(503, "SlowDown")])
@pytest.mark.parametrize("old", [None, "other", "same"])
@pytest.mark.parametrize("kind", ["complete", "put"])
def test_the_end_is_never_reached(kind, old, fault, s3, state):
    obj = state if kind == "complete" else {"few": filled(5)}
    if old is not None:
        sio.save(obj if old == "same" else {"old": 1}, URL)
    before = content(s3, NAME) if old else None
    s3.requests.clear()
    s3.fail(is_kind(kind), fault)
    if old == "same":
        sio.save(obj, URL)  # those bytes are there
    else:
        with pytest.raises(OSError) as caught:
            sio.save(obj, URL)
        assert caught.value.filename == URL
    assert s3.kinds().count(kind) == 3 and s3.kinds().count("head") == 1
    s3.faults.clear()
    assert uploads(s3) == [] and keys(s3) == ([NAME] if old else [])
    assert old is None or content(s3, NAME) == before


def test_an_abort_that_fails_once_is_repeated(s3, state):
    s3.fail(is_part(2), error(403, "AccessDenied"))
    s3.fail(is_kind("abort"), drop, times=1)
    with pytest.raises(PermissionError) as caught:
        sio.save(state, URL)
    assert "could not be discarded" not in str(caught.value) and uploads(s3) == []


# --- credentials that expire in the middle


def expire(s3, after, renewed=None):
    """When so many parts have come the key is no longer valid, and ``renewed()`` has another one."""
    count = []

    def fault(environ, start_response, app):
        if len(count) < after or f"Credential={KEY}/" not in environ["HTTP_AUTHORIZATION"]:
            count.append(1)
            return app(environ, start_response)
        if renewed is not None:
            renewed()
        return error(400, "ExpiredToken", "The provided token has expired.")(environ, start_response)

    fault.needs_app = True
    s3.fail(lambda request: request.kind in ("part", "abort", "complete"), fault)


def test_credentials_that_expire(s3, state):
    expire(s3, after=4)
    with pytest.raises(
        PermissionError, match=r"token has expired.*could not be discarded.*token has expired"
    ) as caught:
        sio.save(state, URL)
    assert caught.value.filename == URL and keys(s3) == []


def test_credentials_that_are_renewed_where_they_came_from(s3, state, backend, configured, tmp_path, monkeypatch):
    file = tmp_path / "credentials"

    def written(key):
        new = tmp_path / f"credentials.{threading.get_ident()}"
        new.write_text(f"[default]\naws_access_key_id = {key}\naws_secret_access_key = s\naws_session_token = t\n")
        new.replace(file)

    def renewed():
        written("another")
        s3.keys.add("another")

    written(KEY)
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", str(file))
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_PROFILE"):
        monkeypatch.delenv(name, raising=False)
    configured(but=("key", "secret"))
    expire(s3, after=4, renewed=renewed)
    sio.save(state, URL, backend=backend)
    s3.faults.clear()
    assert uploads(s3) == [] and sio.verify(URL).ok


# --- Ctrl-C


@pytest.mark.parametrize("times", [1, 2])
@pytest.mark.parametrize("kind", ["create", "part", "complete", "put"])
def test_interrupted(kind, times, s3, state, backend, ctrl_c):
    """While the save waits for an answer; the second time while it waits for the end of what is under way."""
    gate = Gate()
    s3.fail(is_kind(kind), gate)

    def interrupt():
        assert gate.somebody_waits.wait(60)
        for _ in range(times):
            _thread.interrupt_main()
            time.sleep(0.1)
        gate.open.set()

    threading.Thread(target=interrupt).start()
    with pytest.raises(KeyboardInterrupt):
        sio.save(state if kind != "put" else {"few": filled(5)}, URL, backend=backend)
        time.sleep(60)
    for thread in threading.enumerate():
        if thread.name.startswith("upload "):
            thread.join(60)
    assert uploads(s3) == []
    # What had been asked for when it came can be there: whole.
    assert keys(s3) == ([] if kind in ("create", "part") else [NAME])
    assert keys(s3) == [] or sio.verify(URL).ok


def test_an_error_of_the_caller_in_the_middle(s3, state, backend):
    def fail(done, total):
        if done > 3 * PART_NBYTES:
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        sio.save(state, URL, backend=backend, progress=fail)
    assert keys(s3) == [] and uploads(s3) == []


def test_a_missing_bucket_and_a_missing_name(s3, state):
    with pytest.raises(FileNotFoundError) as caught:
        sio.save(state, "s3://no-such-bucket/model.pt")
    assert caught.value.errno == errno.ENOENT
    with pytest.raises(OSError, match="only a bucket"):
        sio.save(state, "s3://model.pt")


def test_where_no_thread_can_be_started(s3, state, monkeypatch):
    """As at the interpreter's exit, from Python 3.12 on."""
    from statedict_io.remote import team

    class Thread(threading.Thread):
        def start(self):
            raise RuntimeError("can't create new thread at interpreter shutdown")

    monkeypatch.setattr(team, "threading", SimpleNamespace(Thread=Thread, Condition=threading.Condition))
    sio.save(state, URL)
    assert sio.verify(URL).ok
    s3.fail(is_part(6), error(403, "AccessDenied"))
    with pytest.raises(PermissionError):
        sio.save(state, URL)
    assert uploads(s3) == []
