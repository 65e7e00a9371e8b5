"""Fuzzes what reads ``data.pkl`` and safetensors headers: random programs of a pickle machine, and mutated pickles.

    python tests/fuzz/pickle_fuzz.py --runs 200000 [--seed N]       the long mode
    python tests/fuzz/pickle_fuzz.py --only RUN                     repeats one run, and says what each call did

No call may crash, take more than 5 s of CPU time, or more memory than the file's size + 64 MiB beyond what torch.load
takes. Runs are numbered; the file of a run depends on its number alone.
"""

import argparse
import contextlib
import json
import os
import pathlib
import random
import shutil
import signal
import sys
import tempfile
from collections import Counter

sys.path[:0] = [str(pathlib.Path(__file__).resolve().parents[1])]

import bounded_calls  # noqa: E402
from bounded_calls import (  # noqa: E402
    ACTIONS,
    CPU_SECONDS,
    SPARE_NBYTES,
    STOCK,
    in_child,
    limit_address_space,
    measured,
    warm_up,
)
from hostile_pickles import (  # noqa: E402
    archive,
    as_key,
    doubled,
    doubled_containers,
    get,
    nested,
    put,
    safetensors,
    tensor,
)
from pickle_mutations import GLOBALS, INTEGERS, STRINGS, archive_of, mutated, sources, text  # noqa: E402

BACKENDS = ("native", "torch")
_RUNS_OF_A_CHILD = 250
_NUMBERS = [0, 1, 2, 3, 4, 7, 64, 255, 1 << 16, 1 << 24, 1 << 31, 1 << 40, (1 << 62) + 3, (1 << 63) - 1, -1]


def outline(path, backend, directory):
    """What error messages make of data.pkl, whatever torch's unpickler thinks of it."""
    del backend, directory
    import zipfile

    from statedict_io.names.tensors_of_records import tensors_by_record

    with zipfile.ZipFile(path) as records:
        data = records.read("model/data.pkl")
    tensors_by_record(data, max(os.path.getsize(path), len(data)))


#: always done, and by turns
_CHEAP = [outline, bounded_calls.load, bounded_calls.verify, bounded_calls.open_checkpoint]
_BY_TURNS = [action for action in ACTIONS[".pt"] if action not in _CHEAP]


