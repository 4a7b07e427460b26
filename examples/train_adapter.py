"""Train a MoE-LoRA adapter over a frozen CLIP with PEFT and accelerate, and save it alone: some 20 MB for ViT-L.

    accelerate launch -m examples.train_adapter --data mvtec --data-dir DATA --output adapters/mvtec

`--data` is a benchmark, a folder, an index file or a Hub data set, with masks. The adapter's folder gets the processor
too, and `examples.two_adapters` scores images with several such adapters over one CLIP.
"""

import argparse
from pathlib import Path

import torch
from accelerate import Accelerator
from accelerate.utils import set_seed
from peft import get_peft_model
from torch.utils.data import DataLoader

from moeclip_hf import MoECLIPModel, MoECLIPProcessor
from moeclip_hf.data import load_data
from moeclip_hf.training.samples import EpochSampler, TrainingSamples
from moeclip_hf.tuner import MoELoraConfig


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--base", default="openai/clip-vit-large-patch14-336", help="CLIP: Hub id or folder")
    parser.add_argument("--data", required=True, help="benchmark, folder, index file or Hub data set")
    parser.add_argument("--data-dir", help="folder that holds the benchmark")
    parser.add_argument("--output", type=Path, required=True, help="folder of the adapter")
    parser.add_argument("--num-experts", type=int, default=4)
    parser.add_argument("--rank", type=int, default=8)
    parser.add_argument("--epochs", type=int, default=20)
    parser.add_argument("--batch-size", type=int, default=2, help="images a process and step")
    parser.add_argument("--learning-rate", type=float, default=5e-4)
    parser.add_argument("--seed", type=int, default=0)
    return parser.parse_args()


def main() -> None:
    args = parse_args()
    accelerator = Accelerator()
    set_seed(args.seed)

    # The base brings no experts of its own; its heads are trained and saved with the adapter, and Adam needs them in
    # float32, in whatever type the checkpoint is stored.
    processor = MoECLIPProcessor.from_pretrained(args.base)
    base = MoECLIPModel.from_pretrained(args.base, moe_layers=[], dtype=torch.float32)
    config = MoELoraConfig(r=args.rank, num_experts=args.num_experts, initializer_range=0.02)
    model = get_peft_model(base, config)

    samples = TrainingSamples(load_data(args.data, args.data_dir), processor, seed=args.seed)
    sampler = EpochSampler(len(samples), args.seed)
    loader = DataLoader(samples, args.batch_size, sampler=sampler)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.Adam(trained, lr=args.learning_rate, betas=(0.5, 0.999))
    model, optimizer, loader = accelerator.prepare(model, optimizer, loader)

    # The text tower is frozen: what it makes of the sentences is computed once. The text adapter behind it trains.
    prompts = processor(text=samples.prompt_names, return_tensors="pt").to(accelerator.device)
    prompt_groups = prompts.pop("prompt_groups")
    with torch.no_grad():
        prompt_features = accelerator.unwrap_model(model).get_prompt_features(**prompts)

    model.train()
    for epoch in range(args.epochs):
        sampler.epoch = epoch
        total = torch.zeros((), device=accelerator.device)
        for batch in loader:
            outputs = model(
                batch["pixel_values"],
                prompt_features=prompt_features,
                prompt_groups=prompt_groups,
                class_index=batch["class_index"],
                labels=batch["labels"],
                masks=batch["masks"],
            )
            accelerator.backward(outputs.loss)
            optimizer.step()
            optimizer.zero_grad()
            total += outputs.loss.detach()
        loss = accelerator.reduce(total / len(loader), reduction="mean").item()
        accelerator.print(f"epoch {epoch + 1} of {args.epochs}: loss {loss:.4f}")

    accelerator.wait_for_everyone()
    accelerator.unwrap_model(model).save_pretrained(args.output, is_main_process=accelerator.is_main_process)
    if accelerator.is_main_process:
        processor.save_pretrained(args.output)
        size = (args.output / "adapter_model.safetensors").stat().st_size / 1e6
        accelerator.print(f"{args.output}: an adapter of {size:.1f} MB")
    accelerator.end_training()  # leaves the other processes


if __name__ == "__main__":
    main()
