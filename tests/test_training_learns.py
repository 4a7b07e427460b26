"""Training through `accelerate launch` on textures finds defects on textures that it never saw."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from benchmarks.experts import score_plain_clip
from moeclip_hf.data import load_folder
from moeclip_hf.data.textures import write_texture_benchmark
from moeclip_hf.data.textures.splits import AUXILIARY_FAMILIES, SEEN_DEFECTS, VALIDATION_FAMILIES
from moeclip_hf.evaluation import evaluate
from moeclip_hf.pretrained import load_pretrained

SCRIPT = Path(__file__).resolve().parent.parent / "examples" / "train.py"
STEPS, IMAGES_A_STEP, IMAGE_SIZE = 150, 16, 256


@pytest.fixture(scope="module")
def textures(tmp_path_factory):
    """Folders of textures to train on and to score; the figures of the plain CLIP on the latter."""
    root = tmp_path_factory.mktemp("textures")
    write_texture_benchmark(root / "seen", AUXILIARY_FAMILIES, SEEN_DEFECTS, normal=9, anomalous=18, seed=0)
    write_texture_benchmark(root / "unseen", VALIDATION_FAMILIES, SEEN_DEFECTS, normal=9, anomalous=9, seed=1)
    model, processor = load_pretrained(device="cpu", dtype=torch.float32)
    processor.image_processor.size = {"height": IMAGE_SIZE, "width": IMAGE_SIZE}
    plain = score_plain_clip(model, processor, load_folder(root / "unseen"))
    return root / "seen", root / "unseen", plain


@pytest.mark.slow
@pytest.mark.parametrize("processes", [1, 2])
def test_training_beats_the_unadapted_clip_on_unseen_families_by_a_wide_margin(textures, tmp_path, processes):
    seen, unseen, plain = textures
    port = str(20_000 + os.getpid() % 20_000)
    launcher = ["--multi_gpu", "--main_process_port", port] if processes > 1 else ["--cpu"]
    options = {
        "dataset": seen, "clip": "embedded", "output-dir": tmp_path / "run", "batch-size": IMAGES_A_STEP // processes,
        "image-size": IMAGE_SIZE, "aggregation-sizes": "1,3,5", "max-steps": STEPS,
        "halve-at": f"{STEPS // 2},{3 * STEPS // 4}", "learning-rate": 2e-3,
        "expert-learning-rate": 2e-3, "tracker": "none", "save-steps": STEPS,
    }  # fmt: skip
    command = [sys.executable, "-m", "accelerate.commands.launch", "--num_processes", str(processes), *launcher]
    command += ["--num_machines", "1", "--mixed_precision", "no", "--dynamo_backend", "no", str(SCRIPT)]
    command += [word for name, value in options.items() for word in (f"--{name}", str(value))] + ["--fresh", "--cpu"]
    threads = {"OMP_NUM_THREADS": "1"} if processes > 1 else {}  # two threads each on two cores wait for each other
    done = subprocess.run(command, capture_output=True, text=True, env=os.environ | threads, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    trained = evaluate(load_pretrained(tmp_path / "run", device="cpu"), load_folder(unseen)).metrics
    print(processes, {name: (round(plain[name], 3), round(trained[name], 3)) for name in plain})
    assert trained["pixel_auroc"] > plain["pixel_auroc"] + 0.1
    assert trained["pixel_ap"] > 3 * plain["pixel_ap"]
