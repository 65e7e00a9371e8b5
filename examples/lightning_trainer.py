"""Lightning's Trainer with `FastCheckpointIO`: killed, then resumed to the same losses.

pip install 'statedict-io[lightning]'
python examples/lightning_trainer.py --die-at-step 22
python examples/lightning_trainer.py
"""

from __future__ import annotations

import os
import signal
import warnings
from pathlib import Path
from typing import Any

import lightning
import torch
from command_line import parse, print_weights
from lightning.pytorch.callbacks import Callback, ModelCheckpoint
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import statedict_io as sio
from statedict_io.integrations.lightning import FastCheckpointIO


class Classifier(lightning.LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(2, 64), nn.GELU(), nn.Dropout(0.1), nn.Linear(64, 2))

    def on_train_epoch_start(self) -> None:
        # Lightning saves no random numbers. Seeded by the epoch, those of a resumed run are the same.
        torch.manual_seed(self.current_epoch)

    def train_dataloader(self) -> DataLoader[Any]:
        points = torch.rand(80, 2, generator=torch.Generator().manual_seed(0))
        labels = ((points[:, 0] - 0.5) * (points[:, 1] - 0.5) > 0).long()
        # Not `shuffle=True`: Lightning may begin to iterate twice when it resumes, and the second order is another one.
        draw = torch.Generator().manual_seed(self.current_epoch)
        order = torch.randperm(len(points), generator=draw).tolist()
        return DataLoader(TensorDataset(points, labels), batch_size=16, sampler=order, generator=draw)

    def training_step(self, batch: Any, _: int) -> torch.Tensor:
        points, labels = batch
        loss = nn.functional.cross_entropy(self.layers(points), labels)
        print(f"step {self.global_step + 1} loss {loss.item()!r}", flush=True)
        return loss

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.parameters(), lr=1e-2)


class DieAtStep(Callback):
    def __init__(self, step: int | None) -> None:
        self.step = step

    def on_train_batch_end(self, trainer: lightning.Trainer, *_: Any) -> None:
        if trainer.global_step == self.step:
            os.kill(os.getpid(), signal.SIGKILL)


def main(arguments: list[str] | None = None) -> None:
    options = parse(
        arguments, __doc__, dir=Path("lightning_checkpoints"), epochs=6, saver=["async", "sync", "patched", "plain"]
    )
    warnings.filterwarnings("ignore", module="lightning")

    if options.saver == "patched":
        sio.patch_torch()
    fast = options.saver in ("async", "sync")
    lightning.seed_everything(0, verbose=False)
    trainer = lightning.Trainer(
        plugins=[FastCheckpointIO(asynchronous=options.saver == "async")] if fast else None,
        callbacks=[ModelCheckpoint(dirpath=options.dir, save_top_k=1), DieAtStep(options.die_at_step)],
        max_epochs=options.epochs,
        reload_dataloaders_every_n_epochs=1,
        accelerator="cpu",
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    model = Classifier()
    newest = max(options.dir.glob("*.ckpt"), key=lambda path: path.stat().st_mtime_ns, default=None)
    if newest is not None:
        print(f"resumed from {newest.name}", flush=True)
    trainer.fit(model, ckpt_path=newest)
    print_weights(model)


if __name__ == "__main__":
    main()
