"""Trains a tiny model under a launcher, for tests/test_training_processes.py, and writes what was logged.

Arguments: folder of a CLIP, folder of data, output folder, images a process and step, and what else to set, as JSON.
"""

import json
import os
import signal
import sys
from pathlib import Path
from typing import Any

import torch
from torch.distributed.elastic.multiprocessing.errors import record
from training_runs import tiny_trainer

from moeclip_hf.data import load_folder
from moeclip_hf.processes import leave_processes
from moeclip_hf.training import get_recipe


@record
def main() -> None:
    *folders, batch_size, settings = sys.argv[1:]
    run(*map(Path, folders), int(batch_size), **json.loads(settings))
    leave_processes()


def run(
    clip: Path,
    data: Path,
    output_dir: Path,
    batch_size: int,
    die_at: int | None = None,
    killed: bool = False,
    resumed: str | None = None,
    **settings: Any,
) -> None:
    recipe = get_recipe("paper", batch_size=batch_size, num_epochs=2)
    trainer = tiny_trainer(clip, load_folder(data), output_dir, recipe, **settings)
    if die_at is not None:
        step = trainer.training_step

        def fail(*args, **kwargs):
            last = trainer.args.world_size - 1
            if trainer.args.process_index == last and trainer.state.global_step == die_at:
                if killed:
                    os.kill(os.getpid(), signal.SIGKILL)
                raise RuntimeError("the last process found a broken image")
            return step(*args, **kwargs)

        trainer.training_step = fail
    trainer.train(resume_from_checkpoint=resumed)
    trainer.save_model()
    if trainer.is_world_process_zero():
        history = [entry for entry in trainer.state.log_history if "loss" in entry]
        (output_dir / "history.json").write_text(json.dumps(history))


if __name__ == "__main__":
    torch.set_num_threads(1)
    main()
