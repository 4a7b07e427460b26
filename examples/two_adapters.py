"""One CLIP in memory serves several adapters; which of them answers is chosen in every call.

    python -m examples.two_adapters --adapter visa=adapters/visa --adapter mvtec=adapters/mvtec \\
        --class-name "metal nut" IMAGE...

The adapters were trained over the same CLIP, as by `examples.train_adapter`. Each has its own experts, heads,
preprocessing and threshold; beside the CLIP's 1.7 GB for ViT-L, an adapter takes some 20 MB.
"""

import argparse
from typing import Any

import torch
from PIL import Image
from rich.console import Console
from rich.table import Table

from moeclip_hf import MoECLIPProcessor
from moeclip_hf.adapters import load_adapter
from moeclip_hf.pretrained import best_device, best_dtype


class AdapterServer:
    """
    Several adapters over one CLIP.

    Args:
        adapters (`dict[str, str]`): folder or Hub id of each adapter by its name.
        base (`str`, *optional*): the CLIP, by default the one that the first adapter names.
    """

    def __init__(self, adapters: dict[str, str], base: str | None = None):
        (first, source), *others = adapters.items()
        device = best_device()
        self.model = load_adapter(source, base=base, adapter_name=first, dtype=best_dtype(device)).to(device)
        for name, source in others:
            self.model.load_adapter(source, adapter_name=name)
        self.processors = {name: MoECLIPProcessor.from_pretrained(source) for name, source in adapters.items()}
        self.anchors: dict[tuple[str, str], torch.Tensor] = {}

    @torch.inference_mode()
    def __call__(self, image: Image.Image, class_name: str, adapter: str) -> dict[str, Any]:
        """Score an image with one of the adapters: `score`, `map`, `is_anomalous` and `regions`."""
        self.model.set_adapter(adapter, inference_mode=True)
        processor = self.processors[adapter]
        # The text adapter is a part of the adapter, and so each has anchors of its own for a class.
        if (adapter, class_name) not in self.anchors:
            prompts = processor(text=class_name, return_tensors="pt").to(self.model.device)
            self.anchors[adapter, class_name] = self.model.get_text_embeds(**prompts)
        inputs = processor(images=image, return_tensors="pt").to(self.model.device)
        outputs = self.model(**inputs, text_embeds=self.anchors[adapter, class_name])
        return processor.post_process_anomaly_detection(outputs, target_sizes=[(image.height, image.width)])[0]


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("images", nargs="+", metavar="IMAGE")
    parser.add_argument("--adapter", action="append", required=True, metavar="NAME=FOLDER_OR_ID")
    parser.add_argument("--base", help="CLIP; by default the one that the first adapter names")
    parser.add_argument("--class-name", default="object", help="what the images show")
    args = parser.parse_args()
    if not all("=" in adapter for adapter in args.adapter):
        parser.error("--adapter needs a name and a folder or Hub id, such as visa=adapters/visa")
    return args


def main() -> None:
    args = parse_args()
    server = AdapterServer(dict(adapter.split("=", 1) for adapter in args.adapter), args.base)
    table = Table("image", *server.processors, title=f"score of each adapter, {args.class_name}")
    for path in args.images:
        image = Image.open(path).convert("RGB")
        results = [server(image, args.class_name, adapter) for adapter in server.processors]
        table.add_row(path, *(f"{r['score']:.3f}{' anomalous' if r['is_anomalous'] else ''}" for r in results))
    Console().print(table)


if __name__ == "__main__":
    main()
