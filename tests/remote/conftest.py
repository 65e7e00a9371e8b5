import os
import signal

import pytest
from conftest import promised

from statedict_io.remote.multipart import PartLimits

BUCKET = "bucket"


@pytest.fixture
def ctrl_c():
    """Ctrl-C raises KeyboardInterrupt. In what a shell has started in the background it does nothing."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.fixture(scope="session")
def s3_session():
    try:
        import boto3
        import s3fs  # noqa: F401

        from remote.memory_store import MemoryStore
        from remote.s3_server import KEY, SECRET, S3Server, moto

        behind = os.environ.get("STATEDICT_IO_S3_SERVER", "memory")
        server = S3Server({"memory": MemoryStore, "moto": moto}[behind]())
    except ImportError as e:
        if promised("STATEDICT_IO_REQUIRE_S3"):
            pytest.fail(f"STATEDICT_IO_REQUIRE_S3=1, but: {e}")
        pytest.skip(f"needs s3fs, boto3 and moto[server]: {e}")
    client = boto3.client(
        "s3", endpoint_url=server.url, aws_access_key_id=KEY, aws_secret_access_key=SECRET, region_name="us-east-1"
    )
    client.create_bucket(Bucket=BUCKET)
    server.client = client
    yield server
    server.stop()


@pytest.fixture
def s3(s3_session, monkeypatch):
    """The server, empty, and s3:// leading to it."""
    import fsspec.config

    from remote.s3_server import KEY, SECRET

    options = {
        "key": KEY,
        "secret": SECRET,
        "endpoint_url": s3_session.url,
        "client_kwargs": {"region_name": "us-east-1"},
        "config_kwargs": {"retries": {"max_attempts": 1}},
    }
    monkeypatch.setitem(fsspec.config.conf, "s3", options)
    s3_session.reset()
    yield s3_session
    s3_session.reset()
    for upload in uploads(s3_session):
        s3_session.client.abort_multipart_upload(Bucket=BUCKET, Key=upload["Key"], UploadId=upload["UploadId"])
    for key in keys(s3_session):
        s3_session.client.delete_object(Bucket=BUCKET, Key=key)


@pytest.fixture
def small_parts(monkeypatch, s3):
    """Parts of 64 KiB: S3 takes none below 5 MiB. Everything that is larger is sent in parts."""
    import moto.s3.models

    from remote import memory_store
    from statedict_io.remote import part_sizes, s3_multipart

    limits = s3_multipart.LIMITS
    least = PartLimits(64 << 10, limits.most_nbytes, limits.max_num_parts)
    monkeypatch.setattr(s3_multipart, "LIMITS", least)
    monkeypatch.setattr(part_sizes, "DEFAULT_PART_NBYTES", 64 << 10)
    monkeypatch.setattr(part_sizes, "_AT_ONCE_NBYTES", 64 << 10)
    monkeypatch.setattr(memory_store, "LEAST_PART_NBYTES", 256)
    monkeypatch.setattr(moto.s3.models, "S3_UPLOAD_PART_MIN_SIZE", 256)


def keys(server):
    return [found["Key"] for found in server.client.list_objects_v2(Bucket=BUCKET).get("Contents", [])]


def uploads(server):
    return server.client.list_multipart_uploads(Bucket=BUCKET).get("Uploads", [])


def content(server, key):
    return server.client.get_object(Bucket=BUCKET, Key=key)["Body"].read()
