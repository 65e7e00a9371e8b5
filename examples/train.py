"""A training loop that can be killed at any moment and goes on as if it had not been.

    python examples/train.py --die-at-step 35   # dies by SIGKILL, as a machine that is taken away
    python examples/train.py                    # resumes; the losses are those of a run that was never killed

What it takes: a checkpoint holds everything that the next step depends on (weights, AdamW's moments, the schedule, the
order of the data and the place in it, the random numbers of dropout), and the newest sound one is found again.
`CheckpointDirectory` does the latter. SIGTERM, which a scheduler sends some time before it kills, ends the loop with a
save, and the process with status 143 (128 and the number of the signal): the training is not over.
"""

from __future__ import annotations

import os
import random
import signal
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from command_line import parse, print_weights
from torch import nn

import statedict_io as sio

NUM_SAMPLES, BATCH_SIZE = 200, 16


class ShuffledBatches:
    """Batches of indices in an order of its own each epoch, for ever; it can be saved in the middle of one."""

    def __init__(self, seed: int) -> None:
        self._generator = torch.Generator().manual_seed(seed)
        self._begin_epoch()

    def _begin_epoch(self) -> None:
        self._generator_state = self._generator.get_state()
        self._order = torch.randperm(NUM_SAMPLES, generator=self._generator)
        self._position = 0

    def __iter__(self) -> Iterator[torch.Tensor]:
        while True:
            if self._position >= NUM_SAMPLES:
                self._begin_epoch()
            start, self._position = self._position, self._position + BATCH_SIZE
            yield self._order[start : self._position]

    def state_dict(self) -> dict[str, Any]:
        return {"generator": self._generator_state, "position": self._position}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._generator.set_state(state["generator"])
        self._begin_epoch()
        self._position = state["position"]


class RandomNumbers:
    """The generators that dropout and augmentation draw from."""

    def state_dict(self) -> dict[str, Any]:
        return {"torch": torch.get_rng_state(), "python": random.getstate()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        torch.set_rng_state(state["torch"])
        random.setstate(state["python"])


def main(arguments: list[str] | None = None) -> None:
    options = parse(arguments, __doc__, checkpoints=Path("checkpoints"), steps=60, save_every=10)

    torch.manual_seed(0)
    random.seed(0)
    points = torch.rand(NUM_SAMPLES, 2)
    labels = ((points[:, 0] - 0.5) * (points[:, 1] - 0.5) > 0).long()
    model = nn.Sequential(nn.Linear(2, 64), nn.GELU(), nn.Dropout(0.1), nn.Linear(64, 2))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, options.steps)
    batches = ShuffledBatches(seed=1)
    parts = {
        "model": model,
        "optimizer": optimizer,
        "schedule": schedule,
        "batches": batches,
        "random_numbers": RandomNumbers(),
    }

    def state() -> dict[str, Any]:
        return {name: part.state_dict() for name, part in parts.items()}

    ckpts = sio.CheckpointDirectory(options.checkpoints, keep_last=2, keep_best=1, best="min")
    ckpts.save_on_signal(signal.SIGTERM)
    step = ckpts.restore(**parts) or 0
    if step:
        print(f"resumed after step {step}", flush=True)

    for indices in batches:
        if step == options.steps:
            break
        jitter = 0.01 * random.random()  # an augmentation that draws from Python's own random numbers
        loss = nn.functional.cross_entropy(model(points[indices] + jitter), labels[indices])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        step += 1
        print(f"step {step} loss {loss.item()!r}", flush=True)
        if ckpts.should_stop:
            ckpts.save(state(), step, metric=loss.item())
            ckpts.close()
            print(f"stopped after step {step}", flush=True)
            sys.exit(128 + signal.SIGTERM)
        if step % options.save_every == 0:
            ckpts.save_async(state(), step, metric=loss.item())  # raises if one before failed
        if step == options.die_at_step:
            os.kill(os.getpid(), signal.SIGKILL)
    ckpts.close()
    print_weights(model)


if __name__ == "__main__":
    main()
