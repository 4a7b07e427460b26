"""Score one image with nothing but transformers' Auto classes, and save the heat map over it.

python examples/predict.py part.png --class-name "metal nut" [--model DIR_OR_ID]
"""

import argparse
from pathlib import Path

import torch
from transformers import AutoModel, AutoProcessor

import moeclip_hf  # noqa: F401  (registers MoECLIP with the Auto classes)
from moeclip_hf.modeling.image_processing_moeclip import to_rgb
from moeclip_hf.pretrained import EMBEDDED_CHECKPOINT
from moeclip_hf.visualization import draw_overlay
from moeclip_hf.writing import save_picture


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("image", type=Path)
    parser.add_argument("--class-name", default="object")
    parser.add_argument("--model", default=EMBEDDED_CHECKPOINT)
    args = parser.parse_args()

    model = AutoModel.from_pretrained(args.model, dtype=torch.float32).eval()
    processor = AutoProcessor.from_pretrained(args.model)
    image = to_rgb(args.image)
    with torch.inference_mode():
        outputs = model(**processor(images=image, text=[args.class_name], return_tensors="pt"))
    result = processor.post_process_anomaly_detection(outputs, target_sizes=[(image.height, image.width)])[0]

    overlay = args.image.with_name(f"{args.image.stem}_overlay.png")
    save_picture(draw_overlay(image, result["map"].numpy(), result["regions"], processor.pixel_threshold), overlay)
    verdict = "anomalous" if result["is_anomalous"] else "normal"
    print(f"score {result['score']:.4f}, {verdict}, {len(result['regions'])} regions; see {overlay}")


if __name__ == "__main__":
    main()
