"""A loop of Hugging Face's accelerate through `patch_torch`: killed, then resumed to the same losses.

pip install accelerate
python examples/accelerate_loop.py --die-at-step 23
python examples/accelerate_loop.py
"""

from __future__ import annotations

import os
import shutil
import signal
from pathlib import Path

import torch
from accelerate import Accelerator
from accelerate.utils import DataLoaderConfiguration, set_seed
from command_line import parse, print_weights
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import statedict_io as sio


def main(arguments: list[str] | None = None) -> None:
    options = parse(arguments, __doc__, dir=Path("accelerate_checkpoints"), steps=30, saver=["patched", "plain"])

    if options.saver == "patched":
        sio.patch_torch()
    # The seedable sampler shuffles by seed and epoch, so that a resumed run sees the same order.
    accelerator = Accelerator(cpu=True, dataloader_config=DataLoaderConfiguration(use_seedable_sampler=True))
    set_seed(0)
    points = torch.rand(120, 2)
    labels = ((points[:, 0] - 0.5) * (points[:, 1] - 0.5) > 0).long()
    model: nn.Module = nn.Sequential(nn.Linear(2, 64), nn.GELU(), nn.Dropout(0.1), nn.Linear(64, 2))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, options.steps)
    # With a generator of its own an iterator takes no random numbers from dropout when it begins, in whichever step.
    draw = torch.Generator().manual_seed(0)
    loader = DataLoader(TensorDataset(points, labels), batch_size=16, shuffle=True, generator=draw)
    model, optimizer, loader, schedule = accelerator.prepare(model, optimizer, loader, schedule)

    step = 0
    newest = max(options.dir.glob("step-*[0-9]"), key=lambda path: int(path.name.rpartition("-")[2]), default=None)
    if newest is not None:
        accelerator.load_state(str(newest))
        step = int(newest.name.rpartition("-")[2])
        print(f"resumed from {newest.name}", flush=True)
    while step < options.steps:
        epoch, done = divmod(step, len(loader))
        loader.set_epoch(epoch)
        batches = accelerator.skip_first_batches(loader, done) if done else loader
        for batch_points, batch_labels in batches:
            loss = nn.functional.cross_entropy(model(batch_points), batch_labels)
            optimizer.zero_grad()
            accelerator.backward(loss)
            optimizer.step()
            schedule.step()
            step += 1
            print(f"step {step} loss {loss.item()!r}", flush=True)
            if step % 5 == 0:
                save(accelerator, options.dir / f"step-{step}")
            if step == options.die_at_step:
                os.kill(os.getpid(), signal.SIGKILL)
            if step == options.steps:
                break
    print_weights(accelerator.unwrap_model(model))


def save(accelerator: Accelerator, path: Path) -> None:
    """Each file of the directory is replaced atomically; the rename makes that true of the directory."""
    unfinished = path.with_name(f"{path.name}.unfinished")
    shutil.rmtree(unfinished, ignore_errors=True)
    accelerator.save_state(str(unfinished), safe_serialization=False)  # the weights through torch.save, too
    shutil.rmtree(path, ignore_errors=True)
    unfinished.rename(path)


if __name__ == "__main__":
    main()
