"""Publishing and loading back, with the real client, in fresh processes with a fresh cache, against a Hub of our own.

Every process takes seconds to import what it needs: each does all that its surroundings (with the package or without,
with which token, online or not) are good for.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from huggingface_hub import CommitInfo
from mini_hub import MiniHub
from PIL import Image
from training_runs import write_folder
from transformers import CLIPConfig, CLIPModel

from moeclip_hf import MoECLIPModel, MoECLIPProcessor
from moeclip_hf.pretrained import EMBEDDED_CHECKPOINT
from moeclip_hf.training.recipes import get_recipe

TOKENS = {"hf_ann": "ann", "hf_bob": "bob"}

# An environment without the package: whatever asks for it is told that it is not there.
WITHOUT_PACKAGE = """
import sys

class NotInstalled:
    @staticmethod
    def find_spec(name, path=None, target=None):
        if name.partition(".")[0] in ("moeclip_hf", "modeling"):
            raise ModuleNotFoundError(f"No module named {name!r}")

sys.meta_path.insert(0, NotInstalled)
"""


class Workplace:
    """A folder, and what it takes to run Python there as somebody whose Hub is the one on the loopback address."""

    def __init__(self, hub: MiniHub, folder: Path):
        self.hub, self.folder = hub, folder

    def start(self, *command: str, home: str, token: str | None = None, offline: bool = False):
        kept = {key: value for key, value in os.environ.items() if not key.startswith(("HF_", "PYTHON"))}
        environment = kept | {
            "HF_ENDPOINT": self.hub.url,
            "HF_HOME": str(self.folder / home),
            "HF_HUB_DISABLE_XET": "1",
            "HF_HUB_DISABLE_PROGRESS_BARS": "1",
            # On a slow machine an answer may take longer than the client's 10 seconds.
            "HF_HUB_ETAG_TIMEOUT": "60",
            "HF_HUB_DOWNLOAD_TIMEOUT": "60",
            "OMP_NUM_THREADS": "1",
            **({"HF_TOKEN": token} if token else {}),
            **({"HF_HUB_OFFLINE": "1"} if offline else {}),
        }
        return subprocess.run(
            [sys.executable, *command], cwd=self.folder, env=environment, capture_output=True, text=True
        )

    def python(self, code: str, **surroundings) -> str:
        done = self.start("-c", code, **surroundings)
        assert done.returncode == 0, done.stderr[-3000:]
        return done.stdout

    def moeclip(self, *arguments: str, **surroundings):
        return self.start("-m", "moeclip_hf.cli", *arguments, **surroundings)


EXAMPLE = Path(__file__).parent.parent / "examples" / "push.py"

PUSH = (
    f"EXAMPLE = {str(EXAMPLE)!r}"
    + """
import runpy, sys
import torch
from huggingface_hub import CommitOperationAdd, HfApi
from transformers import CLIPModel
from moeclip_hf import MoECLIPModel, MoECLIPProcessor
from moeclip_hf.adapters import full_to_adapter
from moeclip_hf.hub import push_to_hub
from moeclip_hf.data import load_data
from moeclip_hf.pretrained import Pretrained
from moeclip_hf.training import MoECLIPTrainer, TrainingSamples, get_recipe, start_model, training_arguments

# The classes' own ways, too.
CLIPModel.from_pretrained("clip").push_to_hub("ann/clip")
processor = MoECLIPProcessor.from_pretrained("checkpoint")
processor.push_to_hub("ann/clip")
warmer = CLIPModel.from_pretrained("clip")
torch.nn.init.constant_(warmer.logit_scale, 3.25)
warmer.push_to_hub("ann/clip", revision="warmer")
full = MoECLIPModel.from_pretrained("checkpoint", dtype=torch.float32)
full.push_to_hub("ann/plain")
processor.push_to_hub("ann/plain")

sys.argv = ["push.py", "checkpoint", "ann/example", "--base-model", "ann/clip"]
runpy.run_path(EXAMPLE, run_name="__main__")

adapter = full_to_adapter(full, base="ann/clip", adapter_name="textures")
commit = push_to_hub(Pretrained(adapter, processor), "ann/adapter", commit_message="An adapter")
print(commit.commit_url)
push_to_hub("checkpoint", "ann/secret", private=True)
processor.image_threshold = 0.875
push_to_hub(Pretrained(full, processor), "ann/moeclip", revision="strict")
print(push_to_hub("checkpoint", "ann/plain", create_pr=True).pr_url)

