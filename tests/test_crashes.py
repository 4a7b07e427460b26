"""Runs that are killed, or find the disk full, lose nothing: they go on to what an unbroken one comes to."""

import json
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from benchmark_trees import write_folder as write_parts
from safetensors.torch import load_file
from training_runs import write_folder, write_plain_clip

from moeclip_hf.data import load_data
from moeclip_hf.errors import MoECLIPError
from moeclip_hf.evaluation import evaluate
from moeclip_hf.evaluation.checkpointing import ScoredBatches
from moeclip_hf.pretrained import load_pretrained

TESTS = Path(__file__).parent
KILLS = {"quick": 2, "all": 25}
STEPS = 6

amounts = pytest.mark.parametrize("amount", ["quick", pytest.param("all", marks=pytest.mark.slow)])


@dataclass
class Ended:
    """A command that has ended: its status (minus the signal that ended it), output and seconds of processor time."""

    status: int
    output: str
    seconds: float

    @property
    def message(self) -> str:
        """The last line but the count of operations."""
        return self.output.splitlines()[-2]

    @property
    def operations(self) -> int:
        """Its operations on files of its folder."""
        return int(self.output.rpartition("operations: ")[2])


class Commands:
    """Starts `moeclip` commands in forks of tests/forked_commands.py, one after the other."""

    def __init__(self) -> None:
        environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(sys.path)}
        self.server = subprocess.Popen(
            [sys.executable, TESTS / "forked_commands.py"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=environment,
        )

    def run(
        self,
        arguments: list[object],
        folder: Path,
        die_at: int | None = None,
        file_limit: int | None = None,
        kill_after: float | None = None,
    ) -> Ended:
        """Run a command to its end, which comes early if it is killed after so many seconds of processor time."""
        command = {"arguments": [str(one) for one in arguments], "folder": str(folder), "die_at": die_at}
        print(json.dumps(command | {"file_limit": file_limit}), file=self.server.stdin, flush=True)
        process = int(self.server.stdout.readline())
        while kill_after is not None and (used := processor_time(process)) is not None:
            if used >= kill_after:
                os.kill(process, signal.SIGKILL)
                break
            time.sleep(0.002)
        return Ended(**json.loads(self.server.stdout.readline()))


def processor_time(process: int) -> float | None:
    """Seconds that a process has used; None when it has ended."""
    try:
        after_name = Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()
    except FileNotFoundError:
        return None
    ticks = int(after_name[11]) + int(after_name[12])
    return None if after_name[0] == "Z" else ticks / os.sysconf("SC_CLK_TCK")


@pytest.fixture(scope="module")
def commands() -> Iterator[Commands]:
    running = Commands()
    yield running
    running.server.stdin.close()
    running.server.wait()


@pytest.fixture(scope="module")
def inputs(tmp_path_factory, tokenizer) -> tuple[Path, Path]:
    root = tmp_path_factory.mktemp("inputs")
    return write_plain_clip(root / "clip", tokenizer), write_folder(root / "data")


def training(inputs: tuple[Path, Path], folder: Path, max_steps: int = STEPS) -> list[object]:
    clip, data = inputs
    options = ["--save-steps", 1, "--logging-steps", 1, "--num-workers", 0, "--tracker", "none", "--cpu", "--resume"]
    return ["train", "--dataset", data, "--clip", clip, "--output-dir", folder, "--batch-size", 4,
            "--max-steps", max_steps, *options]  # fmt: skip


def losses(folder: Path) -> list[float]:
    (state,) = folder.glob(f"checkpoint-{STEPS}/trainer_state.json")
    return [entry["loss"] for entry in json.loads(state.read_text())["log_history"] if "loss" in entry]


def assert_same_training(folder: Path, unbroken: Path) -> None:
    assert losses(folder) == losses(unbroken)
    assert len(losses(folder)) == STEPS
    weights, expected = (load_file(one / "model.safetensors") for one in (folder, unbroken))
    assert weights.keys() == expected.keys()
    assert all(torch.equal(weights[name], expected[name]) for name in expected)
    assert (folder / "recipe.json").read_text() == (unbroken / "recipe.json").read_text()
    assert not (folder / ".staging").exists()


def evaluation(data: Path, folder: Path) -> list[object]:
    options = ["--batch-size", 1, "--device", "cpu", "--image-size", 32, "--no-pictures", "--json"]
    return ["evaluate", "--data-dir", data, "--output-dir", folder, *options]


def figures(folder: Path) -> list[dict]:
    return json.loads((folder / "results.json").read_text())["datasets"]


def assert_same_evaluation(folder: Path, unbroken: Path) -> None:
    assert figures(folder) == figures(unbroken)
    assert sorted(path.name for path in folder.iterdir()) == ["results.csv", "results.json", "results.md"]


@dataclass
class Unbroken:
    """A command that came to its end: what it was, where it wrote, and how it ended."""

    command: Callable[[Path], list[object]]
    folder: Path
    ended: Ended


def run_unbroken(commands: Commands, command: Callable[[Path], list[object]], folder: Path) -> Unbroken:
    ended = commands.run(command(folder), folder)
    assert ended.status == 0, ended.output
    return Unbroken(command, folder, ended)


@pytest.fixture(scope="module")
def whole_training(commands, inputs, tmp_path_factory) -> Unbroken:
    folder = tmp_path_factory.mktemp("training") / "unbroken"
    return run_unbroken(commands, lambda folder: training(inputs, folder), folder)


@pytest.fixture(scope="module")
def whole_evaluation(commands, tmp_path_factory) -> Unbroken:
    root = tmp_path_factory.mktemp("evaluation")
    write_parts(root / "data", normal=8, anomalous=8)
    return run_unbroken(commands, lambda folder: evaluation(root / "data", folder), root / "unbroken")


def kill_and_go_on(
    commands: Commands,
    unbroken: Unbroken,
    root: Path,
    kills: int,
    by_clock: bool,
    assert_same: Callable[[Path, Path], None],
) -> None:
    """Kill a command at random moments, each time giving it again, until it ends; do so until enough were killed."""
    moments = random.Random(0)
    killed = runs = 0
    while killed < kills:
        folder = root / str(runs)
        runs += 1
        status = None
        while status != 0:
            if killed == kills:
                moment = {}
            elif by_clock:
                moment = {"kill_after": moments.uniform(0, unbroken.ended.seconds)}
            else:
                moment = {"die_at": moments.randint(1, unbroken.ended.operations)}
            ended = commands.run(unbroken.command(folder), folder, **moment)
            status = ended.status
            assert status in (0, -signal.SIGKILL), ended.output
            killed += status != 0
        assert_same(folder, unbroken.folder)


@amounts
@pytest.mark.parametrize("by_clock", [True, False], ids=["at-any-moment", "while-writing"])
def test_a_training_that_is_killed_goes_on_to_the_losses_and_weights_of_an_unbroken_one(
    commands, whole_training, tmp_path, amount, by_clock
):
    kill_and_go_on(commands, whole_training, tmp_path, KILLS[amount], by_clock, assert_same_training)


@amounts
@pytest.mark.parametrize("by_clock", [True, False], ids=["at-any-moment", "while-writing"])
def test_an_evaluation_that_is_killed_goes_on_to_the_figures_of_an_unbroken_one(
    commands, whole_evaluation, tmp_path, amount, by_clock
):
    kill_and_go_on(commands, whole_evaluation, tmp_path, KILLS[amount], by_clock, assert_same_evaluation)


@amounts
def test_a_full_disk_leaves_the_last_good_checkpoint_whichever_file_it_stops(
    commands, inputs, whole_training, tmp_path, amount
):
    unbroken, folder = whole_training.folder, tmp_path / "run"
    assert commands.run(training(inputs, folder, 2), folder).status == 0
    good = folder / "checkpoint-2"
    before = {path.name: path.read_bytes() for path in good.iterdir()}
    (folder / "config.json").unlink()
    # Each of these files is once the first of a checkpoint that does not fit.
    chosen = ["trained.safetensors", "optimizer.pt"] if amount == "quick" else list(before)
    for name in chosen:
        ended = commands.run(training(inputs, folder, 4), folder, file_limit=len(before[name]) - 1)
        assert ended.status == 1, ended.output
        assert ended.message.startswith(f"moeclip: {folder}: step 3 cannot be saved ("), ended.output
        assert "Traceback" not in ended.output
        assert not (folder / "config.json").exists() and not (folder / ".staging").exists()
        assert {path.name: path.read_bytes() for path in good.iterdir()} == before
    # Checkpoints fit, and the model at the end does not.
    whole_model = (unbroken / "model.safetensors").stat().st_size
    ended = commands.run(training(inputs, folder), folder, file_limit=whole_model - 1)
    assert ended.status == 1
    assert f"step {STEPS} cannot be saved" in ended.message
    assert commands.run(training(inputs, folder), folder).status == 0
    assert_same_training(folder, unbroken)


def test_a_full_disk_stops_an_evaluation_which_goes_on_later(commands, whole_evaluation, tmp_path):
    folder = tmp_path / "run"
    for limit in (0, 1000):  # neither the settings, nor the first batch
        ended = commands.run(whole_evaluation.command(folder), folder, file_limit=limit)
        assert ended.status == 1, ended.output
        file = folder / ".unfinished" / "data" / ("000000.npz" if limit else "settings.json")
        assert ended.message == f"moeclip: {file}: cannot be written (File too large)"
        assert not (folder / "results.json").exists()
    assert commands.run(whole_evaluation.command(folder), folder).status == 0
    assert_same_evaluation(folder, whole_evaluation.folder)


def test_a_batch_that_cannot_be_kept_ends_an_evaluation_at_once(tmp_path, monkeypatch):
    write_parts(tmp_path / "data", normal=20, anomalous=20)
    saved = []

    def fail(self, number, batch):
        saved.append(number)
        raise OSError("no space left")

    monkeypatch.setattr(ScoredBatches, "save", fail)
    told = []
    with pytest.raises(OSError, match="no space left"):
        evaluate(
            load_pretrained(device="cpu"),
            load_data(tmp_path / "data"),
            batch_size=1,
            image_size=32,
            resume_dir=tmp_path / "kept",
            progress=lambda done, total: told.append(done),
        )
    assert max(told) < 20


def test_batches_without_their_settings_are_not_taken_for_this_evaluations(tmp_path):
    """What a crash leaves of a folder that was being deleted, when another model is evaluated next."""
    write_parts(tmp_path / "data", normal=3, anomalous=3)
    rows, kept = load_data(tmp_path / "data"), tmp_path / "kept"
    pretrained, other = load_pretrained(device="cpu"), load_pretrained(device="cpu")
    with torch.no_grad():
        other.model.text_adapter.projection.weight.neg_()
    expected = evaluate(pretrained, rows, image_size=32)
    first = evaluate(other, rows, image_size=32, resume_dir=kept)
    assert first.groups[0].scores != expected.groups[0].scores
    (kept / "settings.json").unlink()
    assert evaluate(pretrained, rows, image_size=32, resume_dir=kept).groups[0].scores == expected.groups[0].scores


@pytest.mark.parametrize("name", ["settings.json", "000000.npz"])
@pytest.mark.parametrize(
    "content", [b"", b"{", b"[1]", b"PK\x03\x04" + b"\0" * 40], ids=["empty", "torn", "other", "zeros"]
)
def test_what_a_power_cut_damaged_of_an_evaluation_is_named(tmp_path, name, content):
    write_parts(tmp_path / "data")
    rows, pretrained = load_data(tmp_path / "data"), load_pretrained(device="cpu")
    evaluate(pretrained, rows, image_size=32, resume_dir=tmp_path / "kept")
    (tmp_path / "kept" / name).write_bytes(content)
    with pytest.raises(MoECLIPError, match=rf"{name}: is damaged: delete"):
        evaluate(pretrained, rows, image_size=32, resume_dir=tmp_path / "kept")


def workers(launcher: int) -> list[int]:
    """The processes that a launcher has started."""
    return [int(child) for child in Path(f"/proc/{launcher}/task/{launcher}/children").read_text().split()]


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["training", "evaluation"])
def test_when_one_of_two_processes_is_killed_the_other_ends_within_a_minute_and_the_cause_is_said(
    commands, inputs, tmp_path, kind
):
    folder, unbroken = tmp_path / "run", tmp_path / "unbroken"
    if kind == "training":
        command, begun = training(inputs, folder, 10_000), "checkpoint-*"
    else:
        write_parts(tmp_path / "data", normal=200, anomalous=200)
        command, begun = evaluation(tmp_path / "data", folder), ".unfinished/data/*.npz"
    port = str(20_000 + os.getpid() % 20_000)
    launch = [sys.executable, "-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", "2",
              "--num_machines", "1", "--main_process_port", port, "--mixed_precision", "no", "--dynamo_backend", "no",
              "-m", "moeclip_hf.cli"]  # fmt: skip
    errors = tmp_path / "errors"
    with errors.open("w") as file:
        launcher = subprocess.Popen(
            [*launch, *map(str, command)],
            stdout=subprocess.DEVNULL,
            stderr=file,
            env=os.environ | {"OMP_NUM_THREADS": "1"},
        )
    deadline = time.monotonic() + 240
    while not list(folder.glob(begun)) and time.monotonic() < deadline:
        time.sleep(0.01)
    first, second = workers(launcher.pid)
    os.kill(second, signal.SIGKILL)
    assert launcher.wait(60) != 0
    assert not Path(f"/proc/{first}").exists()
    assert "SIGKILL" in errors.read_text()
    assert not (folder / "results.json").exists() and not (folder / "config.json").exists()
    if kind == "evaluation":
        assert commands.run(evaluation(tmp_path / "data", folder), folder).status == 0
        assert commands.run(evaluation(tmp_path / "data", unbroken), unbroken).status == 0
        assert_same_evaluation(folder, unbroken)
