"""Training on one process and on two under `accelerate launch`.

    python -m benchmarks.processes [--steps 20] [--batch-size 8] [--rounds 5]

The CLIP of the embedded checkpoint trains on rendered textures, each process with one thread and as many images a step
whatever their number (weak scaling), in turn.
"""

import os
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median

from benchmarks.alternating import alternate, ratio
from benchmarks.commands import run_python
from benchmarks.report import Report, argument_parser, publish
from moeclip_hf.data.textures import write_texture_benchmark

SCRIPT = Path(__file__).resolve().parent.parent / "examples" / "train.py"


def launch(processes: int, steps: int, batch_size: int, data: Path, output: Path) -> None:
    """One run of training, its start included."""
    launcher = (
        ["--multi_gpu", "--main_process_port", str(20_000 + os.getpid() % 20_000)] if processes > 1 else ["--cpu"]
    )
    options = {
        "dataset": data, "clip": "embedded", "output-dir": output / str(time.monotonic_ns()), "batch-size": batch_size,
        "image-size": 256, "aggregation-sizes": "1,3,5", "max-steps": steps, "save-steps": steps, "tracker": "none",
        "num-workers": 0,
    }  # fmt: skip
    command = ["-m", "accelerate.commands.launch", "--num_processes", processes, *launcher]
    command += ["--num_machines", 1, "--mixed_precision", "no", "--dynamo_backend", "no", SCRIPT]
    command += [word for name, value in options.items() for word in (f"--{name}", value)]
    run_python(*command, "--fresh", "--cpu", environment={"OMP_NUM_THREADS": "1"})


def main() -> None:
    parser = argument_parser(__doc__)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--batch-size", type=int, default=8, help="of a process")
    parser.add_argument("--rounds", type=int, default=5)
    args = parser.parse_args()

    with tempfile.TemporaryDirectory() as folder:
        data = Path(folder) / "textures"
        write_texture_benchmark(data, ["leather", "cork", "gravel"], normal=16, anomalous=32, size=128)

        def side(processes: int, steps: int) -> Callable[[], None]:
            return lambda: launch(processes, steps, args.batch_size, data, Path(folder) / "runs")

        # Start and end of a run cancel out in the difference of a long and a short one.
        few = max(2, args.steps // 10)
        names = {(n, steps): f"{n} x {steps}" for n in (1, 2) for steps in (few, args.steps)}
        seconds = alternate({name: side(*key) for key, name in names.items()}, args.rounds, uncounted=0)
    step = {
        f"{n} processes": [
            (long - short) / (args.steps - few)
            for long, short in zip(seconds[names[n, args.steps]], seconds[names[n, few]], strict=True)
        ]
        for n in (1, 2)
    }
    rows = [["processes", "seconds a step", "images a second", "over one process"]]
    for n in (1, 2):
        of_n = f"{n} processes"
        taken, gain = median(step[of_n]), n / ratio(step, of_n, "1 processes")
        rows.append([str(n), f"{taken:.3f}", f"{n * args.batch_size / taken:.1f}", f"{gain:.2f}"])
    title = f"Training under accelerate launch, embedded CLIP, {args.batch_size} images a process, one thread each"
    publish([Report(title, rows)], args.output)


if __name__ == "__main__":
    main()
