"""The store in memory answers as moto's server does, to boto3 and to s3fs."""

import base64
import zlib

import pytest
from corpus_case import random_bytes

from remote.memory_server import KEY, REUSED_FROM_NBYTES, SECRET, MemoryServer, _Buffers
from remote.memory_store import MemoryStore

MIB = 1 << 20
PART = 5 * MIB
FIRST, SECOND, LAST = (random_bytes(n, seed=s).numpy().tobytes() for s, n in enumerate((PART, PART, 777)))


def crc32(data):
    return base64.b64encode(zlib.crc32(data).to_bytes(4, "big")).decode()


@pytest.fixture(scope="module")
def server():
    pytest.importorskip("boto3")
    server = MemoryServer(MemoryStore())
    client_of(server.url).create_bucket(Bucket="bucket")
    yield server
    server.stop()


@pytest.fixture(scope="module")
def motos():
    pytest.importorskip("moto")
    from remote.s3_server import S3Server, moto

    server = S3Server(moto())
    client = client_of(server.url)
    client.create_bucket(Bucket="bucket")
    yield client
    server.stop()


def client_of(url, key=KEY):
    import boto3
    from botocore.config import Config

    keys = {"aws_access_key_id": key, "aws_secret_access_key": SECRET, "region_name": "us-east-1"}
    return boto3.client("s3", endpoint_url=url, config=Config(retries={"max_attempts": 1}), **keys)


def emptied(client):
    for upload in client.list_multipart_uploads(Bucket="bucket").get("Uploads", []):
        client.abort_multipart_upload(Bucket="bucket", Key=upload["Key"], UploadId=upload["UploadId"])
    for found in client.list_objects_v2(Bucket="bucket").get("Contents", []):
        client.delete_object(Bucket="bucket", Key=found["Key"])
    return client


#: What a caller looks at. ETags are another matter: moto's are digests.
FIELDS = {
    "AcceptRanges",
    "CommonPrefixes",
    "ContentLength",
    "ContentRange",
    "IsTruncated",
    "Key",
    "KeyCount",
    "Metadata",
    "PartNumber",
    "Prefix",
    "Size",
}


class Script:
    """Calls of one client, and what came of each: what has no equal in the other is looked up by name."""

    def __init__(self, client):
        self.client = client
        self.said = []
        self.names = {}

    def call(self, action, save=None, compare=FIELDS, **arguments):
        arguments = {name: self.resolved(value) for name, value in arguments.items()}
        try:
            answer = getattr(self.client, action)(Bucket="bucket", **arguments)
        except self.client.exceptions.ClientError as error:
            code = error.response["ResponseMetadata"]["HTTPStatusCode"], error.response["Error"]["Code"]
            self.said.append((action, *code))
            return
        if save:
            self.names[save] = answer.get("UploadId") or answer.get("ETag")
        body = answer["Body"].read() if "Body" in answer else None
        status = answer["ResponseMetadata"]["HTTPStatusCode"]
        kept = {name: value for name, value in answer.items() if name in compare}
        for listed in ("Contents", "Parts", "Uploads"):
            if listed in answer:
                kept[listed] = [{n: v for n, v in each.items() if n in compare} for each in answer[listed]]
        self.said.append((action, status, kept, body, "ETag" in answer and answer["ETag"].count("-")))

    def resolved(self, value):
        if isinstance(value, dict):
            return {name: self.resolved(each) for name, each in value.items()}
        if isinstance(value, list):
            return [self.resolved(each) for each in value]
        return self.names.get(value[1:], value) if isinstance(value, str) and value.startswith("$") else value


def parts(*numbers, **more):
    return {"Parts": [{"PartNumber": n, "ETag": f"$part{n}", **more.get(f"of{n}", {})} for n in numbers]}


def objects(script):
    script.call("put_object", Key="a/one", Body=b"0123456789", Metadata={"who": "me"})
    script.call("get_object", Key="a/one")
    script.call("head_object", Key="a/one", save="one")
    for asked in ("bytes=2-5", "bytes=8-100", "bytes=4-", "bytes=-3", "bytes=10-12"):
        script.call("get_object", Key="a/one", Range=asked)
    script.call("get_object", Key="a/one", IfMatch="$one")
    script.call("get_object", Key="a/one", IfMatch='"other"')
    script.call("get_object", Key="a/one", Range="bytes=0-1", IfMatch='"other"')
    script.call("get_object", Key="nothing")
    script.call("head_object", Key="nothing")
    script.call("put_object", Key="a/one", Body=b"x", IfNoneMatch="*")
    script.call("put_object", Key="a/two words", Body=b"", IfNoneMatch="*")
    script.call("put_object", Key="a/one", Body=b"y", IfMatch='"other"')
    script.call("put_object", Key="a/one", Body=b"y", IfMatch="$one")
    script.call("put_object", Key="a/sum", Body=b"sum", ChecksumCRC32=crc32(b"sum"))
    script.call("get_object", Key="a/sum", ChecksumMode="ENABLED")
    script.call("delete_object", Key="a/one")
    script.call("delete_object", Key="a/one")
    script.call("get_object", Key="a/one")


