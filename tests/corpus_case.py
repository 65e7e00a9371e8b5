"""The registry of corpus objects, and the random bytes they are made of.

A case is a named factory that takes no argument and returns a fresh, seeded object. No payload is all zeros: a
writer that forgets a payload, or writes the wrong one, must change the file.
"""

import functools
import zlib

import torch


class Corpus(dict):
    """name -> factory; ``@corpus.case`` registers a function under its own name."""

    def case(self, make):
        return self.add(make.__name__, make)

    def add(self, name, make):
        if name in self:
            raise ValueError(f"two corpus cases are called {name!r}")
        self[name] = make
        return make

    def each(self, values, label=str):
        """Registers ``make(value)`` once per value, as ``make[value]``."""

        def register(make):
            for value in values:
                self.add(f"{make.__name__}[{label(value)}]", lambda value=value: make(value))
            return make

        return register


def random_bytes(nbytes, seed=0):
    """A uint8 tensor of ``nbytes`` random bytes, none of them zero."""
    return _random_bytes(nbytes, seed).clone() if nbytes > 1 << 20 else _random_bytes.__wrapped__(nbytes, seed)


@functools.lru_cache(maxsize=8)
def _random_bytes(nbytes, seed):
    generator = torch.Generator().manual_seed(zlib.crc32(f"{seed}/{nbytes}".encode()))
    return torch.randint(1, 256, (nbytes,), dtype=torch.uint8, generator=generator)


def filled(*shape, dtype=torch.float32, seed=0):
    """A contiguous tensor of random bytes; a bool tensor holds True and False."""
    numel = 1
    for length in shape:
        numel *= length
    if dtype == torch.bool:
        return (random_bytes(numel, seed) % 2 == 1).reshape(shape)
    return random_bytes(numel * dtype.itemsize, seed).view(dtype).reshape(shape)


def numbers(*shape, dtype=torch.float32, seed=0):
    """Like `filled`, with ordinary finite numbers: for factories that compute with them."""
    generator = torch.Generator().manual_seed(zlib.crc32(f"{seed}/{shape}".encode()))
    return (torch.rand(shape, generator=generator) * 8 + 0.5).to(dtype)