recipe = get_recipe("paper", batch_size=2)
model, images = start_model("ann/plain", recipe)
samples = TrainingSamples(load_data("parts"), images, seed=0)
args = training_arguments("trained", recipe, use_cpu=True, hub_model_id="ann/trained", dataloader_num_workers=0)
MoECLIPTrainer(model, args, samples, images, recipe).push_to_hub()

# What replaces another kind of repository leaves nothing of it.
push_to_hub("checkpoint", "ann/changed")
push_to_hub(Pretrained(adapter, processor), "ann/changed")

# A repository whose code would be noticed, and one whose weights were moved.
api = HfApi()
push_to_hub("checkpoint", "ann/canary")
canary = b"open('canary', 'w').close()"
files = [f for f in api.list_repo_files("ann/canary") if f.endswith(".py")]
api.create_commit("ann/canary", [CommitOperationAdd(f, canary) for f in files], commit_message="canary")
push_to_hub("checkpoint", "ann/moved")
api.delete_file("model.safetensors", "ann/moved")
push_to_hub("checkpoint", "ann/torn")
api.upload_file(path_or_fileobj=b"# Written on the Hub", path_in_repo="README.md", repo_id="ann/torn")
push_to_hub("checkpoint", "ann/torn", license="mit")

# A CLIP from before there were safetensors, to train on.
clip = CLIPModel.from_pretrained("clip")
clip.config.push_to_hub("ann/pickled")
processor.tokenizer.push_to_hub("ann/pickled")
torch.save(clip.state_dict(), "pytorch_model.bin")
api.upload_file(path_or_fileobj="pytorch_model.bin", path_in_repo="pytorch_model.bin", repo_id="ann/pickled")
started, _ = start_model("ann/pickled", recipe)
assert started.name_or_path == "ann/pickled"
assert all(torch.equal(started.state_dict()[name], tensor) for name, tensor in clip.state_dict().items())
"""
)


@pytest.fixture(scope="module")
def workplace(tmp_path_factory):
    """A Hub to which ann has pushed a checkpoint by the command, and all the rest from Python."""
    folder = tmp_path_factory.mktemp("hub")
    model = MoECLIPModel.from_pretrained(EMBEDDED_CHECKPOINT, dtype=torch.float32)
    processor = MoECLIPProcessor.from_pretrained(EMBEDDED_CHECKPOINT)
    for target in (model, processor):
        target.save_pretrained(folder / "checkpoint")
    (folder / "checkpoint" / "recipe.json").write_text(json.dumps({"datasets": ["visa"]}))
    towers = {name: getattr(model.config, name).to_dict() for name in ("text_config", "vision_config")}
    clip = CLIPModel(CLIPConfig(projection_dim=model.config.projection_dim, **towers))
    clip.load_state_dict({key: value for key, value in model.state_dict().items() if key in clip.state_dict()})
    clip.save_pretrained(folder / "clip")
    write_folder(folder / "parts", images_a_state=1)

    pixels = np.random.default_rng(0).normal(150, 8, (48, 64, 3))
    pixels[20:30, 30:45] = 15
    image = Image.fromarray(pixels.clip(0, 255).astype(np.uint8))
    image.save(folder / "part.png")
    with torch.no_grad():
        outputs = model(**processor(images=image, text=["granite"], return_tensors="pt"))
    result = processor.post_process_anomaly_detection(outputs, [(48, 64)])[0]
    np.save(folder / "expected.npy", result["map"].numpy())
    (folder / "expected.json").write_text(json.dumps({"score": result["score"]}))

    with MiniHub(folder / "stored", TOKENS) as hub:
        workplace = Workplace(hub, folder)
        pushed = workplace.moeclip("push", "checkpoint", "ann/moeclip", "--json", home="ann", token="hf_ann")
        assert pushed.returncode == 0, pushed.stderr
        workplace.pushed = json.loads(pushed.stdout)
        workplace.printed = workplace.python(PUSH, home="ann", token="hf_ann").splitlines()
        yield workplace


def test_a_repository_holds_what_a_checkpoint_needs_and_an_adapter_no_code(workplace):
    hub = workplace.hub
    code = {path.name for path in (Path(__file__).parent.parent / "modeling").glob("*_moeclip.py")}
    names = hub.names("ann/moeclip")
    assert names >= code | {"moe_lora.py", "handler.py", "requirements.txt", "model.safetensors", "README.md"}
    assert names >= {"config.json", "processor_config.json", "tokenizer.json"}
    assert workplace.pushed["url"] == f"{hub.url}/ann/moeclip"
    assert workplace.pushed["commit"] in hub.repositories["ann/moeclip"].commits

    adapter = hub.names("ann/adapter")
    assert adapter == {
        "README.md",
        "adapter_config.json",
        "adapter_model.safetensors",
        "processor_config.json",
        "tokenizer.json",
        "tokenizer_config.json",
    }
    assert hub.names("ann/changed") == adapter | {"requirements.txt"}
    assert json.loads(hub.read("ann/adapter", "adapter_config.json"))["base_model_name_or_path"] == "ann/clip"
    card = hub.read("ann/trained", "README.md").decode()
    assert "base_model: ann/plain" in card
    assert "It was trained on parts." in card
    assert "This checkpoint was chosen by: the last of 0 steps." in card
    assert f"| expert learning rate | {get_recipe('paper').expert_learning_rate} |" in card
    assert hub.repositories["ann/secret"].private
    assert not hub.repositories["ann/moeclip"].private
    assert workplace.printed[:2] == [f"{hub.url}/ann/example", f"{hub.url}/ann/example-adapter"]
    assert workplace.printed[2].startswith(f"{hub.url}/ann/adapter/commit/")
    assert hub.names("ann/example") == names
    assert hub.names("ann/example-adapter") == adapter | {"recipe.json"}
    for name in ("ann/example", "ann/example-adapter"):
        assert b"It was trained on visa." in hub.read(name, "README.md")
    assert workplace.printed[-1] == f"{hub.url}/ann/plain/discussions/1"
    assert b"\n# Written on the Hub" in hub.read("ann/torn", "README.md")
    assert b"license: mit" in hub.read("ann/torn", "README.md")
    assert b"More Information Needed" in hub.read("ann/plain", "README.md")
    assert b"More Information Needed" not in hub.read("ann/plain", "README.md", "refs/pr/1")
    assert "handler.py" in hub.names("ann/plain", "refs/pr/1")
    assert "handler.py" not in hub.names("ann/plain")


EQUAL_MAPS = """
import json
import numpy as np, torch
from PIL import Image

