"""Pickles as ``torch.save`` writes them, and what a mutation of one of their opcodes makes of them."""

import collections
import io
import pickletools
import struct
import zipfile

import torch
from corpus_case import filled


def sources():
    base = filled(24)
    yield {f"w{i}": filled(6, seed=i) for i in range(8)}
    yield {"a": base, "tie": base, "view": base[3:9], "rows": base.view(4, 6)[:, 1:3], "n": [1, 2.5, None, True, "x"]}
    yield {"p": [torch.nn.Parameter(filled(3)) for _ in range(3)], "i": [filled(2, dtype=torch.int64)] * 2 + [base]}
    yield collections.OrderedDict(
        (str(i), {"exp": filled(4, seed=i), "step": filled(1).sum(), "e": filled(0)}) for i in range(3)
    )
    yield [
        filled(4, dtype=torch.cfloat),
        filled(4, dtype=torch.cfloat).conj(),
        filled(4, dtype=torch.cfloat),
        base.untyped_storage(),
    ]
    yield {"s": torch.eye(3).to_sparse(), "t": [filled(2), filled(2)], 3: (filled(1), (filled(1),))}


def archive_of(obj):
    file = io.BytesIO()
    torch.save(obj, file)
    with zipfile.ZipFile(file) as archive:
        return {name: archive.read(name) for name in archive.namelist()}


def text(value):
    data = value.encode("utf-8", "surrogatepass")
    return b"X" + struct.pack("<I", len(data)) + data


INTEGERS = [
    b"K\x00", b"K\x01", b"K\x07", b"M\x00\x01", b"J\xff\xff\xff\xff", b"J\xff\xff\xff\x7f", b"\x88", b"\x89", b"N",
    b"\x8a\x00", b"\x8a\x08" + b"\xff" * 7 + b"\x7f", b"\x8a\x09" + b"\x00" * 8 + b"\x01",
    b"\x8a\x08" + b"\x00" * 7 + b"\x20", b"\x8a\x01\x06", b"G" + struct.pack(">d", 3.0), b"\x8a\x04\x00\x00\x00\x40",
]  # fmt: skip
STRINGS = [
    text(value) for value in
    ["storage", "cpu", "cuda:0", "meta", "nonsense", "0", "1", "7", "99", "../0", "", "\u00e9", "\udc80", "a" * 300]
]  # fmt: skip
GLOBALS = [
    b"c%s\n%s\n" % tuple(name.encode().rsplit(b".", 1)) for name in [
        "torch.FloatStorage", "torch.LongStorage", "torch.storage.UntypedStorage", "torch.Tensor", "torch.device",
        "torch._utils._rebuild_tensor_v2", "torch._utils._rebuild_tensor", "torch._utils._rebuild_parameter",
        "collections.OrderedDict", "collections.Counter", "torch.float32", "torch.Size", "os.system", "builtins.set",
        "__builtin__.set", "torch.NoSuchStorage", "torch.cuda.FloatStorage", "torch.storage.TypedStorage",
    ]
]  # fmt: skip


def opcodes(data):
    """The pickle as a list of opcodes with their arguments."""
    starts = [position for _, _, position in pickletools.genops(data)]
    return [data[begin:end] for begin, end in zip(starts, [*starts[1:], len(data)], strict=True)]


def mutated(data, generator):
    ops = opcodes(data)
    for _ in range(generator.choice([1, 1, 1, 2, 3])):
        at = generator.randrange(len(ops))
        kind = generator.randrange(9)
        of_kind = [
            i for i, op in enumerate(ops) if op[:1] in {0: b"KMJ\x8a", 1: b"X", 2: b"c", 3: b"hj"}.get(kind, b"")
        ]
        if kind < 4 and of_kind:
            others = [INTEGERS, STRINGS, GLOBALS, [ops[i] for i in of_kind]]
            ops[generator.choice(of_kind)] = generator.choice(others[kind])
        elif kind == 4:
            del ops[at]
        elif kind == 5:
            ops.insert(at, generator.choice(ops))
        elif kind == 6:  # a run of them elsewhere
            begin = generator.randrange(len(ops))
            ops[at:at] = ops[begin : begin + generator.randrange(1, 40)]
        elif kind == 7:  # a forged persistent id
            ops[at:at] = [
                *generator.choice([[b"K\x00"], [b"J\x00\x00\x00\x00"], [text("storage"), b"K\x00", b"\x86"]]),
                b"Q",
            ]
        else:
            op = bytearray(ops[at])
            op[generator.randrange(len(op))] = generator.randrange(256)
            ops[at] = bytes(op)
        if not ops:
            break
    return b"".join(ops)
