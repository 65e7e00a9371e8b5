"""The corpus through ``torch.save`` and ``torch.load`` while these names are statedict_io's; run by
test_swapped_names.py, a process of its own for each form of the swap.

swapped_corpus_process.py SWAP BACKEND DIRECTORY [NAME...]
SWAP: a statement that binds the names; `save` and `load` are ours.
"""

import functools
import pathlib
import sys
import warnings

import torch
from corpus import CORPUS
from equality import difference
from oracle import assert_same_bytes, assert_same_error, attempt, two_directories

import statedict_io as sio

LOADS = [{}, {"weights_only": True}, {"weights_only": False}, {"weights_only": False, "mmap": True}]


def main(swap, backend, directory, *names):
    warnings.simplefilter("ignore")
    stock_save, stock_load = torch.save, torch.load
    names_of_torch = {
        "torch": torch,
        "sio": sio,
        "save": functools.partial(sio.save, backend=backend),
        "load": functools.partial(sio.load, backend=backend),
    }
    exec(swap, names_of_torch)
    module = torch if torch.load is not stock_load else torch.serialization
    assert module.load is not stock_load
    assert module.save is not stock_save
    ref, ours = (folder / "model.pt" for folder in two_directories(directory))
    num_saved = num_refused = 0
    for name in names or CORPUS:
        obj = CORPUS[name]()
        _, expected = attempt(stock_save, obj, ref)
        _, error = attempt(module.save, obj, ours)
        try:
            if expected is not None:
                assert_same_error(error, expected, ours.parent, ref.parent)
                num_refused += 1
                continue
            assert error is None, error
            assert_same_bytes(ref, ours)
            for options in LOADS:
                found, error = attempt(module.load, ours, **options)
                value, expected = attempt(stock_load, ref, **options)
                alike = error is None if expected is None else isinstance(error, type(expected))
                assert alike, f"{options}: {error!r} in place of {expected!r}"
                assert expected is not None or difference(value, found) is None, f"{options}: another value"
            num_saved += 1
        except AssertionError as e:
            e.add_note(f"object of the corpus: {name}")
            raise
        finally:
            for path in (ref, ours):
                path.unlink(missing_ok=True)
    print(f"{num_saved} saved, {num_refused} refused")


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], pathlib.Path(sys.argv[3]), *sys.argv[4:])
