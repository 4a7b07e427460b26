"""Evaluate a checkpoint on a benchmark, on one process or several.

    python -m examples.evaluate --model DIR_OR_ID --dataset mvtec --data-dir /data
    accelerate launch --num_processes 4 -m examples.evaluate --model DIR_OR_ID --dataset mvtec --data-dir /data

`moeclip evaluate` does more: several data sets, pictures, going on after an interruption.
"""

import argparse
from pathlib import Path

from moeclip_hf.data import load_data
from moeclip_hf.evaluation import evaluate, write_reports
from moeclip_hf.evaluation.protocol import provenance
from moeclip_hf.evaluation.results import dataset_table
from moeclip_hf.pretrained import load_pretrained
from moeclip_hf.processes import join_processes, leave_processes


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="checkpoint folder or Hub id; the embedded demonstration by default")
    parser.add_argument("--dataset", required=True, help="benchmark, index file, folder or Hub id")
    parser.add_argument("--data-dir", type=Path, help="folder that holds the benchmark")
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--output-dir", type=Path, default=Path("outputs/evaluation"))
    args = parser.parse_args()

    is_main = join_processes()
    pretrained = load_pretrained(args.model)
    rows = load_data(args.dataset, args.data_dir)
    result = evaluate(pretrained, rows, batch_size=args.batch_size)
    if is_main:
        write_reports([result], provenance(pretrained), args.output_dir)
        for cells in dataset_table(result):
            print(" ".join(f"{cell:>13}" for cell in cells))
        print(f"Written to {args.output_dir}")
    leave_processes()


if __name__ == "__main__":
    main()
