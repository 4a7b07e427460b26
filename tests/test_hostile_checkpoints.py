"""Checkpoints that lie: each is refused by name in one line, soon, and nothing of it is run."""

import io
import json
import shutil
import struct
from pathlib import Path
from typing import Any

import pytest
import torch
from huggingface_hub import constants
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file
from spoiled_models import (
    ADAPTER_WEIGHTS,
    HUGE,
    PROJECTION,
    WEIGHTS,
    Spoil,
    assert_told,
    config,
    content,
    indexed_outside,
    linked_out,
    linked_to,
    pipe,
    processor,
    settings,
    weights,
)

from moeclip_hf import MoECLIPModel
from moeclip_hf.adapters import full_to_adapter, load_adapter
from moeclip_hf.errors import CheckpointError
from moeclip_hf.hub import write_repository
from moeclip_hf.pretrained import EMBEDDED_CHECKPOINT, fetch_adapter, fetch_checkpoint, fetch_clip, load_pretrained
from moeclip_hf.training.recipes import get_recipe
from moeclip_hf.training.run import start_model

pytestmark = pytest.mark.usefixtures("bounded_memory")


def adapter_beside(**changes: Any) -> Spoil:
    """Lay a LoRA beside a model, where transformers would load it unasked."""

    def spoil(folder: Path) -> None:
        made = folder.parent / "lora"
        model = MoECLIPModel.from_pretrained(folder)
        get_peft_model(model, LoraConfig(r=2, target_modules=["q_proj"])).save_pretrained(made)
        for file in ("adapter_config.json", ADAPTER_WEIGHTS):
            (made / file).rename(folder / file)
        settings("adapter_config.json", **changes)(folder)

    return spoil


def saved_in_parts_since(folder: Path) -> None:
    """Lay newer weights beside old ones, as transformers' `save_pretrained(max_shard_size=...)` does."""
    shutil.copy(folder / WEIGHTS, folder / "model-00001-of-00001.safetensors")
    index = {
        "metadata": {},
        "weight_map": dict.fromkeys(load_file(folder / WEIGHTS), "model-00001-of-00001.safetensors"),
    }
    (folder / f"{WEIGHTS}.index.json").write_text(json.dumps(index))


BOTH = r"holds both config\.json, of a model, and adapter_config\.json, of an adapter: put the adapter's files"

