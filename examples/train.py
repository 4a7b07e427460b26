"""Train MoECLIP over a frozen CLIP, on one process or many; the same as `moeclip train`.

    accelerate launch examples/train.py --dataset visa --data-dir DATA --output-dir outputs/visa

`--help` lists every option; docs/training.md tells what they do, and examples/accelerate holds configurations for
several GPUs and nodes.
"""

import sys

import typer
from torch.distributed.elastic.multiprocessing.errors import record

from moeclip_hf.cli.train import train
from moeclip_hf.errors import MoECLIPError


@record  # so that the launcher tells what the first process to fail died of
def main() -> None:
    try:
        typer.run(train)
    except MoECLIPError as error:
        sys.exit(f"train.py: {error}")


if __name__ == "__main__":
    main()
