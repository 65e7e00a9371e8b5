"""Hugging Face's Trainer through `patch_torch`: one line, and a run that is killed resumes to the same losses.

pip install transformers accelerate
python examples/transformers_trainer.py --die-at-step 13
python examples/transformers_trainer.py
"""

from __future__ import annotations

import os
import signal
from pathlib import Path
from typing import Any

import torch
from command_line import parse, print_weights
from transformers import GPT2Config, GPT2LMHeadModel, Trainer, TrainerCallback, TrainingArguments

import statedict_io as sio


class Sequences(torch.utils.data.Dataset[dict[str, torch.Tensor]]):
    """Counts modulo the vocabulary, from random starts: a tiny model learns it."""

    def __init__(self, count: int) -> None:
        self.starts = torch.randint(0, 32, (count,), generator=torch.Generator().manual_seed(0))

    def __len__(self) -> int:
        return len(self.starts)

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        tokens = (self.starts[index] + torch.arange(12)) % 32
        return {"input_ids": tokens, "labels": tokens}


class PrintLosses(Trainer):
    def compute_loss(self, *arguments: Any, **options: Any) -> Any:
        loss = super().compute_loss(*arguments, **options)
        value = loss[0] if isinstance(loss, tuple) else loss
        print(f"step {self.state.global_step + 1} loss {value.item()!r}", flush=True)
        return loss


class DieAtStep(TrainerCallback):
    def __init__(self, step: int | None) -> None:
        self.step = step

    def on_step_end(self, _: Any, state: Any, *__: Any, **___: Any) -> None:
        if state.global_step == self.step:
            os.kill(os.getpid(), signal.SIGKILL)


def main(arguments: list[str] | None = None) -> None:
    options = parse(arguments, __doc__, dir=Path("transformers_checkpoints"), steps=20, saver=["patched", "plain"])

    if options.saver == "patched":
        sio.patch_torch()  # optimizer.pt, scheduler.pt, rng_state.pth, training_args.bin
    training = TrainingArguments(
        output_dir=str(options.dir),
        max_steps=options.steps,
        per_device_train_batch_size=8,
        learning_rate=3e-3,
        save_steps=5,
        logging_strategy="no",
        use_cpu=True,
        report_to=[],
        disable_tqdm=True,
        seed=0,
    )
    torch.manual_seed(0)
    model = GPT2LMHeadModel(
        GPT2Config(vocab_size=32, n_positions=12, n_embd=32, n_layer=2, n_head=2, bos_token_id=0, eos_token_id=0)
    )
    trainer = PrintLosses(model, training, train_dataset=Sequences(100), callbacks=[DieAtStep(options.die_at_step)])
    # Each file is whole, but a checkpoint is a directory of them: the Trainer writes trainer_state.json last.
    complete = [state.parent for state in options.dir.glob("checkpoint-*/trainer_state.json")]
    newest = max(complete, key=lambda path: int(path.name.rpartition("-")[2]), default=None)
    if newest is not None:
        print(f"resumed from {newest.name}", flush=True)
    trainer.train(resume_from_checkpoint=str(newest) if newest is not None else None)
    print_weights(model)


if __name__ == "__main__":
    main()