CHECKPOINTS: dict[str, tuple[Spoil, str]] = {
    # Weights
    "NaN": (weights(lambda t: t[PROJECTION].fill_(float("nan"))), rf"1 non-finite \({PROJECTION}\)"),
    "infinity": (weights(lambda t: t["logit_scale"].fill_(float("inf"))), r"1 non-finite \(logit_scale\)"),
    "an extra weight": (weights(lambda t: t.update(extra=torch.zeros(3))), r"1 unknown \(extra\)"),
    "a missing weight": (weights(lambda t: t.pop(PROJECTION)), rf"lacks 1 of MoECLIP's weights \({PROJECTION}"),
    "a misshapen weight": (
        weights(lambda t: t.update({PROJECTION: torch.zeros(3, 3)})),
        rf"1 misshapen \({PROJECTION}: \(3, 3\), not \(\d+, \d+\)\)",
    ),
    "whole numbers": (
        weights(lambda t: t.update({PROJECTION: torch.zeros(t[PROJECTION].shape, dtype=torch.int8)})),
        r"1 of another type",
    ),
    "a file cut short": (content(WEIGHTS, lambda b: b[:5000]), "damaged or cut short"),
    "an empty file": (content(WEIGHTS, lambda b: b""), "damaged or cut short"),
    "a header that lies": (content(WEIGHTS, lambda b: struct.pack("<Q", 1 << 40) + b[8:]), "damaged or cut short"),
    "a shard elsewhere": (indexed_outside, r"names '\.\./outside-model.safetensors', which is not in its own folder"),
    "a part without its index": (
        lambda folder: (folder / WEIGHTS).rename(folder / "model-00001-of-00002.safetensors"),
        r"holds no weights: model\.safetensors is missing",
    ),
    "weights of two saves": (
        saved_in_parts_since,
        r"twice, in model\.safetensors and in the files of model\.safetensors\.index\.json: delete those",
    ),
    # Sizes that would take gigabytes, or hours
    "a huge vocabulary": (config(text_config__vocab_size=HUGE), r"vocab_size \(1000000000\)"),
    "a likely vocabulary that is not there": (
        config(text_config__vocab_size=1 << 20),
        r"1 misshapen \(text_model\.embeddings\.token_embedding",
    ),
    "a huge width": (config(vision_config__hidden_size=HUGE), r"hidden_size \(1000000000\)"),
    "a huge depth": (config(vision_config__num_hidden_layers=HUGE), r"num_hidden_layers \(1000000000\)"),
    "a likely depth that is not there": (config(text_config__num_hidden_layers=999), "asks for 999 blocks"),
    "huge images": (config(vision_config__image_size=HUGE), r"image_size \(1000000000\)"),
    "a huge rank": (config(lora_rank=HUGE, use_fofs=False), r"lora_rank \(1000000000\)"),
    "a million experts": (config(num_experts=10**6, use_fofs=False), r"num_experts \(1000000\)"),
    "a huge window": (config(aggregation_sizes=[1, 2**40 + 1]), r"at most 255 patches"),
    "thousands of windows": (config(aggregation_sizes=list(range(1, 20_001, 2))), "at most 255 patches"),
    # Numbers that no model can have, or only one that answers NaN
    "a negative width": (config(vision_config__hidden_size=-128), r"hidden_size \(-128\)"),
    "no heads": (config(vision_config__num_attention_heads=0), r"num_attention_heads \(0\)"),
    "negative heads": (config(text_config__num_attention_heads=-4), r"num_attention_heads \(-4\)"),
    "no patches": (config(vision_config__patch_size=0), r"patch_size \(0\)"),
    "negative images": (config(vision_config__image_size=-112), r"image_size \(-112\)"),
    "images smaller than a patch": (config(vision_config__image_size=7), r"image_size \(7\).*patch_size \(8\)"),
    "a list of edges": (config(vision_config__image_size=[112, 112]), "must be one number of pixels"),
    "a negative epsilon": (config(vision_config__layer_norm_eps=-1.0), r"layer_norm_eps \(-1.0\)"),
    "an epsilon of NaN": (config(text_config__layer_norm_eps=float("nan")), r"layer_norm_eps \(nan\)"),
    "alpha beyond all numbers": (config(lora_alpha=1e300), r"lora_alpha \(1e\+300\)"),
    "an unknown activation": (config(vision_config__hidden_act="evil"), r"hidden_act \('evil'\)"),
    "text for a number": (config(num_experts="4"), "num_experts"),
    "a truth value for a block": (config(moe_layers=[True, 3, 5, 7]), "moe_layers"),
    # Settings that choose code
    "kernels to run": (config(attn_implementation="evil/kernel"), r"attn_implementation \('evil/kernel'\)"),
    "kernels by the inner name": (config(_attn_implementation="evil/kernel"), "_attn_implementation"),
    "kernels of a tower": (config(vision_config__attn_implementation="evil/kernel"), "attn_implementation"),
    "kernels of experts": (config(experts_implementation="evil/kernel"), "experts_implementation"),
    "other weights": (config(transformers_weights="other.bin"), r"transformers_weights \('other.bin'\)"),
    "a number for a type": (config(vision_config__dtype=-0.5), r"dtype \(-0\.5\) must be one of"),
    "a function of torch for a type": (config(dtype="load"), r"dtype \('load'\) must be one of"),
    "a module of torch for a type": (config(text_config__torch_dtype="hub"), r"torch_dtype \('hub'\) must be one of"),
    "whole numbers for a type": (config(dtype="int8"), r"dtype \('int8'\) must be one of"),
    "a setting for a method": (config(to_dict="evil"), r"to_dict \('evil'\) is no setting"),
    # Files of settings that are none
    "a list": (content("config.json", lambda b: b"[]"), "table of settings, not a list"),
    "brackets within brackets": (content("config.json", lambda b: b"[" * 200_000), "recursion"),
    "a number of 6,000 digits": (content("config.json", lambda b: b'{"a": %s}' % (b"9" * 6000)), "4300 digits"),
    "another encoding": (content("config.json", lambda b: b.decode().encode("utf-16")), "not a valid JSON"),
    "a processor cut short": (content("processor_config.json", lambda b: b[:40]), "processor_config.json"),
    "a tokenizer cut short": (content("tokenizer.json", lambda b: b[:500]), r"line \d+ column \d+ \(char"),
    # A processor of another model
    "other patches": (processor(image_processor__patch_size=14), "patches of 14 pixels .* takes 8 and 3"),
    "other channels": (config(vision_config__num_channels=1), "1 misshapen"),
    "another class": (
        processor(image_processor__image_processor_type="ViTImageProcessor"),
        "its image processor is a ViTImageProcessor.*, another model's",
    ),
    "another end of text": (config(text_config__eos_token_id=5), "tokenizer is another model's.* expects 5"),
    "no tokenizer": (lambda folder: (folder / "tokenizer.json").unlink(), "tokenizer is another model's"),
    "huge images to make": (processor(image_processor__size={"height": HUGE, "width": HUGE}), "over 8192 pixels"),
    "no spread": (processor(image_processor__image_std=[0, 0, 0]), r"image_std \(\[0, 0, 0\]\)"),
    "two channels": (processor(image_processor__image_std=[1, 1]), r"image_std \(\[1, 1\]\)"),
    "a mean of NaN": (processor(image_processor__image_mean=[float("nan")] * 3), "image_mean"),
    "a mean of text": (processor(image_processor__image_mean=["a", "b", "c"]), "image_mean"),
    "a threshold that nothing reaches": (processor(image_threshold=7), r"image_threshold \(7\)"),
    "a threshold of NaN": (processor(pixel_threshold=float("nan")), r"pixel_threshold \(nan\)"),
    "a threshold of text": (processor(image_threshold="high"), r"image_threshold \('high'\)"),
    "an unknown domain": (processor(domain="food"), "'food'"),
    # Files that are not the folder's own, or none
    "settings elsewhere": (linked_out("config.json"), "links to .*outside-config.json, out of its folder"),
    "weights elsewhere": (linked_out(WEIGHTS), "out of its folder"),
    "a tokenizer elsewhere": (linked_out("tokenizer.json"), "out of its folder"),
    "settings without an end": (linked_to("config.json", "/dev/zero"), "links to /dev/zero, out of its folder"),
    "a link to nothing": (linked_to("config.json", "nothing"), "is no file that can be read"),
    "a pipe": (pipe("config.json"), "is no file that can be read"),
    # A second model that comes with the first
    "an adapter beside it": (adapter_beside(), BOTH),
    "a huge adapter beside it": (adapter_beside(r=HUGE), BOTH),
}


