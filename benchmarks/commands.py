"""Running commands, which keep silent unless they fail."""

import os
import subprocess
import sys


def run_python(*arguments: object, environment: dict[str, str] | None = None) -> str:
    """
    Start Python with arguments, wait for its end, and return what it wrote to standard output.

    Args:
        arguments: of the interpreter.
        environment (`dict`, *optional*): variables beside those of this process.

    Raises:
        SystemExit: if it fails, with its arguments and what it wrote to standard error.
    """
    command = [sys.executable, *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=os.environ | (environment or {}))
    if done.returncode:
        sys.exit(f"{' '.join(command)}: exit status {done.returncode}\n{done.stderr}")
    return done.stdout
