"""Temporaries in a directory, and how old they are: a save removes those of dead writers once they are a minute old."""

import os
import pathlib
import time

MINUTE = 60
HOUR = 60 * MINUTE
DAY = 24 * HOUR


def temporaries(directory):
    return [pathlib.Path(directory, name) for name in os.listdir(directory) if name.endswith("sdio-tmp")]


def age(path, seconds):
    os.utime(path, (time.time() - seconds,) * 2)


def age_temporaries(directory):
    """As if an hour had passed."""
    for path in temporaries(directory):
        age(path, HOUR)
