"""Which checkpoints go, as a function of what is there and of the rules."""

import math
import random

import pytest

import statedict_io as sio
from statedict_io.checkpoints.retention import Kept, Rules, superfluous


def steps(*numbers, **options):
    return [Kept(step, **options) for step in numbers]


@pytest.mark.parametrize(
    ("rules", "there", "going"),
    [
        ({}, steps(1, 2, 3), []),
        ({"keep_last": 2}, steps(1, 2, 3), [1]),
        ({"keep_last": 2}, steps(3, 1, 2), [1]),
        ({"keep_last": 5}, steps(1, 2, 3), []),
        ({"keep_last": 1}, [], []),
        ({"keep_every": 10}, steps(0, 5, 10, 15, 20, 25), [5, 15]),
        ({"keep_last": 2, "keep_every": 10}, steps(0, 5, 10, 15, 20, 25), [5, 15]),
        ({"keep_best": 1, "best": "min"}, [Kept(1, 0.5), Kept(2, 0.1), Kept(3, 0.3)], [1]),
        ({"keep_best": 1, "best": "max"}, [Kept(1, 0.5), Kept(2, 0.1), Kept(3, 0.3)], [2]),
        # Equals: the newer one. Not a number, or none: never the best.
        ({"keep_best": 1, "best": "min"}, [Kept(1, 0.1), Kept(2, 0.1), Kept(3, 0.3)], [1]),
        ({"keep_best": 2, "best": "min"}, [Kept(1, math.nan), Kept(2), Kept(3, math.inf), Kept(4, 1), Kept(5)], [1, 2]),
        ({"keep_best": 1, "best": "max"}, [Kept(1, -math.inf), Kept(2, math.nan), Kept(3)], [2]),
    ],
)  # fmt: skip
def test_rules(rules, there, going):
    assert superfluous(there, Rules(**rules)) == going


def test_damaged_ones_count_for_no_rule_and_go_by_age():
    there = [*steps(1, 2), Kept(3, is_damaged=True), *steps(4, 5), Kept(6, is_damaged=True)]
    assert superfluous(there, Rules(keep_last=2)) == [1, 2, 3]
    assert superfluous(there, Rules(keep_last=3)) == [1]  # 2, 4 and 5 count: 3 is not older than these
    assert superfluous(steps(1, 2, 3, is_damaged=True), Rules(keep_last=1)) == []
    best = [Kept(1, 0.2), Kept(2, 0.1, is_damaged=True), Kept(3, 0.3)]
    assert superfluous(best, Rules(keep_best=1, best="min")) == [2]


def test_the_newest_proven_one_stays():
    there = [Kept(600, is_proven=True), Kept(700, is_proven=True), *steps(1000, 1100)]  # a run that went back
    assert superfluous(there, Rules(keep_last=1)) == [600, 1000]
    assert superfluous(there, Rules(keep_last=2)) == [600]


def test_spared_ones_stay():
    assert superfluous(steps(1, 2, 3, 4), Rules(keep_last=1), spared={2}) == [1, 3]


def test_of_any_directory_something_sound_is_left():
    chance = random.Random(18)
    for _ in range(3000):
        there = [
            Kept(step, chance.choice([None, math.nan, chance.random()]), damaged, not damaged and chance.random() < 0.5)
            for step in chance.sample(range(50), chance.randrange(8))
            for damaged in [chance.random() < 0.3]
        ]
        rules = Rules(
            chance.choice([None, 1, 2, 3]), chance.choice([None, 1, 7]), chance.choice([None, 1, 2]), best="min"
        )
        gone = superfluous(there, rules)
        left = [each for each in there if each.step not in gone]
        assert set(gone) <= {each.step for each in there}
        sound = [each.step for each in there if not each.is_damaged]
        proven = [each.step for each in there if each.is_proven]
        assert sorted(each.step for each in left if not each.is_damaged)[-1:] == sorted(sound)[-1:]
        assert not proven or max(proven) not in gone


@pytest.mark.parametrize(
    "rules", [{"keep_last": 0}, {"keep_every": -1}, {"keep_best": 0, "best": "min"}, {"keep_best": 1}, {"best": "avg"}]
)
def test_rules_that_cannot_be(rules, tmp_path):
    with pytest.raises(ValueError, match=r"keep_|best"):
        sio.CheckpointDirectory(tmp_path, **rules)