image = Image.open("part.png")
expected, expected_score = np.load("expected.npy"), json.load(open("expected.json"))["score"]

def check(result):
    difference = np.abs(np.asarray(result["map"]) - expected).max(), abs(result["score"] - expected_score)
    assert max(difference) < 1e-5, difference

def run(model, processor):
    with torch.no_grad():
        outputs = model(**processor(images=image, text=["granite"], return_tensors="pt"))
    check(processor.post_process_anomaly_detection(outputs, [(48, 64)])[0])
"""


def test_a_fresh_process_with_the_package_loads_all_of_it_and_runs_no_code_of_the_repository(workplace):
    workplace.python(
        EQUAL_MAPS
        + """
import sys
from pathlib import Path
import moeclip_hf
from transformers import AutoModel, AutoProcessor, pipeline
from moeclip_hf.pretrained import load_pretrained

for name in ("ann/moeclip", "ann/plain", "ann/trained", "ann/canary"):
    run(AutoModel.from_pretrained(name), AutoProcessor.from_pretrained(name))
    detect = pipeline("zero-shot-anomaly-detection", model=name)
    assert type(detect).__module__.startswith("moeclip_hf.")
    check(detect("part.png", class_name="granite"))
for name in ("ann/moeclip", "ann/adapter", "ann/example-adapter", "ann/changed", "ann/canary"):
    loaded = load_pretrained(name, device="cpu")
    assert loaded.model.config.name_or_path == name
    run(*loaded)
[auto.from_pretrained("ann/moeclip").save_pretrained("kept") for auto in (AutoModel, AutoProcessor)]
named = {file.name for file in Path("kept").glob("*.json") if "moeclip." in file.read_text()}
assert not named and not list(Path("kept").glob("*.py")), named  # code that is not there is not asked for
assert load_pretrained("ann/moeclip").processor.image_threshold < 0.875
strict = load_pretrained("ann/moeclip", revision="strict")
assert strict.processor.image_threshold == 0.875
assert strict.model.config._commit_hash != loaded.model.config._commit_hash
run(*strict)
assert not Path("canary").exists()
assert not any("transformers_modules" in name for name in sys.modules)
""",
        home="bob",
    )


def test_a_fresh_process_without_the_package_runs_the_repositorys_code_and_handler_once_they_are_trusted(workplace):
    workplace.python(
        WITHOUT_PACKAGE
        + EQUAL_MAPS
        + """