def listings(script):
    for key in ("a/1", "a/2", "b", "c/d/e", "z&<"):
        script.call("put_object", Key=key, Body=key.encode())
    script.call("list_objects_v2")
    script.call("list_objects_v2", Prefix="a/")
    script.call("list_objects_v2", Delimiter="/")
    script.call("list_objects_v2", Prefix="c/", Delimiter="/")
    script.call("list_objects_v2", MaxKeys=2)
    script.call("list_objects_v2", StartAfter="a/2")
    script.call("list_objects_v2", Prefix="nothing")
    script.call("delete_objects", Delete={"Objects": [{"Key": "a/1"}, {"Key": "z&<"}]}, compare=set())
    script.call("list_objects_v2")


def uploads(script):
    script.call("create_multipart_upload", Key="big", save="upload")
    for number, data in ((3, LAST), (1, b"to be replaced"), (2, SECOND), (1, FIRST)):
        script.call("upload_part", Key="big", UploadId="$upload", PartNumber=number, Body=data, save=f"part{number}")
    script.call("list_parts", Key="big", UploadId="$upload")
    script.call("list_parts", Key="big", UploadId="$upload", MaxParts=1)
    script.call("list_multipart_uploads")
    script.call("get_object", Key="big")
    script.call("complete_multipart_upload", Key="big", UploadId="$upload", MultipartUpload=parts(1, 2, 3))
    script.call("list_multipart_uploads")
    script.call("head_object", Key="big")
    script.call("get_object", Key="big", Range=f"bytes={PART - 2}-{2 * PART + 2}")


def refused_uploads(script):
    script.call("abort_multipart_upload", Key="big", UploadId="nonsense")
    script.call("create_multipart_upload", Key="big", save="upload")
    script.call("upload_part", Key="big", UploadId="$upload", PartNumber=10001, Body=b"x")
    script.call("upload_part", Key="big", UploadId="$upload", PartNumber=1, Body=b"small", save="part1")
    script.call("upload_part", Key="big", UploadId="$upload", PartNumber=2, Body=LAST, save="part2")
    script.call("complete_multipart_upload", Key="big", UploadId="$upload", MultipartUpload=parts(1, 2))
    script.call("abort_multipart_upload", Key="big", UploadId="$upload")
    script.call("list_multipart_uploads")


def conditions(script):
    for key in ("old", "new"):
        if key == "old":
            script.call("put_object", Key=key, Body=b"old")
        script.call("create_multipart_upload", Key=key, save="upload")
        script.call("upload_part", Key=key, UploadId="$upload", PartNumber=1, Body=LAST, save="part1")
        script.call("complete_multipart_upload", Key=key, UploadId="$upload", MultipartUpload=parts(1), IfNoneMatch="*")
        script.call("get_object", Key=key)


@pytest.fixture
def script(server):
    return Script(emptied(client_of(server.url)))


@pytest.mark.parametrize("calls", [objects, listings, uploads, refused_uploads, conditions])
def test_it_answers_as_moto_does(script, motos, calls):
    of_moto = Script(emptied(motos))
    for each in (script, of_moto):
        calls(each)
    assert script.said == of_moto.said
    assert any(said[1] == 200 for said in script.said)


def test_it_refuses_what_s3_refuses_and_moto_takes(script):
    script.call("put_object", Key="sum", Body=b"mus", ChecksumCRC32=crc32(b"sum"))
    script.call("upload_part", Key="big", UploadId="nonsense", PartNumber=1, Body=b"x")
    script.call("complete_multipart_upload", Key="big", UploadId="nonsense", MultipartUpload=parts(1))
    script.call("create_multipart_upload", Key="big", save="upload")
    for number, data in enumerate((FIRST, LAST), 1):
        script.call("upload_part", Key="big", UploadId="$upload", PartNumber=number, Body=data, save=f"part{number}")
    how = {"Key": "big", "UploadId": "$upload"}
    script.call("complete_multipart_upload", **how, MultipartUpload=parts(2, 1))
    script.call("complete_multipart_upload", **how, MultipartUpload=parts(1, 2, 3))
    other = {"Parts": [{"PartNumber": 1, "ETag": "$part2"}]}
    script.call("complete_multipart_upload", **how, MultipartUpload=other)
    script.call("complete_multipart_upload", **how, MultipartUpload={"Parts": []})
    script.call("get_object", Key="big")
    assert [said[1:3] for said in script.said if said[1] != 200] == [
        (400, "BadDigest"),
        (404, "NoSuchUpload"),
        (404, "NoSuchUpload"),
        (400, "InvalidPartOrder"),
        (400, "InvalidPart"),
        (400, "InvalidPart"),
        (400, "MalformedXML"),
        (404, "NoSuchKey"),
    ]


