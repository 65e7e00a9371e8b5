"""Writes the seed archives of the fuzzer: python tests/fuzz/make_seeds.py tests/fuzz/seeds"""

import io
import pathlib
import sys
import zipfile

import torch


def saved(obj):
    file = io.BytesIO()
    torch.save(obj, file)
    return file.getvalue()


def zipped_again(archive, compression, comment=b"", zip64=False):
    source = zipfile.ZipFile(io.BytesIO(archive))
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w", compression) as target:
        target.writestr(zipfile.ZipInfo("archive/"), b"")
        for record in source.infolist():
            info = zipfile.ZipInfo(record.filename)
            info.compress_type = compression
            with target.open(info, "w", force_zip64=zip64) as stream:
                stream.write(source.read(record))
        target.comment = comment
    return file.getvalue()


def seeds():
    torch.manual_seed(0)
    small = saved([torch.randn(5), torch.zeros(0), torch.arange(40, dtype=torch.uint8)])
    yield "torch_small", small
    yield "torch_many", saved([torch.randn(3) for _ in range(30)])
    yield "torch_large", saved([torch.randn(17000), torch.randn(10), torch.randn(20000)])
    torch.serialization.set_crc32_options(False)
    yield "torch_without_crc32", saved({"weight": torch.randn(8, 8)})
    torch.serialization.set_crc32_options(True)
    yield "python_stored", zipped_again(small, zipfile.ZIP_STORED, comment=b"a comment")
    yield "python_deflated", zipped_again(small, zipfile.ZIP_DEFLATED)
    yield "python_zip64", zipped_again(small, zipfile.ZIP_STORED, zip64=True)


if __name__ == "__main__":
    for name, archive in seeds():
        (pathlib.Path(sys.argv[1]) / f"{name}.zip").write_bytes(archive)
