"""A slow, failing or dying Hub: what passes is tried again, what does not is told in one line, nothing half done."""

import shutil
import threading
from collections import defaultdict
from pathlib import Path

import pytest
from benchmark_trees import write_folder
from huggingface_hub import HfApi, constants, hf_hub_download
from mini_hub import Handler, MiniHub
from typer.testing import CliRunner

from moeclip_hf import calibration
from moeclip_hf.adapters import load_adapter
from moeclip_hf.cli import app
from moeclip_hf.conversion import load_clip
from moeclip_hf.errors import CheckpointError, ConversionError, PublishingError
from moeclip_hf.hub import push_to_hub
from moeclip_hf.pretrained import EMBEDDED_CHECKPOINT, fetch_checkpoint

WEIGHTS = "/ann/it/resolve/COMMIT/model.safetensors"
INFO = "/api/models/ann/it/revision/main"
ALWAYS = 99
# Seconds that the client waits for an answer here.
PATIENCE = 2


class FaultyHandler(Handler):
    """A Hub's answers, but for those that `hub.faults` has instead."""

    def answer(self) -> None:
        path = self.path.partition("?")[0]
        commit = self.hub.repositories["ann/it"].refs["main"] if "ann/it" in self.hub.repositories else ""
        faults = self.hub.faults[self.command, path.replace(commit, "COMMIT") if commit else path]
        fault = faults.pop(0) if faults else None
        if fault is None:
            super().answer()
        elif fault == "silence":
            self.close_connection = True
            self.hub.over.wait(PATIENCE * 4)
        elif fault == "cut":
            self.hub.cut.add("ann/it/model.safetensors")
            super().answer()
            self.hub.cut.clear()
        elif fault == "page":
            self.rfile.read(int(self.headers.get("Content-Length") or 0))
            self.send(b"<html>Log in to this network</html>", headers={"Content-Type": "text/html"})
        else:
            self.rfile.read(int(self.headers.get("Content-Length") or 0))
            self.send({"error": "too busy"}, fault, {"X-Error-Message": "too busy"})

    do_GET = do_HEAD = do_POST = do_PUT = do_DELETE = answer  # noqa: N815 (the base class's names)


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """A Hub with the embedded checkpoint as ann/it, which the client asks, with an empty cache and no pauses."""
    with MiniHub(tmp_path / "stored", {"hf_ann": "ann"}) as hub:
        hub.faults, hub.over = defaultdict(list), threading.Event()
        hub.server.RequestHandlerClass = type("Bound", (FaultyHandler,), {"hub": hub})
        for name, value in {
            "ENDPOINT": hub.url,
            "HUGGINGFACE_CO_URL_TEMPLATE": hub.url + "/{repo_id}/resolve/{revision}/{filename}",
            "HF_HUB_OFFLINE": False,
            "HF_HUB_CACHE": str(tmp_path / "cache"),
            "HF_HUB_DISABLE_XET": True,
            "HF_HUB_ETAG_TIMEOUT": PATIENCE,
            "HF_HUB_DOWNLOAD_TIMEOUT": PATIENCE,
        }.items():
            monkeypatch.setattr(constants, name, value)
        monkeypatch.setattr("time.sleep", lambda seconds: None)
        repository = hub.repositories["ann/it"] = _repository(hub)
        hub.commit = repository.refs["main"]
        yield hub
        hub.over.set()


def _repository(hub: MiniHub):
    from mini_hub import Repository

    repository = Repository(private=False)
    files = {file.name: hub.store(file.read_bytes()) for file in EMBEDDED_CHECKPOINT.iterdir() if file.is_file()}
    repository.add("main", files, "a checkpoint")
    return repository


def assert_whole(folder: Path) -> None:
    for name in ("config.json", "model.safetensors", "processor_config.json", "tokenizer.json"):
        assert (folder / name).read_bytes() == (EMBEDDED_CHECKPOINT / name).read_bytes()


@pytest.mark.parametrize(
    ("method", "path", "faults"),
    [
        ("HEAD", WEIGHTS, [503, 502]),
        ("HEAD", WEIGHTS, [429]),
        ("GET", WEIGHTS, ["cut"]),
        ("GET", WEIGHTS, ["cut", "cut", 429]),
        ("GET", WEIGHTS, ["silence"]),
    ],
    ids=["5xx", "too many requests", "a cut download", "cuts and too many requests", "a stalled download"],
)
def test_what_passes_is_tried_again(hub, method, path, faults):
    hub.faults[method, path] = list(faults)
    folder = fetch_checkpoint("ann/it")
    assert not hub.faults[method, path], "the fault was never met"
    assert folder.name == hub.commit
    assert_whole(folder)


