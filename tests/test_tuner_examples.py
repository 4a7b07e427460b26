"""The examples of the tuner: two adapters are trained, and one CLIP then serves both."""

import sys

import numpy as np
import pytest
from PIL import Image
from safetensors.torch import load_file

from examples import train_adapter, two_adapters
from moeclip_hf.adapters import load_adapter
from moeclip_hf.pretrained import EMBEDDED_CHECKPOINT
from moeclip_hf.tuner.model import MOECLIP_HEADS


def write_images(root, defect: tuple[slice, slice], seed: int) -> None:
    """Two good and two bad images of noise, the bad ones with a white defect, and its masks."""
    generator = np.random.default_rng(seed)
    for kind in ("normal", "abnormal", "masks"):
        (root / kind).mkdir(parents=True)
    for index in range(2):
        good, bad = generator.integers(90, 150, (2, 48, 48, 3)).astype(np.uint8)
        mask = np.zeros((48, 48), np.uint8)
        bad[defect], mask[defect] = 255, 255
        Image.fromarray(good).save(root / "normal" / f"{index}.png")
        Image.fromarray(bad).save(root / "abnormal" / f"{index}.png")
        Image.fromarray(mask).save(root / "masks" / f"{index}.png")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Data and adapters of `visa` and `mvtec`, each trained for two epochs over the embedded checkpoint's CLIP."""
    folder = tmp_path_factory.mktemp("examples")
    defects = {"visa": (slice(8, 24), slice(8, 40)), "mvtec": (slice(30, 44), slice(4, 20))}
    for seed, (name, defect) in enumerate(defects.items()):
        write_images(folder / name, defect, seed)
        arguments = ["--base", str(EMBEDDED_CHECKPOINT), "--data", str(folder / name), "--epochs", "2", "--rank", "4"]
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(sys, "argv", ["train_adapter", *arguments, "--output", str(folder / "adapters" / name)])
            train_adapter.main()
    return folder


def test_training_writes_an_adapter_of_finite_weights_without_the_clip(folder):
    weights = load_file(folder / "adapters" / "visa" / "adapter_model.safetensors")
    kinds = {part for key in weights for part in ("moe_lora_experts", *MOECLIP_HEADS) if f".{part}." in key}
    assert kinds == {"moe_lora_experts", *MOECLIP_HEADS}
    assert all(any(f".{kind}." in key for kind in kinds) for key in weights)
    assert all(tensor.isfinite().all() for tensor in weights.values())
    model = load_adapter(folder / "adapters" / "visa")
    assert model.peft_config["default"].base_model_name_or_path == str(EMBEDDED_CHECKPOINT)


def test_one_clip_serves_two_adapters_chosen_per_call(folder):
    sources = {name: str(folder / "adapters" / name) for name in ("visa", "mvtec")}
    both = two_adapters.AdapterServer(sources)
    alone = {name: two_adapters.AdapterServer({name: source}) for name, source in sources.items()}
    image = Image.open(folder / "visa" / "abnormal" / "0.png").convert("RGB")
    for name in ("visa", "mvtec", "visa"):
        result = both(image, "noise", name)
        expected = alone[name](image, "noise", name)
        assert result["score"] == expected["score"]
        assert np.array_equal(result["map"], expected["map"])
    assert alone["visa"](image, "noise", "visa")["score"] != alone["mvtec"](image, "noise", "mvtec")["score"]


def test_the_script_prints_a_score_of_each_adapter(folder, monkeypatch, capsys):
    adapters = [f"--adapter={name}={folder / 'adapters' / name}" for name in ("visa", "mvtec")]
    image = str(folder / "visa" / "normal" / "0.png")
    monkeypatch.setenv("COLUMNS", "200")
    monkeypatch.setattr(sys, "argv", ["two_adapters", *adapters, image])
    two_adapters.main()
    printed = capsys.readouterr().out
    row = next(line for line in printed.splitlines() if "0.png" in line)
    assert "visa" in printed and "mvtec" in printed
    assert len([word for word in row.split() if word.startswith("0.")]) == 2
