"""`moeclip train` and examples/train.py."""

import fcntl
import json
import os
import pty
import runpy
import shutil
import struct
import subprocess
import sys
import termios
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from training_runs import write_folder, write_plain_clip
from typer.testing import CliRunner

from moeclip_hf.cli import app
from moeclip_hf.data import load_folder
from moeclip_hf.errors import CheckpointError, MoECLIPError
from moeclip_hf.pretrained import EMBEDDED_CHECKPOINT, load_pretrained
from moeclip_hf.training import get_recipe, start_model

EXAMPLE = Path(__file__).parents[1] / "examples" / "train.py"


def test_command_trains_from_a_plain_clip_to_a_usable_checkpoint(tmp_path, tokenizer):
    clip, data, output = (
        write_plain_clip(tmp_path / "clip", tokenizer),
        write_folder(tmp_path / "data"),
        tmp_path / "out",
    )
    options = ["--dataset", data, "--clip", clip, "--output-dir", output, "--num-epochs", "1", "--batch-size", "6",
               "--halve-at", "2,3", "--num-experts", "2", "--moe-layers", "1,7", "--no-augment", "--image-size", "24",
               "--num-workers", "0", "--tracker", "tensorboard", "--cpu"]  # fmt: skip
    result = CliRunner().invoke(app, ["train", *map(str, options)])
    assert result.exit_code == 0, result.output
    assert f"--model {output}" in result.output
    assert "'images_per_second'" in result.output and "'expert_cosine'" in result.output  # a line a log
    model, processor = load_pretrained(output, device="cpu")
    assert (model.config.num_experts, model.config.moe_layers) == (2, [1, 7])
    assert processor.image_processor.size == {"height": 24, "width": 24}
    recipe = json.loads((output / "recipe.json").read_text())
    assert (recipe["halve_at"], recipe["augment"], recipe["batch_size"]) == ([2, 3], False, 6)
    assert list(output.rglob("events.out.tfevents*"))


def test_machines_get_json_alone_on_standard_output(tmp_path, tokenizer):
    clip, data = write_plain_clip(tmp_path / "clip", tokenizer), write_folder(tmp_path / "data")
    options = ["--dataset", data, "--clip", clip, "--output-dir", tmp_path / "out", "--max-steps", "1",
               "--num-workers", "0", "--tracker", "none", "--cpu", "--json"]  # fmt: skip
    result = CliRunner().invoke(app, ["train", *map(str, options)])
    recipe = json.loads((tmp_path / "out" / "recipe.json").read_text())
    assert json.loads(result.stdout) == {"checkpoint": str(tmp_path / "out"), **recipe}
    assert "'images_per_second'" in result.stderr


def test_a_hub_data_set_is_recorded_with_its_owner(tmp_path, tokenizer, monkeypatch):
    clip, rows = write_plain_clip(tmp_path / "clip", tokenizer), load_folder(write_folder(tmp_path / "data"))
    monkeypatch.setattr("moeclip_hf.data.load_data", lambda *source, **options: rows)
    options = ["--dataset", "ann/parts", "--clip", clip, "--output-dir", tmp_path / "out", "--max-steps", "1",
               "--num-workers", "0", "--tracker", "none", "--cpu"]  # fmt: skip
    result = CliRunner().invoke(app, ["train", *map(str, options)])
    assert result.exit_code == 0, result.output
    assert json.loads((tmp_path / "out" / "recipe.json").read_text())["datasets"] == ["ann/parts"]


def test_a_terminal_sees_a_progress_bar_with_loss_and_speed(tmp_path, tokenizer):
    clip, data = write_plain_clip(tmp_path / "clip", tokenizer), write_folder(tmp_path / "data")
    options = ["--dataset", data, "--clip", clip, "--output-dir", tmp_path / "out", "--max-steps", "2", "--batch-size",
               "4", "--num-workers", "0", "--tracker", "none", "--cpu", "--logging-steps", "1"]  # fmt: skip
    terminal, other_end = pty.openpty()
    fcntl.ioctl(other_end, termios.TIOCSWINSZ, struct.pack("HHHH", 24, 120, 0, 0))
    with subprocess.Popen([sys.executable, EXAMPLE, *options], stdout=other_end, stderr=other_end) as process:
        os.close(other_end)
        seen = b""
        while chunk := read_or_nothing(terminal):
            seen += chunk
    os.close(terminal)
    assert process.returncode == 0, seen.decode()
    assert "2/2" in seen.decode()
    assert all(f"{name}=" in seen.decode() for name in ("loss", "lr", "images/s"))
    assert "'loss'" not in seen.decode()


