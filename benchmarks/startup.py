"""How long commands take from nothing: processes started in turn, files in the system's cache.

    python -m benchmarks.startup [--rounds 7]

`moeclip --help` beside a Python that does nothing, and `moeclip predict` on one image with the embedded checkpoint
beside importing the packages that it cannot do without: as they are, which defers most of transformers, and with
transformers' CLIP, which a MoECLIP is.
"""

import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from statistics import median

from PIL import Image

from benchmarks.alternating import alternate, ratio
from benchmarks.report import Goal, Report, argument_parser, publish, timing_rows
from moeclip_hf.data.textures import render

NOTHING, HELP = "python -c pass", "moeclip --help"
IMPORTS, CLIP, PREDICT = (
    "import torch, transformers",
    "from transformers import CLIPModel",
    "moeclip predict, one image",
)
PYTHON_HELP = ("-m", "moeclip_hf.cli", "--help")


def process(*arguments: object) -> Callable[[], None]:
    """Something that starts Python with arguments and waits for its end."""

    def start() -> None:
        subprocess.run([sys.executable, *map(str, arguments)], check=True, capture_output=True)

    return start


def main() -> None:
    parser = argument_parser(__doc__)
    parser.add_argument("--rounds", type=int, default=7)
    args = parser.parse_args()

    with tempfile.TemporaryDirectory() as folder:
        image = Path(folder) / "straw.png"
        Image.fromarray(render("straw", "hole")[0]).save(image)
        predict = ("-m", "moeclip_hf.cli", "predict", image, "--output-dir", Path(folder) / "results")
        sides = {
            NOTHING: process("-c", "pass"),
            HELP: process(*PYTHON_HELP),
            IMPORTS: process("-c", IMPORTS),
            CLIP: process("-c", CLIP),
            PREDICT: process(*predict),
        }
        seconds = alternate(sides, args.rounds)
    help_sides = {name: seconds[name] for name in (NOTHING, HELP)}
    predict_sides = {name: seconds[name] for name in (IMPORTS, CLIP, PREDICT)}
    longer = median(a - b for a, b in zip(seconds[HELP], seconds[NOTHING], strict=True))
    goals = [
        Goal("moeclip --help, longer than Python alone", longer, 0.25, unit=" s"),
        Goal(f"{PREDICT}, over {IMPORTS}", ratio(seconds, PREDICT, IMPORTS), 1.5),
        Goal(f"{PREDICT}, over {CLIP}", ratio(seconds, PREDICT, CLIP), 1.5),
    ]
    publish(
        [
            Report("Start and end of a process, help", timing_rows(help_sides, NOTHING, digits=3), goals[:1]),
            Report("Start and end of a process, prediction", timing_rows(predict_sides, IMPORTS), goals[1:]),
        ],
        args.output,
    )


if __name__ == "__main__":
    main()
