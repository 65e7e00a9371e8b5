"""The plan of a large job, in one process; memory of a rank."""

import pytest

from . import failing, simulated
from .ranks import all_well, run_ranks


@pytest.mark.parametrize(
    ("num_ranks", "num_shards"), [(64, 20_000), pytest.param(1024, 1_000_000, marks=pytest.mark.long)]
)
def test_a_large_plan_is_laid_out_quickly_and_compactly(tmp_path, num_ranks, num_shards):
    (found,) = all_well(run_ranks(1, simulated_alone, num_ranks, num_shards, str(tmp_path), seconds=250))
    print(found)
    assert found["plan_seconds"] <= 60
    assert found["peak_nbytes"] <= 4 << 30
    assert found["load_max"] <= 1.1 * found["load_min"]
    assert found["message_nbytes"] <= 300 * num_shards / num_ranks + 4096
    assert found["reply_nbytes"] <= 8 * num_shards / num_ranks + 4096


def simulated_alone(rank, world_size, *arguments):
    return simulated.simulate(*arguments)


@pytest.mark.parametrize("replicated", [True, False])
def test_a_rank_needs_little_memory_beside_its_state(tmp_path, backend, replicated):
    """Four slots of 8 MiB (eight threads fill 2 MiB each here), 1 % of the state, and what an allocator rounds up."""
    arguments = (str(tmp_path / "model.pt"), backend, 128 << 20, replicated)
    for grown, written in all_well(run_ranks(2, failing.peak_of_save, *arguments)):
        assert grown <= (32 << 20) + 0.01 * (128 << 20) + (8 << 20)
        assert written == pytest.approx(64 << 20, rel=0.01)