def read_or_nothing(terminal: int) -> bytes:
    try:
        return os.read(terminal, 1 << 16)
    except OSError:  # the other end is closed
        return b""


def test_errors_are_one_line_and_wrong_usage_is_status_2(tmp_path, monkeypatch):
    def run(*options):
        monkeypatch.setattr(sys, "argv", ["train.py", *options, "--output-dir", str(tmp_path)])
        with pytest.raises(SystemExit) as ended:
            runpy.run_path(str(EXAMPLE), run_name="__main__")
        return ended.value.code  # a text is printed, and the status 1

    assert run("--dataset", str(tmp_path / "no" / "data")).startswith("train.py: no such folder")
    assert run("--dataset", "x", "--recipe", "papers") == 2
    wrong = CliRunner().invoke(app, ["train", "--dataset", "x", "--output-dir", "y", "--halve-at", "2;3"])
    assert wrong.exit_code == 2
    assert "--halve-at" in wrong.output and "whole numbers" in wrong.output


def test_fresh_start_keeps_the_clip_of_a_moeclip_and_nothing_else():
    stored = load_file(EMBEDDED_CHECKPOINT / "model.safetensors")
    model, processor = start_model("embedded", get_recipe("paper"), fresh=True, num_experts=3)
    assert model.name_or_path == str(EMBEDDED_CHECKPOINT)
    own = ("moe_layers.", "text_adapter.", "patch_projection.", "depthwise_adapter.")
    for name, tensor in model.state_dict().items():
        assert tensor.dtype == torch.float32, name
        if not name.startswith(own):
            assert torch.equal(tensor, stored[name].float()), name
    assert model.moe_layers[0].lora_B.shape[0] == 3
    assert not torch.equal(model.text_adapter.projection.weight, stored["text_adapter.projection.weight"].float())
    # Those of the checkpoint were calibrated on what it scored.
    assert processor.image_threshold == processor.pixel_threshold == 0.5


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("moe_layers", [0, 1, 3, 5, 7]), ("moe_layers", [1, 3]), ("feature_layers", [4, 8]), ("num_experts", 2),
        ("lora_rank", 4), ("use_fofs", False), ("image_feature_layer", 4),
    ],
)  # fmt: skip
def test_trained_parts_go_on_where_they_were_trained_or_not_at_all(name, value):
    """Else experts of other blocks would start from nothing, or one tap's projection serve another, without a word."""
    with pytest.raises(CheckpointError, match=f"{name} .*, not .*--fresh"):
        start_model("embedded", get_recipe("paper"), **{name: value})


def test_a_moeclip_without_some_of_its_trained_parts_is_refused(tmp_path):
    shutil.copytree(EMBEDDED_CHECKPOINT, tmp_path / "damaged")
    weights = load_file(EMBEDDED_CHECKPOINT / "model.safetensors")
    del weights["moe_layers.0.lora_B"]
    save_file(weights, tmp_path / "damaged" / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match=r"lacks 1 of its weights \(moe_layers.0.lora_B"):
        start_model(tmp_path / "damaged", get_recipe("paper"))
    start_model(tmp_path / "damaged", get_recipe("paper"), fresh=True)


def test_a_folder_of_ones_own_is_data_by_itself(tmp_path, tokenizer):
    clip, data = write_plain_clip(tmp_path / "clip", tokenizer), write_folder(tmp_path / "data")
    options = ["--clip", clip, "--output-dir", tmp_path / "out", "--max-steps", "1", "--batch-size", "4",
               "--num-workers", "0", "--tracker", "none", "--cpu"]  # fmt: skip
    result = CliRunner().invoke(app, ["train", "--data-dir", str(data), *map(str, options)])
    assert result.exit_code == 0, result.output
    recipe = json.loads((tmp_path / "out" / "recipe.json").read_text())
    assert recipe["datasets"] == ["data"]
    assert recipe["images"].startswith(f"{len(load_folder(data))}, ")
    result = CliRunner().invoke(app, ["train", *map(str, options)])
    assert result.exit_code == 2 and "name a data set" in result.output


def test_tracker_that_is_not_installed_is_named_before_anything_is_loaded(tmp_path, monkeypatch):
    monkeypatch.setattr("moeclip_hf.training.run.find_spec", lambda package: None if package == "trackio" else True)
    options = ["--dataset", "./none", "--clip", "./none", "--output-dir", tmp_path / "out", "--tracker", "trackio"]
    with pytest.raises(MoECLIPError, match="trackio is not installed, and this run needs it"):
        CliRunner().invoke(app, ["train", *map(str, options)], catch_exceptions=False)
