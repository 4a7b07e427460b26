"""Runs `moeclip` commands in forks of one process, which has imported all that is slow to import, so that tests can
kill them by the dozen.

Reads a line of JSON a command from standard input, with these fields, and answers with the process's id, and when it
has ended with its status, all that it printed and its seconds of processor time:

    arguments   of the command
    folder      where it writes
    die_at      ends itself, as by SIGKILL, before its n-th operation on files of that folder
    file_limit  bytes that a file may have at most, from where on writing fails as on a full disk
"""

import json
import os
import resource
import signal
import sys
import traceback
from typing import Any

import torch
from training_runs import tiny_trainer

from moeclip_hf import cli
from moeclip_hf.data import load_data
from moeclip_hf.evaluation import evaluate
from moeclip_hf.evaluation.pictures import write_pictures
from moeclip_hf.pretrained import load_pretrained

IMPORTED = (tiny_trainer, load_data, evaluate, write_pictures, load_pretrained)
OPERATIONS = {"open", "os.mkdir", "os.remove", "os.rename", "os.rmdir", "os.listdir", "os.scandir"}


def main() -> None:
    torch.set_num_threads(1)
    for line in sys.stdin:
        command = json.loads(line)
        reader, writer = os.pipe()
        child = os.fork()
        if child == 0:
            os.close(reader)
            run(writer, **command)
        os.close(writer)
        print(child, flush=True)
        with open(reader, errors="replace") as file:
            output = file.read()
        _, status, used = os.wait4(child, 0)
        ended = {"status": os.waitstatus_to_exitcode(status), "output": output}
        print(json.dumps(ended | {"seconds": used.ru_utime + used.ru_stime}), flush=True)


def run(writer: int, arguments: list[str], folder: str, die_at: int | None, file_limit: int | None) -> None:
    """Become the command, and never return."""
    for stream in (1, 2):
        os.dup2(writer, stream)
    operations = 0

    def count(event: str, details: tuple[Any, ...]) -> None:
        nonlocal operations
        if event in OPERATIONS and details and folder in str(details[0]):
            operations += 1
            if operations == die_at:
                os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(count)
    if file_limit is not None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (file_limit, file_limit))
    sys.argv = ["moeclip", *arguments]
    status = 0
    try:
        cli.main()
    except SystemExit as end:
        status = end.code if isinstance(end.code, int) else int(end.code is not None)
    except BaseException:
        traceback.print_exc()
        status = 70
    print(f"operations: {operations}")
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)


if __name__ == "__main__":
    main()
