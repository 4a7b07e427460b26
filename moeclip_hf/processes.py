"""The processes that `accelerate launch` started: one joins the others before work, and leaves them at its end."""

from __future__ import annotations

import os

from torch import distributed


def join_processes() -> bool:
    """Join the processes that `accelerate launch` started, if any; whether this is the main or the only one."""
    from accelerate import PartialState
    from accelerate.utils import parse_flag_from_env

    if int(os.environ.get("WORLD_SIZE", 1)) > 1:
        PartialState(cpu=parse_flag_from_env("ACCELERATE_USE_CPU"))
    return process_rank()[0] == 0


def leave_processes() -> None:
    """
    Leave the processes that this one joined, if any: the last thing that a program does with them.

    One that ends without it has threads that still wait for the others when the interpreter goes, and now and then
    aborts although its work is done. One that failed does not come here: its launcher ends the others.
    """
    if distributed.is_available() and distributed.is_initialized():
        distributed.destroy_process_group()


def process_rank() -> tuple[int, int]:
    """Rank of this process, and their number."""
    if distributed.is_available() and distributed.is_initialized():
        return distributed.get_rank(), distributed.get_world_size()
    return 0, 1


__all__ = ["join_processes", "leave_processes", "process_rank"]
