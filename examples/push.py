"""Publish a trained checkpoint twice: whole, and as an adapter of some 20 MB for those who have its CLIP already.

    python examples/push.py moeclip-visa USER/moeclip-visa --base-model openai/clip-vit-large-patch14-336

goes to USER/moeclip-visa and to USER/moeclip-visa-adapter. Log in before, with `hf auth login`. `moeclip push` does
the first alone.
"""

import argparse
import shutil
from pathlib import Path
from tempfile import TemporaryDirectory

import torch

from moeclip_hf import MoECLIPModel, MoECLIPProcessor
from moeclip_hf.adapters import full_to_adapter
from moeclip_hf.hub import push_to_hub


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("repo_id", metavar="USER/NAME")
    parser.add_argument("--base-model", required=True, help="Hub id of the very CLIP that the checkpoint is made of")
    parser.add_argument("--evaluation", type=Path, help="results.json that `moeclip evaluate` wrote of it")
    parser.add_argument("--private", action="store_true")
    args = parser.parse_args()

    commit = push_to_hub(
        args.checkpoint,
        args.repo_id,
        base_model=args.base_model,
        evaluation=args.evaluation,
        private=args.private,
    )
    print(commit.repo_url)

    # The CLIP's weights stay where they are: on the Hub, in the repository that the adapter names.
    full = MoECLIPModel.from_pretrained(args.checkpoint, dtype=torch.float32)
    adapter = full_to_adapter(full, base=args.base_model)
    with TemporaryDirectory() as folder:
        adapter.save_pretrained(folder)
        MoECLIPProcessor.from_pretrained(args.checkpoint).save_pretrained(folder)
        if (args.checkpoint / "recipe.json").exists():  # which its card tells, too
            shutil.copy(args.checkpoint / "recipe.json", folder)
        commit = push_to_hub(folder, f"{args.repo_id}-adapter", private=args.private)
    print(commit.repo_url)


if __name__ == "__main__":
    main()
