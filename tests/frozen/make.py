"""Made the files beside it, once, with torch 2.13: they are not to be made again, that is what they are for.

No old torch was at hand. `legacy.pt` is what torch before 1.6 wrote, which torch still writes when asked. The others
are archives of the records that older releases wrote, laid out as their writer did: stored, the payloads aligned to 64
bytes by an `FB` extra field.

    torch_1_6.pt    data.pkl, data/0..., version 3: nothing else (1.6 to 2.0)
    torch_2_1.pt    also byteorder and .data/serialization_id (2.1 to 2.6)
    big_endian.pt   as 2.1 on a machine with the other byte order
"""

import io
import pathlib
import pickle
import struct
import zipfile

import torch


def checkpoint():
    base = torch.arange(1, 25, dtype=torch.int32).reshape(4, 6)
    return {
        "model": {
            "w": base,
            "t": base.t(),
            "h": torch.arange(1, 8).to(torch.bfloat16),
            "flags": torch.tensor([True, False]),
        },
        "tied": [base, base[1:3, 2:]],
        "empty": torch.empty(0, 2),
        "p": torch.nn.Parameter(torch.tensor([0.5, -2.0])),
        "epoch": 7,
    }


def write(path, records):
    with zipfile.ZipFile(path, "w") as archive:
        for name, content in records:
            info = zipfile.ZipInfo(f"archive/{name}", (1980, 1, 1, 0, 0, 0))
            at = archive.fp.tell() + 30 + len(info.filename) + 4
            info.extra = b"FB" + struct.pack("<H", -at % 64) + b"Z" * (-at % 64)
            archive.writestr(info, content)


def main():
    here = pathlib.Path(__file__).parent
    torch.save(checkpoint(), here / "legacy.pt", _use_new_zipfile_serialization=False)
    file = io.BytesIO()
    torch.save(checkpoint(), file)
    with zipfile.ZipFile(file) as archive:
        new = {name.partition("/")[2]: archive.read(name) for name in archive.namelist()}
    data = [(name, content) for name, content in new.items() if name.startswith("data/")]
    version = [("version", b"3\n")]
    identity = [(".data/serialization_id", new[".data/serialization_id"])]
    write(here / "torch_1_6.pt", [("data.pkl", new["data.pkl"]), *data, *version])
    write(here / "torch_2_1.pt", [("data.pkl", new["data.pkl"]), ("byteorder", b"little"), *data, *version, *identity])
    sizes = {}

    class Unpickler(pickle.Unpickler):
        def find_class(self, module, name):
            return (
                torch.serialization.StorageType(name) if name.endswith("Storage") else super().find_class(module, name)
            )

        def persistent_load(self, saved_id):
            sizes[f"data/{saved_id[2]}"] = saved_id[1].dtype.itemsize
            return torch.storage.TypedStorage(
                wrap_storage=torch.UntypedStorage(saved_id[4] * saved_id[1].dtype.itemsize), dtype=saved_id[1].dtype,
                _internal=True,
            )  # fmt: skip

    Unpickler(io.BytesIO(new["data.pkl"])).load()
    swapped = [(n, b"".join(c[i : i + sizes[n]][::-1] for i in range(0, len(c), sizes[n]))) for n, c in data]
    write(here / "big_endian.pt", [("data.pkl", new["data.pkl"]), ("byteorder", b"big"), *swapped, *version, *identity])


if __name__ == "__main__":
    main()
