"""How large parts are, and how many are sent at once."""

import types

import pytest

from statedict_io.remote.part_sizes import DEFAULT_CONNECTIONS, DEFAULT_PART_NBYTES, part_sizes
from statedict_io.remote.s3_multipart import LIMITS

MIB = 1 << 20


def sizes(nbytes, fixed=False, **options):
    return part_sizes(types.SimpleNamespace(storage_options=options, fixed_upload_size=fixed), nbytes, LIMITS)


def parts(found, nbytes):
    made = []
    while nbytes > 0:
        made.append(min(found.nbytes_of(len(made) + 1), nbytes))
        nbytes -= made[-1]
    return made


@pytest.mark.parametrize("nbytes", [1, 9 * MIB, 100 * MIB, 250 * MIB, (1 << 30) + 1, 1 << 37, 5 << 40])
@pytest.mark.parametrize("options", [{}, {"max_concurrency": 1}, {"default_block_size": 8 * MIB}, {"fixed": True}])
def test_a_store_takes_them(nbytes, options):
    found = sizes(nbytes, **options)
    made = parts(found, nbytes)
    assert sum(made) == nbytes and len(made) <= LIMITS.max_num_parts
    assert all(LIMITS.least_nbytes <= part <= LIMITS.most_nbytes for part in made[:-1])
    assert max(made) <= found.part_nbytes and found.buffers_nbytes == found.connections * found.part_nbytes
    assert found.part_nbytes <= max(DEFAULT_PART_NBYTES, -(-nbytes // 9000) + 64 * 1024)
    if "fixed" in options or "default_block_size" in options:
        assert {*made[:-1]} <= {found.part_nbytes}


@pytest.mark.parametrize("nbytes", [301 * MIB, (1 << 30) + 100, 9 << 30])
def test_connections_begin_soon_and_end_together(nbytes):
    found = sizes(nbytes)
    made = parts(found, nbytes)
    n = found.connections
    assert made[0] == LIMITS.least_nbytes and made[:n] == sorted(made[:n])
    assert made[-n:] == sorted(made[-n:], reverse=True) and made[-2] < 2 * LIMITS.least_nbytes
    assert {*made[n:-n]} <= {found.part_nbytes}
    assert found.num_parts - n // 2 <= len(made) <= found.num_parts  # all rounds are full


def test_of_unknown_size():
    found = sizes(None)
    assert found.part_nbytes * LIMITS.max_num_parts >= 600 << 30
    assert found.buffers_nbytes <= DEFAULT_CONNECTIONS * DEFAULT_PART_NBYTES


def test_as_configured():
    found = sizes(1 << 30, max_concurrency=3, default_block_size=50 * MIB)
    assert (found.connections, found.part_nbytes, found.buffers_nbytes) == (3, 50 * MIB, 150 * MIB)
    assert sizes(1 << 30, default_block_size=1).part_nbytes == LIMITS.least_nbytes