import base64, io, sys
from pathlib import Path
from huggingface_hub import snapshot_download
from transformers import AutoModel, AutoProcessor, pipeline

for load in (
    lambda: AutoModel.from_pretrained("ann/canary"),
    lambda: AutoProcessor.from_pretrained("ann/canary"),
    lambda: pipeline("zero-shot-anomaly-detection", model="ann/canary"),
    lambda: AutoModel.from_pretrained("ann/canary", trust_remote_code=False),
):
    try:
        load()
    except ValueError as error:
        assert "trust_remote_code=True" in str(error), error
    else:
        raise AssertionError("the repository's code was run")
assert not Path("canary").exists()

trusted = {"trust_remote_code": True}
loaded = [auto.from_pretrained("ann/moeclip", **trusted) for auto in (AutoModel, AutoProcessor)]
run(*loaded)
[part.save_pretrained("parts") for part in loaded]  # before the pipeline's code was used
check(pipeline("zero-shot-anomaly-detection", model="parts", **trusted)(image, class_name="granite"))
detect = pipeline("zero-shot-anomaly-detection", model="ann/moeclip", **trusted)
check(detect("part.png", class_name="granite"))
batched = detect(["part.png", image, {"image": image, "class_name": "granite"}], class_name="granite", batch_size=2)
[check(result) for result in batched]
check(pipeline(model="ann/moeclip", **trusted)(image, class_name="granite"))
detect.save_pretrained("saved")
check(pipeline("zero-shot-anomaly-detection", model="saved", **trusted)(image, class_name="granite"))

# Inference Endpoints import `handler` from the repository's folder.
folder = snapshot_download("ann/moeclip")
sys.path.insert(0, folder)
from handler import EndpointHandler

serve = EndpointHandler(folder)
data = open("part.png", "rb").read()
encoded = base64.b64encode(data).decode()
request = {"inputs": encoded, "parameters": {"class_name": "granite", "return_heatmap": True, "threshold": 0.01}}
answer = json.loads(json.dumps(serve(request)))
assert abs(answer["score"] - expected_score) < 1e-5
assert answer["is_anomalous"] is True and (answer["width"], answer["height"]) == (64, 48)
heatmap = np.asarray(Image.open(io.BytesIO(base64.b64decode(answer["heatmap"]))))
assert np.abs(heatmap / 255 - expected).max() < 1 / 255
several = serve({"inputs": [data, image, "data:image/png;base64," + encoded], "parameters": {"class_name": "granite"}})
assert all(abs(one["score"] - expected_score) < 1e-5 and "heatmap" not in one for one in several)
assert "moeclip_hf" not in sys.modules
""",
        home="carl",
    )


def test_the_command_scores_images_with_a_checkpoint_of_the_hub_which_then_loads_without_the_hub(workplace):
    which = ("--model", "ann/moeclip", "--revision", "strict")
    done = workplace.moeclip("predict", "part.png", *which, "--class-name", "granite", "--json", home="dora")
    assert done.returncode == 0, done.stderr
    expected = json.loads((workplace.folder / "expected.json").read_text())["score"]
    row = json.loads(done.stdout)
    assert row["score"] == pytest.approx(expected, abs=1e-5)
    assert row["threshold"] == 0.875
    asked = len(workplace.hub.requests)
    printed = workplace.python(
        EQUAL_MAPS
        + """
from moeclip_hf.errors import CheckpointError
from moeclip_hf.pretrained import load_pretrained

run(*load_pretrained("ann/moeclip", device="cpu", revision="strict"))
try:
    load_pretrained("ann/plain")
except CheckpointError as error:
    print(error)
""",
        home="dora",
        offline=True,
    )
    assert printed == "ann/plain: the Hub is not asked while HF_HUB_OFFLINE is set, and the cache has no copy.\n"
    assert len(workplace.hub.requests) == asked


def test_a_clip_is_converted_at_the_revision_that_is_told(workplace):
    which = ("--clip", "ann/clip", "--revision", "warmer", "--output", "converted")
    done = workplace.moeclip("convert", "openai", *which, home="dora")
    assert done.returncode == 0, done.stderr
    assert CLIPModel.from_pretrained(workplace.folder / "converted").logit_scale.item() == 3.25
    assert MoECLIPProcessor.from_pretrained(workplace.folder / "converted").tokenizer("granite").input_ids


REFUSALS = """
import json, os
from moeclip_hf.errors import MoECLIPError
from moeclip_hf.hub import push_to_hub
from moeclip_hf.pretrained import load_pretrained

