"""Several processes, and runs that end before their time."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from accelerate.commands.config.config_args import load_config_from_file
from accelerate.utils import DistributedType
from ddp_training import run
from safetensors.torch import load_file
from training_runs import write_folder, write_plain_clip

TESTS = Path(__file__).parent
CONFIGURATIONS = TESTS.parent / "examples" / "accelerate"


@pytest.fixture(scope="module")
def inputs(tmp_path_factory, tokenizer):
    root = tmp_path_factory.mktemp("training")
    return write_plain_clip(root / "clip", tokenizer), write_folder(root / "data")


def command(inputs, output_dir: Path, processes: int, batch_size: int, **settings) -> list[str]:
    """`accelerate launch` of a run on the CPU: several processes as examples/accelerate/cpu.yaml has it."""
    port = str(20_000 + os.getpid() % 20_000)
    launch = [sys.executable, "-m", "accelerate.commands.launch", "--num_processes", str(processes)]
    if processes > 1:
        launch += ["--config_file", str(CONFIGURATIONS / "cpu.yaml"), "--main_process_port", port]
    else:
        launch += ["--cpu", "--num_machines", "1", "--mixed_precision", "no", "--dynamo_backend", "no"]
    script = [
        str(TESTS / "ddp_training.py"),
        *map(str, inputs),
        str(output_dir),
        str(batch_size),
        json.dumps(settings),
    ]
    return launch + script


def launch(*args, **settings) -> subprocess.CompletedProcess:
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    return subprocess.run(
        command(*args, **settings), capture_output=True, text=True, timeout=240, env=environment, check=False
    )


def history(output_dir: Path) -> list[dict]:
    return json.loads((output_dir / "history.json").read_text())


@pytest.fixture(scope="module")
def unbroken(inputs, tmp_path_factory):
    """Output folder of a run of one process, this one, to its end."""
    folder = tmp_path_factory.mktemp("unbroken")
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    run(*inputs, folder, 4, save_strategy="no")
    torch.set_num_threads(threads)
    return folder


@pytest.mark.parametrize("path", sorted(CONFIGURATIONS.glob("*.yaml")), ids=lambda path: path.stem)
def test_configurations_are_read_by_the_launcher(path):
    """It refuses keys that it does not know, and nodes and processes that do not go together."""
    configuration = load_config_from_file(str(path))
    assert configuration.num_processes > 1
    assert configuration.num_processes % configuration.num_machines == 0
    sharded = configuration.distributed_type == DistributedType.FSDP
    assert sharded == (path.stem == "fsdp") == bool(configuration.fsdp_config)


def test_two_processes_train_what_one_does(inputs, unbroken, tmp_path):
    """The global batch is the same; augmentation and dropout are on, and all four terms of the objective."""
    done = launch(inputs, tmp_path, 2, 2, save_strategy="no")
    assert done.returncode == 0, done.stderr[-3000:]
    one, two = history(unbroken), history(tmp_path)
    assert len(one) == len(two) == 12
    for name in ("loss", "segmentation", "classification", "etf", "balance", "expert_cosine", "expert_drift"):
        expected = [entry[name] for entry in one]
        assert [entry[name] for entry in two] == pytest.approx(expected, rel=1e-5, abs=1e-6), name
    first, second = (load_file(folder / "model.safetensors") for folder in (unbroken, tmp_path))
    for name, weight in first.items():
        assert (weight - second[name]).abs().max() <= 1e-5, name


@pytest.mark.slow
def test_killed_run_goes_on_from_its_last_checkpoint(inputs, unbroken, tmp_path):
    start = command(inputs, tmp_path, 1, 4, save_steps=1)
    launched = subprocess.Popen(start, stderr=subprocess.DEVNULL, start_new_session=True)
    deadline = time.monotonic() + 120
    while not list(tmp_path.glob("checkpoint-[3-9]")) and time.monotonic() < deadline:
        time.sleep(0.01)
    os.killpg(launched.pid, signal.SIGKILL)
    launched.wait()
    assert not (tmp_path / "history.json").exists()

    last = max(tmp_path.glob("checkpoint-*"), key=lambda path: int(path.name.partition("-")[2]))
    resumed = launch(inputs, tmp_path, 1, 4, save_strategy="no", resumed=str(last))
    assert resumed.returncode == 0, resumed.stderr[-3000:]
    assert [entry["loss"] for entry in history(tmp_path)] == [entry["loss"] for entry in history(unbroken)]


@pytest.mark.slow
@pytest.mark.parametrize(("before", "after"), [(1, 2), (2, 1)])
def test_run_goes_on_on_another_number_of_processes(inputs, unbroken, tmp_path, before, after):
    ended = launch(inputs, tmp_path, before, 4 // before, save_steps=4, die_at=4)
    assert "found a broken image" in ended.stderr
    resumed = launch(inputs, tmp_path, after, 4 // after, save_strategy="no", resumed=str(tmp_path / "checkpoint-4"))
    assert resumed.returncode == 0, resumed.stderr[-3000:]
    losses = [entry["loss"] for entry in history(unbroken)]
    assert [entry["loss"] for entry in history(tmp_path)] == pytest.approx(losses, rel=1e-5)


@pytest.mark.parametrize(
    ("killed", "cause"), [(False, "found a broken image"), pytest.param(True, "SIGKILL", marks=pytest.mark.slow)]
)
def test_process_that_dies_ends_the_run_soon_and_with_the_cause(inputs, tmp_path, killed, cause):
    start = time.monotonic()
    done = launch(inputs, tmp_path, 2, 2, save_strategy="no", die_at=1, killed=killed)
    assert time.monotonic() - start < 120
    assert done.returncode != 0
    assert cause in done.stderr
    assert not (tmp_path / "config.json").exists()