@pytest.mark.parametrize(("spoil", "message"), CHECKPOINTS.values(), ids=CHECKPOINTS)
def test_a_checkpoint_that_lies_is_refused_by_name(checkpoint, spoil, message):
    spoil(checkpoint)
    with pytest.raises(CheckpointError, match=message) as error:
        load_pretrained(checkpoint, device="cpu")
    assert_told(error.value, checkpoint)


@pytest.mark.parametrize("name", [name for name in CHECKPOINTS if name not in ("NaN", "infinity")])
def test_what_settings_and_headers_tell_keeps_a_checkpoint_from_being_published(checkpoint, tmp_path, name):
    CHECKPOINTS[name][0](checkpoint)
    with pytest.raises(CheckpointError) as error:
        write_repository(checkpoint, tmp_path / "repository", "ann/it")
    assert_told(error.value, checkpoint)
    assert not (tmp_path / "repository").exists()


TO_TRAIN_ON = ["NaN", "a likely vocabulary that is not there", "a huge depth", "kernels to run", "weights elsewhere"]
TO_TRAIN_ON += ["a shard elsewhere", "a header that lies", "weights of two saves", "an adapter beside it"]


@pytest.mark.parametrize("name", TO_TRAIN_ON)
def test_training_does_not_start_from_a_checkpoint_that_lies(checkpoint, name):
    spoil, message = CHECKPOINTS[name]
    spoil(checkpoint)
    with pytest.raises(CheckpointError, match=message) as error:
        start_model(checkpoint, get_recipe("paper"))
    assert_told(error.value, checkpoint)


@pytest.mark.parametrize("name", ["an adapter beside it", "a huge adapter beside it"])
def test_no_adapter_is_loaded_over_a_base_with_another_beside_it(checkpoint, tmp_path, name):
    full_to_adapter(load_pretrained(device="cpu").model, base=str(checkpoint)).save_pretrained(tmp_path / "adapter")
    spoil, message = CHECKPOINTS[name]
    spoil(checkpoint)
    with pytest.raises(CheckpointError, match=message) as error:
        load_adapter(tmp_path / "adapter")
    assert_told(error.value, checkpoint)


@pytest.mark.parametrize("fetch", [fetch_checkpoint, fetch_adapter, fetch_clip])
def test_a_repository_of_both_a_model_and_an_adapter_is_refused_by_its_id(checkpoint, monkeypatch, fetch):
    (checkpoint / "adapter_config.json").write_text("{}")
    monkeypatch.setattr("moeclip_hf.pretrained.snapshot_download", lambda *args, **kwargs: str(checkpoint))
    with pytest.raises(CheckpointError, match=f"^ann/it: {BOTH}"):
        fetch("ann/it")


def test_the_command_says_it_in_one_line(checkpoint, command):
    CHECKPOINTS["NaN"][0](checkpoint)
    status, _, said = command("export", "--output", checkpoint / "out", "--model", checkpoint)
    assert status == 1
    assert len(said.splitlines()) == 1
    assert not (checkpoint / "out").exists()


