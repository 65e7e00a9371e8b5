"""Saves and loads in little memory; each is run by test_memory_limits.py.

memory_process.py {address space,proofs,group} NBYTES ACTION PATH {native,torch,auto}
NBYTES: of address space to spare; of the state in a control group.
"""

import resource
import sys

import torch

import statedict_io as sio

MIB = 1 << 20


def limit_address_space(spare):
    with open("/proc/self/statm") as statm:
        taken = int(statm.read().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (taken + spare, resource.RLIM_INFINITY))


def lift_the_limit():
    resource.setrlimit(resource.RLIMIT_AS, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))


def _to_object(obj, backend):
    with open("/dev/null", "wb") as sink:
        sio.save(obj, sink, backend=backend)


ACTIONS = {
    "save": lambda obj, path, backend: sio.save(obj, path, backend=backend),
    "save buffered": lambda obj, path, backend: sio.save(obj, path, durable=False, backend=backend),
    "save to an object": lambda obj, _, backend: _to_object(obj, backend),
    "save_async": lambda obj, path, backend: sio.save_async(obj, path, backend=backend).result(),
    "load": lambda _, path, backend: sio.load(path, backend=backend),
    "load verified": lambda _, path, backend: sio.load(path, verify=True, backend=backend),
    "verify": lambda _, path, backend: sio.verify(path),
}


def main(kind, nbytes, action, path, backend):
    nbytes = int(nbytes)
    weight_nbytes = nbytes if kind == "group" else 64 * MIB
    obj = {
        "weight": torch.empty(weight_nbytes, dtype=torch.uint8).random_(),
        "small": [torch.full((100,), float(i)) for i in range(1000)],
    }
    if kind != "group":
        torch.save(obj, path)
        limit_address_space(nbytes)
    ACTIONS[action](obj, path, backend)
    lift_the_limit()
    if kind == "proofs":
        info = sio.backend_info()
        assert info.name == ("native" if info.core else "python"), info
        assert info.proofs["format"].status == "holds", info
        sio.save(obj, path, backend=info.name)
    found = torch.load(path, mmap=True)
    assert all(torch.equal(found["small"][i], obj["small"][i]) for i in range(1000))
    for start in range(0, weight_nbytes, MIB):
        assert torch.equal(found["weight"][start : start + MIB], obj["weight"][start : start + MIB]), start
    print("as expected")


if __name__ == "__main__":
    main(*sys.argv[1:])