@pytest.mark.parametrize("right", [True, False], ids=["right", "wrong"])
def test_a_checksum_of_the_whole(script, right):
    script.call(
        "create_multipart_upload", Key="k", ChecksumAlgorithm="CRC32", ChecksumType="FULL_OBJECT", save="upload"
    )
    for number, data in enumerate((FIRST, LAST), 1):
        how = {"UploadId": "$upload", "PartNumber": number, "ChecksumCRC32": crc32(data)}
        script.call("upload_part", Key="k", Body=data, save=f"part{number}", **how)
    whole = crc32(FIRST + LAST if right else LAST + FIRST)
    how = {"UploadId": "$upload", "ChecksumCRC32": whole, "ChecksumType": "FULL_OBJECT"}
    script.call("complete_multipart_upload", Key="k", MultipartUpload=parts(1, 2), **how)
    fields = {"ChecksumCRC32", "ChecksumType"}
    script.call("head_object", Key="k", ChecksumMode="ENABLED", compare=fields)
    completed, described = script.said[-2:]
    if right:
        assert described[2] == {"ChecksumCRC32": whole, "ChecksumType": "FULL_OBJECT"}
    else:
        assert completed[1:] == (400, "BadDigest") and described[1] == 404


def test_a_checksum_of_checksums_and_of_a_part(script):
    script.call("create_multipart_upload", Key="k", ChecksumAlgorithm="CRC32", save="upload")
    script.call("upload_part", Key="k", UploadId="$upload", PartNumber=1, Body=LAST, ChecksumCRC32=crc32(FIRST))
    assert script.said[-1][1:] == (400, "BadDigest")
    script.call("upload_part", Key="k", UploadId="$upload", PartNumber=1, Body=LAST, save="part1")
    one = parts(1, of1={"ChecksumCRC32": crc32(FIRST)})
    script.call("complete_multipart_upload", Key="k", UploadId="$upload", MultipartUpload=one)
    assert script.said[-1][1:] == (400, "InvalidPart")
    script.call("complete_multipart_upload", Key="k", UploadId="$upload", MultipartUpload=parts(1))
    script.call("head_object", Key="k", ChecksumMode="ENABLED", compare={"ChecksumCRC32", "ChecksumType"})
    of_parts = crc32(base64.b64decode(crc32(LAST)))
    assert script.said[-1][2] == {"ChecksumCRC32": f"{of_parts}-1", "ChecksumType": "COMPOSITE"}


def test_a_wrong_key_is_refused(server):
    from botocore.exceptions import ClientError

    with pytest.raises(ClientError, match="InvalidAccessKeyId"):
        client_of(server.url, "another").list_buckets()


def test_s3fs_is_served(script, server, tmp_path):
    s3fs = pytest.importorskip("s3fs")
    region = {"region_name": "us-east-1"}
    fs = s3fs.S3FileSystem(
        key=KEY, secret=SECRET, endpoint_url=server.url, client_kwargs=region, skip_instance_cache=True
    )
    data = FIRST + SECOND + LAST
    (tmp_path / "file").write_bytes(data)
    fs.put_file(tmp_path / "file", "bucket/folder/copy", chunksize=PART, max_concurrency=2)
    with fs.open("bucket/folder/written", "wb", block_size=PART) as file:
        file.write(data)
    assert fs.cat("bucket/folder/copy") == fs.cat("bucket/folder/written") == data
    assert fs.cat_file("bucket/folder/copy", start=PART - 1, end=PART + 1) == data[PART - 1 : PART + 1]
    assert sorted(fs.ls("bucket/folder")) == ["bucket/folder/copy", "bucket/folder/written"]
    assert fs.exists("bucket/folder/copy") and not fs.exists("bucket/nothing")
    fs.rm("bucket/folder", recursive=True)
    assert fs.find("bucket") == [] and server.store.uploads == 0


def test_large_buffers_are_used_again():
    buffers = _Buffers()
    first, second = (buffers.take(REUSED_FROM_NBYTES) for _ in range(2))
    first[0], second[0] = 1, 2
    piece = first[:1]
    del first, second
    again = buffers.take(REUSED_FROM_NBYTES)
    assert again[0] == 2 and piece[0] == 1
    assert buffers.take(REUSED_FROM_NBYTES)[0] == 0
