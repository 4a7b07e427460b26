"""What `accelerate launch` starts: a command leaves the other processes before it ends."""

import pytest
from benchmark_trees import write_tree
from torch import distributed
from training_runs import write_folder, write_plain_clip
from typer.testing import CliRunner

from moeclip_hf.cli import app
from moeclip_hf.processes import leave_processes, process_rank


@pytest.fixture
def joined(tmp_path):
    """This process has joined a group, of which it is the only one."""
    distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/rendezvous", rank=0, world_size=1)
    yield
    leave_processes()


def test_a_process_leaves_once(joined):
    assert process_rank() == (0, 1) and distributed.is_initialized()
    leave_processes()
    assert not distributed.is_initialized()
    leave_processes()


def test_evaluate_leaves_the_others_when_it_is_done(joined, tmp_path):
    write_tree("headct", tmp_path / "data" / "headct", normal=1, anomalous=1)
    options = ["--dataset", "headct", "--data-dir", tmp_path / "data", "--image-size", "32", "--device", "cpu",
               "--no-pictures", "--output-dir", tmp_path / "out"]  # fmt: skip
    result = CliRunner().invoke(app, ["evaluate", *map(str, options)])
    assert result.exit_code == 0, result.output
    assert not distributed.is_initialized()


def test_train_leaves_the_others_when_it_is_done(joined, tmp_path, tokenizer):
    clip, data = write_plain_clip(tmp_path / "clip", tokenizer), write_folder(tmp_path / "data")
    options = ["--dataset", data, "--clip", clip, "--output-dir", tmp_path / "out", "--max-steps", "1",
               "--num-workers", "0", "--tracker", "none", "--cpu"]  # fmt: skip
    result = CliRunner().invoke(app, ["train", *map(str, options)])
    assert result.exit_code == 0, result.output
    assert not distributed.is_initialized()
