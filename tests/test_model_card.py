"""What `moeclip push` writes: the model card above all, which tells nothing that was not measured or recorded."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from PIL import Image
from safetensors.torch import load_file, save_file
from training_runs import write_folder
from typer.testing import CliRunner

from moeclip_hf import MoECLIPModel
from moeclip_hf.adapters import full_to_adapter
from moeclip_hf.cli import app
from moeclip_hf.data import load_data
from moeclip_hf.errors import CheckpointError, PublishingError
from moeclip_hf.evaluation import evaluate, write_reports
from moeclip_hf.evaluation.protocol import provenance
from moeclip_hf.hub import repository_files, write_repository
from moeclip_hf.model_card import BEGIN, END, CardFacts
from moeclip_hf.pretrained import EMBEDDED_CHECKPOINT, Pretrained, load_pretrained
from moeclip_hf.training.recipes import describe_recipe, get_recipe


@pytest.fixture(scope="module")
def pretrained() -> Pretrained:
    return load_pretrained(device="cpu")


@pytest.fixture
def checkpoint(tmp_path) -> Path:
    """The embedded one, without its card."""
    shutil.copytree(EMBEDDED_CHECKPOINT, tmp_path / "checkpoint")
    (tmp_path / "checkpoint" / "README.md").unlink()
    return tmp_path / "checkpoint"


@pytest.fixture(scope="module")
def results(pretrained, tmp_path_factory) -> Path:
    """The results.json of an evaluation: a data set with both kinds of images, and one without normal ones."""
    folder = tmp_path_factory.mktemp("evaluation")
    write_folder(folder / "parts", images_a_state=2)
    shutil.copytree(folder / "parts", folder / "polyps")
    polyps = load_data(folder / "polyps", domain="medical")
    polyps = polyps.select([index for index, label in enumerate(polyps["label"]) if label == 1])
    found = [evaluate(pretrained, rows, image_size=32) for rows in (load_data(folder / "parts"), polyps)]
    write_reports(found, provenance(pretrained), folder)
    return folder / "results.json"


def push(*arguments: str | Path, **settings):
    return CliRunner().invoke(app, ["push", *map(str, arguments)], **settings)


def written(source, tmp_path, **facts) -> tuple[dict, str]:
    """Metadata and text of the card in the repository that is written."""
    shutil.rmtree(tmp_path / "repository", ignore_errors=True)
    write_repository(source, tmp_path / "repository", "ann/moeclip", **facts)
    _, metadata, text = (tmp_path / "repository" / "README.md").read_text().split("---\n", 2)
    return yaml.safe_load(metadata), text


def test_a_card_tells_what_is_known_and_says_what_is_not(checkpoint, tmp_path):
    (checkpoint / "recipe.json").unlink()
    metadata, text = written(checkpoint, tmp_path)
    assert metadata["library_name"] == "transformers"
    assert metadata["pipeline_tag"] == "image-segmentation"
    assert {"moeclip", "zero-shot-anomaly-detection"} <= set(metadata["tags"])
    assert not {"base_model", "base_model_relation", "datasets", "license", "model-index"} & set(metadata)
    for unknown in (
        "Which CLIP it was made from is not recorded.",
        "What it was trained on is not recorded.",
        "By what rule this checkpoint was chosen among others is not recorded.",
        "Nor is the recipe.",
        "No evaluation was published with this repository.",
    ):
        assert unknown in text
    assert "AUROC" not in text
    config = json.loads((checkpoint / "config.json").read_text())
    assert f"| experts | {config['num_experts']} of rank {config['lora_rank']}, 2 a token |" in text
    thresholds = json.loads((checkpoint / "processor_config.json").read_text())
    assert f"({thresholds['image_threshold']:.4g} for images" in text
    assert "moeclip predict photos/" in text
    assert "@inproceedings" in text


def test_recipe_base_and_data_are_told_where_they_are_known(checkpoint, tmp_path):
    recipe = describe_recipe(get_recipe("paper")) | {"seed": 3, "selection": "the last of the run"}
    (checkpoint / "recipe.json").write_text(json.dumps(recipe))
    metadata, text = written(
        checkpoint, tmp_path, base_model="openai/clip", datasets=["ann/visa", "mvtec"], license="mit"
    )
    assert (metadata["base_model"], metadata["base_model_relation"]) == ("openai/clip", "finetune")
    assert metadata["datasets"] == ["ann/visa", "mvtec"]
    assert metadata["license"] == "mit"
    assert "This checkpoint was chosen by: the last of the run." in text
    assert "| halve at | 16000, 32000 |" in text
    assert "| seed | 3 |" in text
    assert "not recorded" not in text
    assert (tmp_path / "repository" / "recipe.json").exists()


def test_what_a_run_recorded_is_told_without_options_and_a_folder_is_no_hub_id(checkpoint, tmp_path):
    recorded = {"base_model": "openai/clip", "datasets": ["visa"], "selection": "the last step", "seed": 3}
    (checkpoint / "recipe.json").write_text(json.dumps(recorded))
    metadata, text = written(checkpoint, tmp_path)
    assert (metadata["base_model"], metadata["base_model_relation"]) == ("openai/clip", "finetune")
    assert metadata["datasets"] == ["visa"]
    assert "Its CLIP is that of [openai/clip](https://huggingface.co/openai/clip). It was trained on visa." in text
    assert [line for line in text.splitlines() if "seed" in line or "datasets" in line] == ["| seed | 3 |"]
    metadata, _ = written(checkpoint, tmp_path, base_model="laion/clip", datasets=["ann/visa"])
    assert (metadata["base_model"], metadata["datasets"]) == ("laion/clip", ["ann/visa"])

    (checkpoint / "recipe.json").write_text(json.dumps(recorded | {"base_model": "my-clip"}))
    metadata, text = written(checkpoint, tmp_path)
    assert not {"base_model", "base_model_relation"} & set(metadata)
    assert "Its CLIP is that of `my-clip`, which is not on the Hub." in text


def test_figures_are_those_of_the_evaluation_and_undefined_ones_are_left_out(checkpoint, results, tmp_path):
    document = json.loads(results.read_text())
    metadata, text = written(checkpoint, tmp_path, evaluation=results)
    (index,) = metadata["model-index"]
    assert index["name"] == "moeclip"
    published = {
        (entry["dataset"]["type"], metric["type"]): metric["value"]
        for entry in index["results"]
        for metric in entry["metrics"]
    }
    measured = {
        (found["dataset"], name): value
        for found in document["datasets"]
        for name, value in found["metrics"].items()
        if value is not None
    }
    assert published == measured
    assert ("polyps", "image_auroc") not in published
    assert index["results"][0]["dataset"]["name"] == "parts (4 normal, 4 anomalous images)"
    parts = document["datasets"][0]["metrics"]
    row = next(line for line in text.splitlines() if line.startswith("| parts |"))
    assert [f"{100 * value:.1f}" for value in parts.values()] == row.replace("|", " ").split()[2:]
    assert "—" in next(line for line in text.splitlines() if line.startswith("| polyps |"))


def test_an_evaluation_of_another_model_or_of_something_else_is_refused(checkpoint, results, pretrained, tmp_path):
    other = MoECLIPModel.from_pretrained(EMBEDDED_CHECKPOINT, dtype=torch.float32)
    with torch.no_grad():
        other.moe_layers[0].lora_B[0, 0] += 0.01
    with pytest.raises(CheckpointError, match=r"was measured with another model than .* holds \(weights "):
        written(Pretrained(other, pretrained.processor), tmp_path, evaluation=results)
    stronger = MoECLIPModel.from_pretrained(EMBEDDED_CHECKPOINT, dtype=torch.float32, residual_weight=0.3)
    with pytest.raises(CheckpointError, match=r"\(residual_weight 0.03, not 0.3\): evaluate this one"):
        written(Pretrained(stronger, pretrained.processor), tmp_path, evaluation=results)
    (tmp_path / "other.json").write_text("{}")
    for path, words in ((tmp_path / "other.json", "is not the results.json"), (tmp_path / "gone", "no such file")):
        with pytest.raises(CheckpointError, match=words):
            written(checkpoint, tmp_path, evaluation=path)


def test_a_card_of_the_users_keeps_its_text_and_metadata(checkpoint, results, tmp_path):
    body = "\n# Screws\n\nMine. ![Me](me.png) [It](./config.json)\n"
    own = f"---\nlicense: mit\ntags: screws\npipeline_tag: mask-generation\n---\n{body}"
    (checkpoint / "README.md").write_text(own)
    Image.new("RGB", (4, 4)).save(checkpoint / "me.png")
    (tmp_path / "secret.txt").write_text("not for the Hub")
    (checkpoint / "notes.txt").write_text("nor this")
    metadata, text = written(checkpoint, tmp_path, evaluation=results)
    assert text == body
    assert "auto_map" in (tmp_path / "repository" / "config.json").read_text()
    assert metadata["license"] == "mit"
    assert metadata["tags"][0] == "screws"
    assert metadata["pipeline_tag"] == "mask-generation"
    assert metadata["library_name"] == "transformers"
    assert metadata["model-index"]
    assert (tmp_path / "repository" / "me.png").exists()
    assert not (tmp_path / "repository" / "notes.txt").exists()
    (checkpoint / "README.md").write_text(f"{own}\n[up](../secret.txt)\n")
    written(checkpoint, tmp_path)
    assert "secret.txt" not in {path.name for path in (tmp_path / "repository").rglob("*")}


@pytest.mark.parametrize(
    ("link", "name"),
    [
        ("![a](a%20b.png)", "a b.png"),
        ("![a](<a b.png>)", "a b.png"),
        ('![t](t.png "title")', "t.png"),
        ("[c]( ok.png )", "ok.png"),
        ("[![c](t.png)](Papers/it.PDF#page=2)", "Papers/it.PDF"),
        ("[c](it(1).png)", "it(1).png"),
        ("[c][1]\n\n[1]: ./ok.png", "ok.png"),
        ('<img width="4" src="h.png">', "h.png"),
        ("<IMG alt='it' src=h.png>", "h.png"),
        ("<a href='a b.png'>it</a>", "a b.png"),
        ("![link to a picture](link.png)", "link.png"),
    ],
)
def test_a_picture_is_published_however_the_folders_card_shows_it(checkpoint, tmp_path, link, name):
    (checkpoint / "README.md").write_text(f"Mine: {link}\n")
    (checkpoint / "Papers").mkdir()
    (checkpoint / "picture.png").touch()
    (checkpoint / "link.png").symlink_to("picture.png")
    (checkpoint / name).write_bytes(b"a picture")
    written(checkpoint, tmp_path)
    assert (tmp_path / "repository" / name).read_bytes() == b"a picture"


@pytest.mark.parametrize("name", [".env", ".notes.txt", ".git/it.md", "keys.json", "optimizer.pt", "data.csv"])
def test_a_card_publishes_pictures_and_documents_alone(checkpoint, tmp_path, name):
    (checkpoint / "README.md").write_text(
        f"[it]({name}) [far](http://[) [no](%00.png) [long]({'a' * 300}.png) [](/)\n"
    )
    (checkpoint / ".git").mkdir()
    (checkpoint / name).write_bytes(b"mine")
    written(checkpoint, tmp_path)
    assert not (tmp_path / "repository" / name).exists()


def test_the_card_of_a_repository_does_not_say_which_files_of_the_disk_are_published(checkpoint):
    (checkpoint / "notes.txt").write_text("mine")
    card = "# Somebody's\n\n[notes](notes.txt)\n"
    files = repository_files(checkpoint, "ann/moeclip", CardFacts(), card)
    assert card.encode() in files["README.md"]
    assert "notes.txt" not in files
    (checkpoint / "README.md").write_text(card)
    assert "notes.txt" in repository_files(checkpoint, "ann/moeclip", CardFacts())


def test_what_stands_outside_of_the_marks_stays_and_the_rest_is_written_anew(checkpoint, results, tmp_path):
    (checkpoint / "README.md").write_text(f"# Mine\n\n{BEGIN}\nold\n{END}\n\nMine, too.\n")
    _, text = written(checkpoint, tmp_path)
    assert text.startswith("\n# Mine\n\n<!-- moeclip")
    assert text.endswith(f"{END}\n\nMine, too.\n")
    assert "old\n" not in text
    assert "No evaluation was published" in text
    shutil.copy(tmp_path / "repository" / "README.md", checkpoint)
    _, again = written(checkpoint, tmp_path, evaluation=results)
    assert again.count("# Mine") == 1
    assert "No evaluation was published" not in again
    assert "| parts |" in again


def test_figures_of_an_earlier_push_go_with_their_weights_and_those_of_the_user_stay(checkpoint, results, tmp_path):
    first, _ = written(checkpoint, tmp_path, evaluation=results)
    assert first["model-index"]
    published = (tmp_path / "repository" / "README.md").read_text()
    (checkpoint / "README.md").write_text(published)
    assert "model-index" not in written(checkpoint, tmp_path)[0]
    (checkpoint / "README.md").write_text(published.replace(BEGIN, "").replace(END, ""))
    assert written(checkpoint, tmp_path)[0]["model-index"] == first["model-index"]
    (checkpoint / "README.md").unlink()
    files = repository_files(checkpoint, "ann/moeclip", CardFacts(), published.replace(BEGIN, "").replace(END, ""))
    assert b"model-index" not in files["README.md"]


@pytest.mark.parametrize("metadata", ["model-index: wrong", "license: [mit", "just a line"])
def test_a_card_whose_metadata_cannot_be_read_is_told(checkpoint, tmp_path, metadata):
    (checkpoint / "README.md").write_text(f"---\n{metadata}\n---\n# Mine\n")
    with pytest.raises(CheckpointError, match=r"metadata of its README\.md cannot be read"):
        written(checkpoint, tmp_path)


@pytest.mark.parametrize("name", ["config.json", "processor_config.json", "recipe.json"])
def test_a_damaged_file_is_named(checkpoint, tmp_path, name):
    faults = {
        "{": "cannot be read as JSON",
        "[]": "holds no settings but a list",
        "[" * 100_000: "cannot be read as JSON",
    }
    for damaged, words in faults.items():
        (checkpoint / name).write_text(damaged)
        with pytest.raises(CheckpointError, match=rf"{name}: {words}"):
            written(checkpoint, tmp_path)


@pytest.mark.parametrize(
    ("name", "settings", "words"),
    [
        ("recipe.json", {"base_model": 5}, r"recipe\.json: base_model \(5\) is no name of a model: mend it"),
        ("recipe.json", {"datasets": 5}, r"recipe\.json: datasets \(5\) is no list of names: mend it"),
        ("recipe.json", {"datasets": ["visa", 5]}, r"recipe\.json: datasets \(\['visa', 5\]\) is no list of names"),
        ("processor_config.json", {"image_processor": None}, "has no processor of a MoECLIP: save it there"),
    ],
)
def test_settings_of_another_kind_are_told_with_their_file_and_remedy(checkpoint, tmp_path, name, settings, words):
    document = json.loads((checkpoint / name).read_text())
    (checkpoint / name).write_text(json.dumps(document | settings))
    with pytest.raises(CheckpointError, match=words):
        written(checkpoint, tmp_path)


def test_the_card_tells_the_size_that_a_processor_leaves_to_its_default(checkpoint, tmp_path):
    document = json.loads((checkpoint / "processor_config.json").read_text())
    del document["image_processor"]["size"]
    (checkpoint / "processor_config.json").write_text(json.dumps(document))
    size = load_pretrained(checkpoint, device="cpu").processor.image_processor.size["height"]
    assert f"| input | {size} x {size} pixels |" in written(checkpoint, tmp_path)[1]


def test_weights_are_published_that_would_be_loaded_and_no_others(checkpoint, pretrained, tmp_path):
    (checkpoint / "model-00001-of-00002.safetensors").write_bytes(b"left by an earlier save")
    written(checkpoint, tmp_path)
    published = {path.name for path in (tmp_path / "repository").glob("model*.safetensors*")}
    assert published == {"model.safetensors"}
    pretrained.model.save_pretrained(tmp_path / "parts", max_shard_size="1MB")
    pretrained.processor.save_pretrained(tmp_path / "parts")
    saved = {path.name for path in (tmp_path / "parts").glob("model*.safetensors*")}
    assert len(saved) > 2
    written(tmp_path / "parts", tmp_path)
    assert {path.name for path in (tmp_path / "repository").glob("model*.safetensors*")} == saved
    load_pretrained(tmp_path / "repository", device="cpu")


@pytest.mark.parametrize("kind", ["whole", "in parts", "adapter"])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_weights_that_are_not_finite_are_not_published(pretrained, tmp_path, kind, value):
    folder = tmp_path / "rotten"
    model = full_to_adapter(pretrained.model, base="openai/clip") if kind == "adapter" else pretrained.model
    model.save_pretrained(folder, **({"max_shard_size": "1MB"} if kind == "in parts" else {}))
    pretrained.processor.save_pretrained(folder)
    *_, last = sorted(folder.glob("*.safetensors"))
    tensors = load_file(last)
    name = min(tensors)
    tensors[name].view(-1)[-1] = value
    save_file(tensors, last, {"format": "pt"})
    with pytest.raises(CheckpointError, match=rf"rotten: holds NaN or infinity: 1 non-finite \({name}\)\.$"):
        written(folder, tmp_path)
    assert not (tmp_path / "repository").exists()


def test_an_adapter_names_its_base_and_replaces_the_template_that_peft_left(pretrained, tmp_path):
    adapter = full_to_adapter(pretrained.model, base="openai/clip")
    adapter.save_pretrained(tmp_path / "adapter")
    pretrained.processor.save_pretrained(tmp_path / "adapter")
    assert "More Information Needed" in (tmp_path / "adapter" / "README.md").read_text()
    metadata, text = written(tmp_path / "adapter", tmp_path)
    assert metadata["library_name"] == "peft"
    assert (metadata["base_model"], metadata["base_model_relation"]) == ("openai/clip", "adapter")
    assert "More Information Needed" not in text
    assert "load_pretrained" in text
    assert "trust_remote_code" not in text
    names = {path.name for path in (tmp_path / "repository").iterdir()}
    assert not {name for name in names if name.endswith(".py")} | ({"config.json", "requirements.txt"} & names)
    config = json.loads((tmp_path / "repository" / "adapter_config.json").read_text())
    assert "custom_pipelines" not in config

    full_to_adapter(pretrained.model, base=str(tmp_path)).save_pretrained(tmp_path / "adapter")
    with pytest.raises(CheckpointError, match="which others cannot load: name that CLIP's Hub id"):
        written(tmp_path / "adapter", tmp_path)
    metadata, _ = written(tmp_path / "adapter", tmp_path, base_model="openai/clip")
    assert metadata["base_model"] == "openai/clip"


@pytest.mark.parametrize(("told", "revision"), [(None, "v1"), ("ann/clip", "v1"), ("ann/other", None)])
def test_the_revision_of_a_base_goes_when_another_base_is_named(pretrained, tmp_path, told, revision):
    adapter = full_to_adapter(pretrained.model, base="ann/clip")
    adapter.peft_config["default"].revision = "v1"
    adapter.save_pretrained(tmp_path)
    pretrained.processor.save_pretrained(tmp_path)
    files = repository_files(tmp_path, "ann/adapter", CardFacts(base_model=told))
    published = json.loads(files["adapter_config.json"])
    assert (published["base_model_name_or_path"], published["revision"]) == (told or "ann/clip", revision)


def test_what_is_no_moeclip_is_refused(checkpoint, pretrained, tmp_path):
    config = json.loads((checkpoint / "config.json").read_text())
    (checkpoint / "config.json").write_text(json.dumps(config | {"model_type": "clip"}))
    with pytest.raises(CheckpointError, match=r"is no MoECLIP: its config\.json is of type 'clip'"):
        written(checkpoint, tmp_path)
    (checkpoint / "config.json").write_text(json.dumps(config | {"num_experts_per_tok": 9}))
    with pytest.raises(CheckpointError, match=r"config\.json: num_experts_per_tok \(9\)"):
        written(checkpoint, tmp_path)
    with pytest.raises(CheckpointError, match="no such folder"):
        written(tmp_path / "nowhere", tmp_path)
    with pytest.raises(PublishingError, match=r"no id of a Hub repository: name it USER/NAME"):
        write_repository(checkpoint, tmp_path / "repository", "a/b/c")
    (tmp_path / "filled").mkdir()
    (tmp_path / "filled" / "file").touch()
    with pytest.raises(CheckpointError, match="not an empty folder"):
        write_repository(EMBEDDED_CHECKPOINT, tmp_path / "filled", "ann/moeclip")


def test_a_written_repository_scores_as_the_checkpoint_does(pretrained, tmp_path):
    write_repository(EMBEDDED_CHECKPOINT, tmp_path / "repository", "ann/moeclip")
    again = load_pretrained(tmp_path / "repository", device="cpu")
    image = Image.fromarray(np.random.default_rng(0).integers(0, 255, (40, 60, 3), dtype=np.uint8))
    maps = []
    for model, processor in (pretrained, again):
        with torch.no_grad():
            outputs = model(**processor(images=image, text=["wood"], return_tensors="pt"))
        maps.append(processor.post_process_anomaly_detection(outputs, [(40, 60)])[0]["map"])
    assert torch.equal(*maps)
    published = json.loads((tmp_path / "repository" / "config.json").read_text())
    assert published.pop("auto_map")["AutoModel"] == "modeling_moeclip.MoECLIPModel"
    assert set(published.pop("custom_pipelines")) == {"zero-shot-anomaly-detection"}
    assert published == json.loads((EMBEDDED_CHECKPOINT / "config.json").read_text())
    # The task is registered, so the code beside the checkpoint has nothing to do with it.
    assert not hasattr(again.model.config, "custom_pipelines")


def test_a_dry_run_writes_and_lists_the_repository(checkpoint, results, tmp_path):
    arguments = (checkpoint, "ann/moeclip", "--dry-run", tmp_path / "out", "--evaluation", results)
    printed = json.loads(push(*arguments, "--dataset", "visa", "--dataset", "mvtec", "--json").stdout)
    on_disk = {path.name: path.stat().st_size for path in (tmp_path / "out").iterdir()}
    assert printed["files"] == on_disk
    assert {"README.md", "model.safetensors", "handler.py", "pipeline_moeclip.py"} <= set(on_disk)
    shutil.rmtree(tmp_path / "out")
    table = push(*arguments)
    assert table.exit_code == 0
    assert "pipeline_moeclip.py" in table.stdout
    assert "nothing was pushed" in table.stdout
    assert push(*arguments, "--private").exit_code == 2
    assert push(checkpoint).exit_code == 2
