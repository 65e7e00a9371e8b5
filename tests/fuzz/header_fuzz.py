"""Fuzzes the parser of safetensors headers against the safetensors package: both accept a file, with the same tensors,
or both refuse it.

    python tests/fuzz/header_fuzz.py --runs 200000 [--seed N]       the long mode
    python tests/fuzz/header_fuzz.py --only RUN                     shows one run

Names that are there twice apart: the package takes the last, we refuse the file. No run may take more memory than the
file's size + 64 MiB. Runs are numbered; the file of a run depends on its number and the seed alone.
"""

import argparse
import json
import pathlib
import random
import resource
import sys
from collections import Counter

sys.path[:0] = [str(pathlib.Path(__file__).resolve().parents[1])]

import safetensors  # noqa: E402
from weights.headers import HEADERS, OURS_ALONE  # noqa: E402

from statedict_io.errors import CorruptCheckpointError  # noqa: E402
from statedict_io.formats import safetensors_parsed  # noqa: E402

_SPARE_NBYTES = 64 << 20
_NUMBERS = ["0", "1", "2", "3", "4", "8", "24", "255", "65536", "4294967296", str((1 << 63) - 1), str(1 << 63),
            str((1 << 64) - 1), str(1 << 64), "-1", "-0", "01", "1.0", "1e2", "NaN"]  # fmt: skip
_BITS = {"BOOL": 8, "F4": 4, "F6_E2M3": 6, "U8": 8, "I8": 8, "F8_E4M3": 8, "I16": 16, "BF16": 16, "F16": 16, "I32": 32,
         "F32": 32, "C64": 64, "F64": 64, "U64": 64}  # fmt: skip
_DTYPES = [*_BITS, "F99"]
_TOKENS = ["{", "}", "[", "]", ",", ":", '"', "\\", '"w"', '"dtype"', '"shape"', '"data_offsets"', '"__metadata__"',
           "null", "true", '"\\u0041"', '"\\ud83d"', " ", "\n", "\0", "\xff", '"F32"', "[0,0]", "[]", "{}"]  # fmt: skip


def sound(rng):
    """A file as a writer makes it, now and then with one number or name that is not right."""
    entries, data = [], b""
    if rng.random() < 0.3:
        entries.append('"__metadata__":{"format":"pt"}')
    for index in range(rng.choice([0, 1, 1, 2, 3, 5])):
        dtype = rng.choice(_DTYPES[:-1])
        shape = [rng.choice([0, 1, 2, 3, 4, 8]) for _ in range(rng.choice([0, 1, 1, 2, 3]))]
        bits = _BITS[dtype]
        numel = 1
        for length in shape:
            numel *= length
        nbytes = numel * bits // 8
        begin, end = len(data), len(data) + nbytes
        numbers = [str(n) for n in [*shape, begin, end]]
        if rng.random() < 0.1:
            numbers[rng.randrange(len(numbers))] = rng.choice(_NUMBERS)
        if rng.random() < 0.03:
            dtype = rng.choice(_DTYPES)
        fields = [
            f'"dtype":"{dtype}"',
            f'"shape":[{",".join(numbers[:-2])}]',
            f'"data_offsets":[{",".join(numbers[-2:])}]',
        ]
        if rng.random() < 0.1:
            rng.shuffle(fields)
        if rng.random() < 0.05:
            fields.append(f'"x":{rng.choice(["1", "[[1]]", "null", rng.choice(_NUMBERS)])}')
        entries.append(f'"{"w" if rng.random() < 0.02 else f"w{index}"}":{{{",".join(fields)}}}')
        data += bytes([1]) * nbytes
    if rng.random() < 0.2:
        rng.shuffle(entries)
    text = "{" + ",".join(entries) + "}" + " " * rng.randrange(3)
    return text.encode(), data


def made(seed, run):
    rng = random.Random(f"{seed}/{run}")
    if rng.random() < 0.2:
        content = HEADERS[rng.choice([*HEADERS])]()
        if len(content) > 4096:
            content = content[:4096]
        nbytes = min(int.from_bytes(content[:8], "little"), len(content) - 8) if len(content) >= 8 else 0
        text, data = content[8 : 8 + nbytes], content[8 + nbytes :]
    else:
        text, data = sound(rng)
    for _ in range(rng.choice([0, 0, 0, 1, 1, 2, 4])):
        at, nbytes = rng.randrange(len(text) + 1), rng.choice([0, 0, 1, 1, 2, 10])
        pieces = rng.choice(_TOKENS).encode("latin-1"), rng.choice(_NUMBERS).encode(), bytes([rng.randrange(256)]), b""
        text = text[:at] + rng.choice(pieces) + text[at + nbytes :]
    if rng.random() < 0.05:
        data = data[: rng.randrange(len(data) + 1)] + b"x" * rng.choice([0, 1, 8])
    length = (
        len(text) if rng.random() < 0.97 else rng.choice([0, 1, len(text) - 1, len(text) + 1, 1 << 40, (1 << 64) - 1])
    )
    return max(length, 0).to_bytes(8, "little") + text + data


def ours(content):
    try:
        parsed = safetensors_parsed.parse(lambda at, nbytes: content[at : at + nbytes], len(content), "FILE")
    except CorruptCheckpointError as e:
        return None, str(e)
    return {name: (t.dtype, t.shape, content[t.begin : t.end]) for name, t in parsed.tensors.items()}, ""


def theirs(content):
    try:
        found = safetensors.deserialize(content)
    except safetensors.SafetensorError as e:
        return None, str(e)
    return {name: (its["dtype"], tuple(its["shape"]), bytes(its["data"])) for name, its in found}, ""


def has_twice(content):
    """Whether a name, or a key of the metadata, is there twice."""
    twice = []

    def look(pairs):
        if len({name for name, _ in pairs}) < len(pairs):
            twice.append(pairs)
        return dict(pairs)

    json.loads(content[8 : 8 + int.from_bytes(content[:8], "little")], object_pairs_hook=look)
    return bool(twice)


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--runs", type=int, default=1000)
    parser.add_argument("--seed", type=int, default=19)
    parser.add_argument("--only", type=int)
    arguments = parser.parse_args()
    counts = Counter()
    theirs(made(arguments.seed, 0)), ours(made(arguments.seed, 0))
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    for run in range(arguments.runs) if arguments.only is None else [arguments.only]:
        content = made(arguments.seed, run)
        expected, refusal = theirs(content)
        found, problem = ours(content)
        if arguments.only is not None:
            print(content, expected, refusal, found, problem, sep="\n")
        if found != expected and found is None and has_twice(content):
            counts["twice"] += 1
        elif found != expected:
            print(f"run {run} of seed {arguments.seed}: {content[:2000]}")
            print(f"package: {refusal or [*expected]}", f"ours: {problem or [*found]}", sep="\n")
            sys.exit(1)
        else:
            counts["refused" if found is None else "accepted"] += 1
            assert found is not None or problem.startswith("FILE: "), problem
    grown = 1024 * (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
    assert grown <= _SPARE_NBYTES, f"memory grew by {grown} bytes"
    print(json.dumps({**counts, "grown_nbytes": grown, "unlike the package": sorted(OURS_ALONE)}))


if __name__ == "__main__":
    main()
