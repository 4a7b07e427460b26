"""How long commands take from nothing: processes started in turn, files in the system's cache.

    python -m benchmarks.startup [--rounds 7]

`moeclip --help` beside a Python that does nothing, and `moeclip predict` on one image with the embedded checkpoint
beside importing the packages that it cannot do without: as they are, which defers most of transformers, and with
transformers' CLIP, which a MoECLIP is.
"""

import tempfile
from functools import partial
from pathlib import Path
from statistics import median

from PIL import Image

from benchmarks.alternating import alternate, ratio
from benchmarks.commands import run_python
from benchmarks.report import Goal, Report, argument_parser, publish, timing_rows
from moeclip_hf.data.textures import render

NOTHING, HELP = "python -c pass", "moeclip --help"
IMPORTS, CLIP, PREDICT = (
    "import torch, transformers",
    "from transformers import CLIPModel",
    "moeclip predict, one image",
)
PYTHON_HELP = ("-m", "moeclip_hf.cli", "--help")


def main() -> None:
    parser = argument_parser(__doc__)
    parser.add_argument("--rounds", type=int, default=7)
    args = parser.parse_args()

    with tempfile.TemporaryDirectory() as folder:
        image = Path(folder) / "straw.png"
        Image.fromarray(render("straw", "hole")[0]).save(image)
        predict = ("-m", "moeclip_hf.cli", "predict", image, "--output-dir", Path(folder) / "results")
        sides = {
            NOTHING: partial(run_python, "-c", "pass"),
            HELP: partial(run_python, *PYTHON_HELP),
            IMPORTS: partial(run_python, "-c", IMPORTS),
            CLIP: partial(run_python, "-c", CLIP),
            PREDICT: partial(run_python, *predict),
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
