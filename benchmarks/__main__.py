"""Run all benchmarks, one after the other in processes of their own, and write docs/benchmarks.md.

    python -m benchmarks [--only forward startup] [--page docs/benchmarks.md]

What was measured is kept in outputs/benchmarks, a file a benchmark; the page is written from all that is there, so
that one can be repeated alone. A benchmark that fails leaves no figures, old ones neither. Leave the machine alone
meanwhile.
"""

import argparse
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

from benchmarks.report import Goal, describe
from moeclip_hf.evaluation.results import markdown_table

# Name: the module and its options, which bound the time of all together.
SUITE: dict[str, tuple[str, ...]] = {
    "forward": ("forward", "--images", "1", "4"),
    "moe_layer": ("moe_layer",),
    "alternatives": ("alternatives",),
    "training_step": ("training_step", "--memory"),
    "preprocessing": ("preprocessing",),
    "pretraining": ("pretraining",),
    "metrics": ("metrics",),
    "startup": ("startup",),
    "prediction": ("prediction",),
    "evaluation": ("evaluation",),
    "resolution": ("growth", "--only", "resolution"),
    "batch": ("growth", "--only", "batch"),
    "experts_and_rank": ("growth", "--only", "experts", "rank"),
    "images": ("growth", "--only", "metrics", "predictions"),
    "processes": ("processes", "--batch-size", "4"),
    "export": ("export", "--auroc"),
}

HEAD = """# Benchmarks

Written by `python -m benchmarks`. Sides run in turn in one process unless a table says otherwise, and ratios are
medians over at least five rounds of pairs from the same round. Memory, the seconds of metrics, and how cost grows are
of one run each, the plain forms' in processes of their own. A section is headed by the command that it comes from.
Models have ViT-L/14's sizes and random weights, on which speed does not depend, unless a table names another. A goal
is a limit that this project set itself beforehand. "Freed memory" names what glibc does with what torch frees: it is
kept, given back to the system at once, or glibc is left as it is; no setting has the best time and the least memory.
What was done about each figure, and why a goal is missed where one is, stands in [performance.md](performance.md).
"""


def run(name: str, folder: Path) -> bool:
    """Run a benchmark in place of what it measured before; whether it went well."""
    module, *options = SUITE[name]
    output = folder / f"{name}.json"
    output.unlink(missing_ok=True)
    command = [sys.executable, "-m", f"benchmarks.{module}", *options, "--output", str(output)]
    print("$", *command[1:-2], flush=True)
    return subprocess.run(command, check=False).returncode == 0


def compose_page(documents: dict[str, dict[str, Any]]) -> str:
    """The page, from what the benchmarks wrote, by name; it also names those of `SUITE` that wrote nothing."""
    goals = [["figure", "measured", "held"]]
    sections = []
    for document in documents.values():
        versions = ", ".join(f"{name} {version}" for name, version in document["versions"].items())
        sections.append(f"## `{document['command']}`\n\n{document['date'][:10]}, {document['machine']}; {versions}.")
        for report in document["reports"]:
            sections.append(f"**{report['title']}**\n\n{markdown_table(report['rows'])}")
            sections += [f"![{report['title']}]({picture})" for picture in report["pictures"]]
            for values in report["goals"]:
                goal = Goal(**values)
                goals.append([goal.figure, describe(goal), "yes" if goal.is_held else "no"])
    missing = [name for name in SUITE if name not in documents]
    notes = [f"Failed or not run, hence without figures: {', '.join(missing)}."] if missing else []
    return "\n\n".join([HEAD.strip(), markdown_table(goals), *notes, *sections]) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="*", choices=SUITE, default=list(SUITE), metavar="NAME",
                        help=f"of {', '.join(SUITE)}; none of them writes the page anew")  # fmt: skip
    parser.add_argument("--folder", type=Path, default=Path("outputs/benchmarks"), help="what was measured")
    parser.add_argument("--page", type=Path, default=Path("docs/benchmarks.md"))
    args = parser.parse_args()
    failed = [name for name in args.only if not run(name, args.folder)]
    files = {name: args.folder / f"{name}.json" for name in SUITE}
    documents = {name: json.loads(path.read_text()) for name, path in files.items() if path.exists()}
    args.page.write_text(compose_page(documents), encoding="utf-8")
    print(args.page)
    if failed:
        sys.exit(f"failed: {', '.join(failed)}")


if __name__ == "__main__":
    main()