told = {"load": [], "push": []}

def attempt(kind, call, *arguments, token=None, **settings):
    os.environ.pop("HF_TOKEN", None)
    if token:
        os.environ["HF_TOKEN"] = token
    try:
        call(*arguments, **settings)
    except MoECLIPError as error:
        told[kind].append(str(error))
    else:
        told[kind].append("done")

def load(name, **settings):
    attempt("load", load_pretrained, name, device="cpu", **settings)

def push(*arguments, **settings):
    attempt("push", push_to_hub, *arguments, **settings)

load("ann/nothing")
load("not/a/repository")
load("ann/secret")
load("ann/secret", token="hf_bob")
load("ann/secret", token="hf_wrong")
load("ann/secret", token="hf_ann")
load("ann/moeclip", revision="v9")
load("ann/moved")
load("ann/torn")

push("checkpoint", "ann/new")
push("checkpoint", "ann/new", token="hf_wrong")
push("checkpoint", "ann/new", token="hf_bob")
push("checkpoint", "ann/moeclip", token="hf_bob")
push("clip", "ann/new", token="hf_ann")
push("checkpoint", "new", token="hf_ann")
push("nowhere", "ann/new", token="hf_ann")
push("checkpoint", "ann/new", token="hf_ann", base_model="clip")
print(json.dumps(told))
"""


@pytest.fixture(scope="module")
def refusals(workplace):
    """What was told of attempts to load and to push that cannot succeed."""
    workplace.hub.cut.add("ann/torn/model.safetensors")
    before = set(workplace.hub.repositories)
    told = json.loads(workplace.python(REFUSALS, home="eve"))
    assert set(workplace.hub.repositories) == before
    return told


def test_what_cannot_be_loaded_is_told_with_the_reason(workplace, refusals):
    log_in = "If it is private, log in with `hf auth login`, or set HF_TOKEN."
    assert refusals["load"] == [
        f"ann/nothing: no such folder, and no such repository on the Hub. {log_in}",
        "not/a/repository: no such folder, and no id of a Hub repository (USER/NAME).",
        f"ann/secret: no such folder, and no such repository on the Hub. {log_in}",
        f"ann/secret: no such folder, and no such repository on the Hub. {log_in}",
        "ann/secret: the Hub asks for a valid token: log in with `hf auth login`, or set HF_TOKEN.",
        "done",
        "ann/moeclip: has no revision 'v9'.",
        "ann/moved: is no complete checkpoint: it has no model.safetensors, which may have been moved.",
        f"ann/torn: the connection to {workplace.hub.url} failed: try again.",
    ]


def test_people_are_told_where_a_push_went_and_that_a_pull_request_was_opened(tmp_path, monkeypatch, command):
    url = "https://hub/ann/it"
    commit = CommitInfo(f"{url}/commit/0", "", "", "0", "https://hub")
    request = CommitInfo(f"{url}/commit/0", "", "", "0", "https://hub", f"{url}/discussions/1")
    monkeypatch.setattr("moeclip_hf.hub.push_to_hub", lambda *given, create_pr, **kw: request if create_pr else commit)
    _, printed, _ = command("push", tmp_path, "ann/it", "--create-pr")
    assert printed.decode() == f"Opened a pull request: {url}/discussions/1\n"
    _, printed, _ = command("push", tmp_path, "ann/it")
    assert printed.decode().startswith(f"Pushed to {url}\nTry it: ")


def test_what_cannot_be_pushed_is_told_with_the_reason_and_nothing_is_made(refusals):
    no_right = "the token has no right to do this: take one that has."
    assert refusals["push"] == [
        "ann/new: the Hub asks for a valid token: log in with `hf auth login`, or set HF_TOKEN.",
        "ann/new: the Hub asks for a valid token: log in with `hf auth login`, or set HF_TOKEN.",
        f"ann/new: {no_right}",
        f"ann/moeclip: {no_right}",
        "clip: is no complete checkpoint: it has no processor_config.json, which may have been moved.",
        "'new' lacks its owner: name it USER/new.",
        "nowhere: no such folder of a checkpoint or an adapter.",
        "base model 'clip' is no Hub id (USER/NAME) by which others can load it.",
    ]