def test_a_checkpoint_loads_with_links_of_its_own_and_the_hubs_cache(checkpoint, tmp_path):
    (checkpoint / "stored").mkdir()
    (checkpoint / WEIGHTS).rename(checkpoint / "stored" / WEIGHTS)
    (checkpoint / WEIGHTS).symlink_to(Path("stored") / WEIGHTS)
    (checkpoint / "images").symlink_to(tmp_path)
    assert fetch_checkpoint(checkpoint) == checkpoint
    snapshot, blobs = tmp_path / "models--ann--it" / "snapshots" / "0123", tmp_path / "models--ann--it" / "blobs"
    snapshot.mkdir(parents=True)
    blobs.mkdir()
    for file in EMBEDDED_CHECKPOINT.iterdir():
        shutil.copy(file, blobs / file.name)
        (snapshot / file.name).symlink_to(Path("../../blobs") / file.name)
    shared = tmp_path / "blobs" / "ab" / "abcd"  # by repositories that hold the same weights
    shared.parent.mkdir(parents=True)
    (blobs / WEIGHTS).rename(shared)
    (blobs / WEIGHTS).symlink_to(Path("../../blobs/ab/abcd"))
    assert load_pretrained(snapshot, device="cpu").model.config.name_or_path == str(snapshot)


@pytest.mark.parametrize("file", ["LICENSE", "README.md", "recipe.json"])
def test_what_a_link_leads_to_is_not_published(checkpoint, tmp_path, file):
    (tmp_path / "secret").write_text("{}")
    (checkpoint / file).unlink(missing_ok=True)
    (checkpoint / file).symlink_to(tmp_path / "secret")
    with pytest.raises(CheckpointError, match="secret, out of its folder"):
        write_repository(checkpoint, tmp_path / "repository", "ann/it")
    assert not (tmp_path / "repository").exists()


@pytest.mark.parametrize(
    ("folder", "link"),
    [
        ("snapshots/model", "../../.ssh/id_rsa"),
        ("snapshots/model", "../../hf/token"),
        ("hf/hub/models--ann--it/snapshots/0123", "../../../../token"),
        ("hf/hub/models--ann--it/snapshots/0123", "../../../models--ann--secret/blobs/secret"),
        ("hf/hub/models--ann--it/snapshots/0123", "../../blobs/id_rsa"),
    ],
)
def test_a_folder_that_is_called_or_lies_as_in_the_hubs_cache_publishes_no_other_file(
    checkpoint, tmp_path, monkeypatch, folder, link
):
    monkeypatch.setattr(constants, "HF_HOME", str(tmp_path / "hf"))
    for secret in (".ssh/id_rsa", "hf/token", "hf/hub/models--ann--secret/blobs/secret"):
        (tmp_path / secret).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / secret).write_text("secret")
    folder = shutil.copytree(checkpoint, tmp_path / folder)
    blobs = tmp_path / "hf/hub/models--ann--it/blobs"
    blobs.parent.mkdir(exist_ok=True)
    blobs.symlink_to(tmp_path / ".ssh")
    (folder / "LICENSE").symlink_to(link)
    assert (folder / "LICENSE").read_text() == "secret"
    with pytest.raises(CheckpointError, match=r"LICENSE: links to .*, out of its folder"):
        write_repository(folder, tmp_path / "repository", "ann/it")


# Code


CODE: dict[str, Spoil] = {
    "the model's": config(auto_map={"AutoConfig": "evil.Evil", "AutoModel": "evil.Evil"}),
    "the processor's": processor(auto_map={"AutoProcessor": "evil.Evil"}, processor_class="Evil"),
    "the image processor's": processor(image_processor__auto_map={"AutoImageProcessor": "evil.Evil"}),
    "the tokenizer's": settings(
        "tokenizer_config.json", auto_map={"AutoTokenizer": ["evil.Evil", None]}, tokenizer_class="Evil"
    ),
    "a pipeline's": config(custom_pipelines={"evil": {"impl": "evil.Evil", "pt": ["AutoModel"]}}),
}


@pytest.mark.parametrize("spoil", CODE.values(), ids=CODE)
def test_no_code_of_a_checkpoint_is_run_nor_asked_about(checkpoint, tmp_path, monkeypatch, capsys, spoil):
    canary = tmp_path / "canary"
    for module in ("evil.py", "handler.py", "configuration_moeclip.py", "modeling_moeclip.py"):
        (checkpoint / module).write_text(f"open({str(canary)!r}, 'w').close()\nclass Evil: ...\n")
    spoil(checkpoint)
    monkeypatch.setattr("sys.stdin", io.StringIO("y\n" * 9))
    try:
        load_pretrained(checkpoint, device="cpu")
    except CheckpointError as error:
        assert_told(error, checkpoint)
    assert not canary.exists()
    assert "[y/N]" not in "".join(capsys.readouterr())