def actions_of(run, suffix):
    return [*_CHEAP, _BY_TURNS[run // 2 % len(_BY_TURNS)]] if suffix == ".pt" else ACTIONS[suffix]


class Program:
    """A random one for a pickle machine, that leaves one value on the stack for every value that it makes."""

    def __init__(self, generator):
        self._random = generator
        self._left = generator.choice([5, 20, 100])  # values
        self._memo = 0

    def value(self):
        self._left -= 1
        if self._left < 0:
            return self._small()
        make = self._random.choice(
            [
                self._small, self._small, self._tuple, self._list, self._dict, self._call, self._tensor, self._repeated,
                self._grown, self._known, self._state, self._reference,
            ]
        )  # fmt: skip
        made = make()
        if self._random.random() < 0.3:
            made += put(self._memo)
            self._memo += 1
        return made

    def _small(self):
        choose = self._random.choice
        return choose([choose(INTEGERS), choose(STRINGS), choose(GLOBALS), b"N", b")", b"]", b"}", b"\x8f"])

    def _several(self):
        return b"".join(self.value() for _ in range(self._random.randrange(5)))

    def _tuple(self):
        count = self._random.randrange(5)
        if 0 < count < 4 and self._random.random() < 0.7:
            return b"".join(self.value() for _ in range(count)) + bytes([0x84 + count])
        return b"(" + self._several() + b"t"

    def _list(self):
        if self._random.random() < 0.5:
            return b"]" + self.value() + b"a"
        return b"](" + self._several() + b"e"

    def _dict(self):
        if self._random.random() < 0.5:
            return b"}" + self.value() + self.value() + b"s"
        items = b"".join(self.value() + self.value() for _ in range(self._random.randrange(4)))
        return b"}(" + items + b"u"

    def _call(self):
        function = self._random.choice(GLOBALS) if self._random.random() < 0.9 else self.value()
        return function + self._tuple() + self._random.choice([b"R", b"R", b"\x81"])

    def _tensor(self):
        choose = self._random.choice
        shape = [choose(_NUMBERS) for _ in range(self._random.randrange(4))]
        strides = [choose([0, 0, 1, choose(_NUMBERS)]) for _ in shape]
        return tensor(choose([4, 4, 4, choose(_NUMBERS)]), shape, strides, choose(["0", "0", "1", "x" * 300]))

    def _repeated(self):
        """One value many times."""
        count = self._random.choice([2, 2, 100, 3000])
        self._memo += 1
        index = self._memo - 1
        return b"](" + self.value() + put(index) + get(index) * count + b"e"

    def _grown(self):
        """Deep, or shared until it is large."""
        first = self.value()
        levels = self._random.choice([3, 20, 20, 64, 64, 900, 1100, 3000, self._random.choice([9000, 150_000])])
        pairs = min(levels, 64)
        self._memo += pairs + 2
        shape = self._random.randrange(7)
        if shape == 0:
            return doubled(pairs, first=first)
        if shape == 1:
            return doubled_containers(pairs, of=first)
        if shape == 2:
            return nested(levels, first)
        if shape == 3:
            return b"]" * levels + first + b"a" * levels
        if shape == 4:
            return as_key(nested(levels, first))
        if shape == 5:
            return (b"}" + text("k")) * levels + first + b"s" * levels
        return text("x" * levels) + put(self._memo)

    def _known(self):
        return get(self._random.randrange(self._memo)) if self._memo else self._small()

    def _state(self):
        return self.value() + self.value() + b"b"

    def _reference(self):
        kind = b"(" + text("storage") + self._random.choice(GLOBALS) + self._random.choice(STRINGS) + text("cpu")
        return self._random.choice([kind + self._random.choice(INTEGERS) + b"tQ", self.value() + b"Q"])


def _header(generator):
    """Of a safetensors file, one to three pieces of which were exchanged."""
    entry = b'"dtype":"F32","shape":[2],"data_offsets":[%d,%d]'
    header = b"{" + b",".join(b'"w%d":{%s}' % (i, entry % (8 * i, 8 * i + 8)) for i in range(3)) + b"}"
    pieces = [
        b"{",
        b"}",
        b"[",
        b"]",
        b'"',
        b",",
        b":",
        b"\\",
        b"2",
        b" ",
        b'"__metadata__":{"a":"b"},',
        b"-1",
        b"9" * 30,
    ]
    for _ in range(generator.choice([0, 1, 1, 2, 3])):
        begin = generator.randrange(len(header))
        piece = generator.choice(pieces) * generator.choice([0, 1, 1, 3, 1000, 30_000])
        header = header[:begin] + piece + header[begin + generator.randrange(3) :]
    return header


_sources = []


def file_of(run):
    """(suffix, bytes) of a run."""
    generator = random.Random(run)
    kind = generator.random()
    if kind < 0.1:
        return ".safetensors", safetensors(_header(generator), bytes(24))
    if kind < 0.6:
        data = b"\x80\x02" + Program(generator).value() + b"."
        if generator.random() < 0.2:
            with contextlib.suppress(Exception):  # some cannot be told apart into opcodes
                data = mutated(data, generator)
    else:
        if not _sources:
            _sources.extend(archive_of(source)["archive/data.pkl"] for source in sources())
        data = mutated(generator.choice(_sources), generator)
    return ".pt", archive(data, compressed=generator.random() < 0.1, damaged=generator.random() < 0.7)


def check(runs, directory, backend):
    """What is wrong, a line each, and how often a call ended how."""
    problems, endings = [], Counter()
    runs = [*runs]
    while runs:
        lines, ended_by = in_child(
            lambda write, batch=tuple(runs[:_RUNS_OF_A_CHILD]): _some(write, batch, directory, backend)
        )
        done, suspects = set(), set()
        run = action = None
        for line in lines:
            run, action, *rest = json.loads(line)
            if rest:
                endings[f"{action}: {rest[0]}"] += 1
            if rest[1:]:
                suspects.add((run, action))
            done.add(run)
        if ended_by:
            suspects.add((run, action))
        for run, action in sorted(suspects):
            problems += _again(run, action, directory, backend)
        runs = [run for run in runs if run not in done]
    return problems, endings


def _some(write, runs, directory, backend):
    warm_up(backend, directory)
    limit_address_space()
    for run in runs:
        suffix, data = file_of(run)
        path = os.path.join(directory, f"model{suffix}")
        with open(path, "wb") as file:
            file.write(data)
        for action in actions_of(run, suffix):
            write(json.dumps([run, action.__name__]))
            outcome = measured(action, path, backend, directory)
            ending = outcome.result.split()[0]
            write(json.dumps([run, action.__name__, ending, *_suspicions(outcome, len(data) + SPARE_NBYTES)]))


def _suspicions(outcome, allowed_nbytes):
    found = []
    if outcome.result.startswith("killed by"):
        found.append("was killed")
    if outcome.grown_nbytes > allowed_nbytes:
        found.append(f"took {outcome.grown_nbytes} bytes, {allowed_nbytes} are allowed")
    if outcome.cpu_s > CPU_SECONDS:
        found.append(f"took {outcome.cpu_s:.1f} s")
    if "MemoryError" in outcome.result or "not enough memory" in outcome.text:
        found.append("wanted more memory than there is")
    return found


def _again(run, action, directory, backend):
    """One call in a process of its own, beside torch.load: what is wrong with it."""
    suffix, data = file_of(run)
    path = os.path.join(directory, f"model{suffix}")
    pathlib.Path(path).write_bytes(data)
    known = {each.__name__: each for each in [outline, *ACTIONS[suffix]]}
    outcome = alone(known[action], path, backend, directory)
    allowed = len(data) + SPARE_NBYTES
    if suffix == ".pt" and outcome.grown_nbytes > allowed:
        allowed += alone(bounded_calls.stock_load, path, STOCK, directory).grown_nbytes
    wrong = ", ".join(_suspicions(outcome, allowed))
    if "wanted more memory" in wrong:
        stock = alone(bounded_calls.stock_load, path, STOCK, directory)
        if "memory" in stock.text or "MemoryError" in stock.result:
            wrong = ""
    return [f"run {run}, {action}, {backend}, a file of {len(data)} bytes: {wrong}: {outcome}"] if wrong else []


def alone(action, path, backend, directory):
    def work(write):
        warm_up(backend, directory)
        limit_address_space()
        write(json.dumps(measured(action, path, backend, directory)))

    lines, ended_by = in_child(work)
    if ended_by:
        return bounded_calls.Outcome(action.__name__, f"killed by {signal.Signals(ended_by).name}", "", 0, 0, 0.0)
    return bounded_calls.Outcome(*json.loads(lines[0]))


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--runs", type=int, default=2000)
    parser.add_argument("--seed", type=int, default=0, help="number of the first run")
    parser.add_argument("--only", type=int)
    parser.add_argument("--backends", nargs="+", default=BACKENDS)
    options = parser.parse_args()
    bounded_calls.prepare()
    directory = tempfile.mkdtemp()
    num_problems = 0
    try:
        if options.only is not None:
            suffix, data = file_of(options.only)
            path = os.path.join(directory, f"model{suffix}")
            pathlib.Path(path).write_bytes(data)
            for backend in options.backends:
                for action in [outline, *ACTIONS[suffix]] if suffix == ".pt" else ACTIONS[suffix]:
                    print(backend, alone(action, path, backend, directory))
            return 0
        total = Counter()
        for begin in range(options.seed, options.seed + options.runs, _RUNS_OF_A_CHILD):
            runs = range(begin, min(begin + _RUNS_OF_A_CHILD, options.seed + options.runs))
            backend = options.backends[begin // _RUNS_OF_A_CHILD % len(options.backends)]
            problems, endings = check(runs, directory, backend)
            total += endings
            num_problems += len(problems)
            for problem in problems:
                print(problem, flush=True)
    finally:
        shutil.rmtree(directory)
    for ending, count in sorted(total.items()):
        print(f"{count:8} {ending}")
    print(json.dumps({"runs": options.runs, "calls": total.total(), "problems": num_problems}))
    return 1 if num_problems else 0


if __name__ == "__main__":
    sys.exit(main())