@pytest.mark.parametrize(
    "command",
    ["predict", "explain", "export", "calibrate", "evaluate", "app", "train", "convert export", "convert openai"],
)
def test_every_command_that_uses_a_checkpoint_takes_the_revision_it_is_told(hub, tmp_path, command):
    write_folder(tmp_path / "data")
    picture = next((tmp_path / "data").rglob("*.png"))
    given = {
        "predict": [picture],
        "explain": [picture],
        "export": ["--output", tmp_path / "out"],
        "calibrate": [picture, "--output", tmp_path / "out", "--false-alarm-rate", "0.5"],
        "evaluate": ["--data-dir", tmp_path / "data", "--no-pictures"],
        "app": [],
        "train": ["--data-dir", tmp_path / "data", "--output-dir", tmp_path / "out", "--tracker", "none", "--cpu"],
        "convert export": ["--output", tmp_path / "moe_last.pth"],
        "convert openai": ["--output", tmp_path / "out"],
    }[command]
    model = "--clip" if command in ("train", "convert openai") else "--model"
    told = "cannot be loaded to train on: " if command == "train" else ""
    arguments = [*command.split(), *given, model, "ann/it", "--revision", "v9"]
    with pytest.raises(CheckpointError, match=f"^ann/it: {told}has no revision 'v9'"):
        CliRunner().invoke(app, [str(argument) for argument in arguments], catch_exceptions=False)


def test_calibrate_copies_the_commit_that_it_scored(hub, tmp_path, monkeypatch):
    """Though the branch moves on meanwhile: thresholds never meet other weights."""
    write_folder(tmp_path / "data")
    repository = hub.repositories["ann/it"]
    files = repository.commits[hub.commit].files
    score = calibration.score_for_calibration

    def score_while_somebody_pushes(*arguments):
        repository.add("main", files | {"model.safetensors": hub.store(b"other weights")}, "another checkpoint")
        return score(*arguments)

    monkeypatch.setattr(calibration, "score_for_calibration", score_while_somebody_pushes)
    options = ["--best-f1", "--model", "ann/it", "--output", tmp_path / "out", "--device", "cpu"]
    arguments = ["calibrate", "--data-dir", tmp_path / "data", *options]
    CliRunner().invoke(app, [str(argument) for argument in arguments], catch_exceptions=False)
    assert repository.refs["main"] != hub.commit
    stored = (tmp_path / "out" / "model.safetensors").read_bytes()
    assert stored == (EMBEDDED_CHECKPOINT / "model.safetensors").read_bytes()


BUSY = "answered: too busy: try again later."
LASTING = {
    "an overloaded index": ("GET", INFO, 503, BUSY),
    "a failing index": ("GET", INFO, 500, BUSY),
    "an overloaded file": ("GET", WEIGHTS, 503, BUSY),
    "a file that cannot be asked about": ("HEAD", WEIGHTS, 502, "try again"),
    "a file that never comes": ("GET", WEIGHTS, 504, BUSY),
    "a page for an index": ("GET", INFO, "page", "cannot be downloaded: "),
    "a page for a file": ("GET", WEIGHTS, "page", "cannot be downloaded: Consistency check failed"),
}


@pytest.mark.parametrize(("method", "path", "fault", "words"), LASTING.values(), ids=LASTING)
def test_what_does_not_pass_is_told_and_the_next_attempt_goes_on(hub, method, path, fault, words):
    hub.faults[method, path] = [fault] * ALWAYS
    with pytest.raises(CheckpointError) as error:
        fetch_checkpoint("ann/it")
    assert str(error.value).startswith("ann/it: ")
    assert words in str(error.value)
    assert "\n" not in str(error.value)
    hub.faults.clear()
    assert_whole(fetch_checkpoint("ann/it"))


def test_a_hub_that_never_answers_is_told(hub):
    hub.faults["GET", INFO] = ["silence"] * ALWAYS
    with pytest.raises(CheckpointError, match=r"the connection to .* failed: try again\."):
        fetch_checkpoint("ann/it")


