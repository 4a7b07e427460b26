"""What each process of a distributed evaluation does; a module of its own, so that a process imports little."""

import json
from pathlib import Path

import numpy as np
from torch import distributed

from moeclip_hf.metrics import AnomalyMetrics


def reduce_metrics(rank: int, processes: int, folder: Path) -> None:
    """Take up the state `{rank}.npz`, if there is one, reduce over gloo and write the figures to `{rank}.json`."""
    distributed.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=processes)
    metrics = AnomalyMetrics("medical")
    if (folder / f"{rank}.npz").exists():
        with np.load(folder / f"{rank}.npz") as state:
            metrics.load_state_dict(state)
    metrics.all_reduce()
    (folder / f"{rank}.json").write_text(json.dumps(metrics.compute()))
    distributed.destroy_process_group()