def test_what_is_in_the_cache_is_used_when_the_hub_has_died(hub):
    folder = fetch_checkpoint("ann/it")
    hub.faults["GET", INFO] = [500] * ALWAYS
    assert fetch_checkpoint("ann/it") == folder
    hub.server.server_close()
    assert_whole(fetch_checkpoint("ann/it", revision=hub.commit))


def test_half_a_download_is_not_taken_for_a_checkpoint_when_the_hub_dies(hub):
    hub.faults["GET", WEIGHTS] = [503] * ALWAYS
    with pytest.raises(CheckpointError):
        fetch_checkpoint("ann/it")
    hub.faults["GET", INFO] = [503] * ALWAYS
    with pytest.raises(CheckpointError, match=BUSY):
        fetch_checkpoint("ann/it")


@pytest.mark.parametrize("load", [load_adapter, load_clip])
def test_adapters_and_clips_say_it_too(hub, load):
    hub.faults["GET", INFO] = [503] * ALWAYS
    with pytest.raises(CheckpointError, match=BUSY) as error:
        load("ann/it")
    assert isinstance(error.value, ConversionError) == (load is load_clip)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("method", "path", "fault"),
    [
        ("POST", "/api/repos/create", 503),
        ("POST", "/api/models/ann/it/commit/main", 500),
        ("POST", "/api/models/ann/it/preupload/main", 502),
    ],
    ids=["making it", "the commit", "the upload"],
)
def test_a_push_that_fails_leaves_the_repository_as_it_was(hub, tmp_path, method, path, fault):
    shutil.copytree(EMBEDDED_CHECKPOINT, tmp_path / "checkpoint")
    hub.faults[method, path] = [fault] * ALWAYS
    with pytest.raises(PublishingError, match=BUSY):
        push_to_hub(tmp_path / "checkpoint", "ann/it", token="hf_ann")
    assert hub.repositories["ann/it"].refs["main"] == hub.commit


def test_what_somebody_pushes_meanwhile_is_not_overwritten_unseen(hub, tmp_path, monkeypatch):
    shutil.copytree(EMBEDDED_CHECKPOINT, tmp_path / "checkpoint")
    repository = hub.repositories["ann/it"]
    files = repository.commits[hub.commit].files
    look = HfApi.list_repo_files

    def look_while_somebody_pushes(*arguments, **options):
        found = look(*arguments, **options)
        if repository.refs["main"] == hub.commit:
            repository.add("main", files | {"README.md": hub.store(b"# Edited on the Hub")}, "another card")
        return found

    monkeypatch.setattr(HfApi, "list_repo_files", look_while_somebody_pushes)
    with pytest.raises(PublishingError, match=r"ann/it: somebody else pushed to it at the same time.*: push again\."):
        push_to_hub(tmp_path / "checkpoint", "ann/it", token="hf_ann")
    assert hub.read("ann/it", "README.md") == b"# Edited on the Hub"
    pushed = push_to_hub(tmp_path / "checkpoint", "ann/it", token="hf_ann")
    assert repository.refs["main"] == pushed.oid


def test_a_card_that_cannot_be_asked_about_is_not_taken_for_one_that_is_not_there(hub, tmp_path):
    """A folder without a card goes on from the repository's, which would be lost."""
    shutil.copytree(EMBEDDED_CHECKPOINT, tmp_path / "checkpoint")
    (tmp_path / "checkpoint" / "README.md").unlink()
    hf_hub_download("ann/it", "README.md")  # nor is the one in the cache taken, which has been edited since
    repository = hub.repositories["ann/it"]
    files = repository.commits[hub.commit].files
    repository.add("main", files | {"README.md": hub.store(b"# Edited on the Hub")}, "another card")
    edited = repository.refs["main"]
    card = ("HEAD", "/ann/it/resolve/COMMIT/README.md")
    hub.faults[card] = [503] * ALWAYS
    with pytest.raises(PublishingError, match="try again"):
        push_to_hub(tmp_path / "checkpoint", "ann/it", token="hf_ann")
    assert len(hub.faults[card]) < ALWAYS, "the fault was never met"
    assert repository.refs["main"] == edited
    hub.faults.clear()
    push_to_hub(tmp_path / "checkpoint", "ann/it", token="hf_ann")
    published = fetch_checkpoint("ann/it")
    assert "# Edited on the Hub" in Path(hf_hub_download("ann/it", "README.md", revision=published.name)).read_text()
