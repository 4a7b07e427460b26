"""Checkpoints, adapters and CLIPs that lie: each is refused by name in one line, soon, and nothing of it is run."""

import io
import json
import os
import resource
import shutil
import struct
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from plain_clip import PlainCLIP
from released_adapters import random_adapter
from safetensors.torch import load_file, save_file
from transformers import CLIPModel

from moeclip_hf.adapters import full_to_adapter, load_adapter
from moeclip_hf.conversion import convert_released, load_clip
from moeclip_hf.errors import CheckpointError, ConversionError
from moeclip_hf.hub import write_repository
from moeclip_hf.pretrained import EMBEDDED_CHECKPOINT, fetch_checkpoint, load_pretrained
from moeclip_hf.training.recipes import get_recipe
from moeclip_hf.training.run import start_model

HUGE = 10**9
WEIGHTS, ADAPTER_WEIGHTS = "model.safetensors", "adapter_model.safetensors"

Spoil = Callable[[Path], Any]


@pytest.fixture(autouse=True)
def bounded_memory():
    """Nothing here may set aside more than 2 GB; what would is refused by the system, not by luck."""
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    before = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (pages * resource.getpagesize() + (2 << 30), before[1]))
    yield
    resource.setrlimit(resource.RLIMIT_AS, before)


def assert_told(error: CheckpointError, path: Path) -> None:
    message = str(error)
    assert str(path) in message
    assert "\n" not in message
    assert "allocate" not in message and "MemoryError" not in message, "it was refused for lack of memory alone"


def settings(file: str, **changes: Any) -> Spoil:
    """Set what a file of JSON says; `a__b` is b within a."""

    def spoil(folder: Path) -> None:
        document = json.loads((folder / file).read_text())
        for path, value in changes.items():
            *outer, name = path.split("__")
            place = document
            for key in outer:
                place = place[key]
            place[name] = value
        (folder / file).write_text(json.dumps(document))

    return spoil


def config(**changes: Any) -> Spoil:
    return settings("config.json", **changes)


def processor(**changes: Any) -> Spoil:
    return settings("processor_config.json", **changes)


def weights(change: Callable[[dict[str, torch.Tensor]], Any], file: str = WEIGHTS) -> Spoil:
    def spoil(folder: Path) -> None:
        tensors = load_file(folder / file)
        change(tensors)
        save_file(tensors, folder / file, metadata={"format": "pt"})

    return spoil


def content(file: str, change: Callable[[bytes], bytes]) -> Spoil:
    return lambda folder: (folder / file).write_bytes(change((folder / file).read_bytes()))


def moved_out(folder: Path, file: str) -> Path:
    outside = folder.parent / f"outside-{file}"
    (folder / file).rename(outside)
    return outside


def linked_out(file: str) -> Spoil:
    return lambda folder: (folder / file).symlink_to(moved_out(folder, file))


def linked_to(file: str, target: str) -> Spoil:
    return lambda folder: ((folder / file).unlink(), (folder / file).symlink_to(target))


def pipe(file: str) -> Spoil:
    return lambda folder: ((folder / file).unlink(), os.mkfifo(folder / file))


def indexed_outside(folder: Path) -> None:
    outside = moved_out(folder, WEIGHTS)
    index = {"metadata": {}, "weight_map": dict.fromkeys(load_file(outside), f"../{outside.name}")}
    (folder / f"{WEIGHTS}.index.json").write_text(json.dumps(index))
    (folder / "decoy.safetensors").touch()


PROJECTION = "text_adapter.projection.weight"

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
    "a setting for a method": (config(to_dict="evil"), r"to_dict \('evil'\) is no setting"),
    # Files of settings that are none
    "a list": (content("config.json", lambda b: b"[]"), "table of settings, not a list"),
    "brackets within brackets": (content("config.json", lambda b: b"[" * 200_000), "recursion"),
    "a number of 6,000 digits": (content("config.json", lambda b: b'{"a": %s}' % (b"9" * 6000)), "4300 digits"),
    "another encoding": (content("config.json", lambda b: b.decode().encode("utf-16")), "not a valid JSON"),
    "a processor cut short": (content("processor_config.json", lambda b: b[:40]), "processor_config.json"),
    "a tokenizer cut short": (content("tokenizer.json", lambda b: b[:500]), "Unterminated"),
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
}


@pytest.fixture
def checkpoint(tmp_path):
    return Path(shutil.copytree(EMBEDDED_CHECKPOINT, tmp_path / "checkpoint"))


@pytest.mark.parametrize(("spoil", "message"), CHECKPOINTS.values(), ids=CHECKPOINTS)
def test_a_checkpoint_that_lies_is_refused_by_name(checkpoint, spoil, message):
    spoil(checkpoint)
    with pytest.raises(CheckpointError, match=message) as error:
        load_pretrained(checkpoint, device="cpu")
    assert_told(error.value, checkpoint)


TO_TRAIN_ON = ["NaN", "a likely vocabulary that is not there", "a huge depth", "kernels to run", "weights elsewhere"]


@pytest.mark.parametrize("name", [*TO_TRAIN_ON, "a shard elsewhere", "a header that lies"])
def test_training_does_not_start_from_a_checkpoint_that_lies(checkpoint, name):
    spoil, message = CHECKPOINTS[name]
    spoil(checkpoint)
    with pytest.raises(CheckpointError, match=message) as error:
        start_model(checkpoint, get_recipe("paper"))
    assert_told(error.value, checkpoint)


def test_the_command_says_it_in_one_line(checkpoint, monkeypatch, capsys):
    from moeclip_hf.cli import main

    CHECKPOINTS["NaN"][0](checkpoint)
    monkeypatch.setattr(
        sys, "argv", ["moeclip", "export", "--output", str(checkpoint / "out"), "--model", str(checkpoint)]
    )
    with pytest.raises(SystemExit) as stop:
        main()
    assert stop.value.code == 1
    assert len(capsys.readouterr().err.splitlines()) == 1
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
    assert load_pretrained(snapshot, device="cpu").model.config.name_or_path == str(snapshot)


@pytest.mark.parametrize("file", ["LICENSE", "README.md", "recipe.json"])
def test_what_a_link_leads_to_is_not_published(checkpoint, tmp_path, file):
    (tmp_path / "secret").write_text("{}")
    (checkpoint / file).unlink(missing_ok=True)
    (checkpoint / file).symlink_to(tmp_path / "secret")
    with pytest.raises(CheckpointError, match="secret, out of its folder"):
        write_repository(checkpoint, tmp_path / "repository", "ann/it")
    assert not (tmp_path / "repository").exists()


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


class Payload:
    """Touches a file when it is unpickled."""

    def __init__(self, canary: Path):
        self.canary = canary

    def __reduce__(self):
        return os.system, (f"touch {self.canary}",)


# Adapters


@pytest.fixture(scope="module")
def adapter_made(tmp_path_factory):
    folder = tmp_path_factory.mktemp("adapters") / "adapter"
    loaded = load_pretrained(device="cpu", dtype="float32")
    full_to_adapter(loaded.model, base=str(EMBEDDED_CHECKPOINT)).save_pretrained(folder)
    loaded.processor.save_pretrained(folder)
    return folder


@pytest.fixture
def adapter(adapter_made, tmp_path):
    return Path(shutil.copytree(adapter_made, tmp_path / "adapter"))


def adapter_config(**changes: Any) -> Spoil:
    return settings("adapter_config.json", **changes)


def adapter_weights(change: Callable[[dict[str, torch.Tensor]], Any]) -> Spoil:
    return weights(change, ADAPTER_WEIGHTS)


def first(tensors: dict[str, torch.Tensor], end: str) -> str:
    return next(name for name in sorted(tensors) if name.endswith(end))


ADAPTERS: dict[str, tuple[Spoil, str]] = {
    "NaN": (adapter_weights(lambda t: t[first(t, "lora_B")].fill_(float("nan"))), "1 non-finite .*lora_B"),
    "an extra weight": (adapter_weights(lambda t: t.update(extra=torch.zeros(3))), r"1 unknown \(extra\)"),
    "missing experts": (adapter_weights(lambda t: t.pop(first(t, "lora_B"))), "1 missing .*lora_B"),
    "a missing head": (
        adapter_weights(lambda t: t.pop(first(t, PROJECTION))),
        rf"lacks a weight .*{PROJECTION}",
    ),
    "no experts": (adapter_weights(lambda t: [t.pop(name) for name in list(t) if "lora_A" in name]), "no experts"),
    "a misshapen weight": (
        adapter_weights(lambda t: t.update({first(t, "router.weight"): torch.zeros(2, 2)})),
        "router",
    ),
    "a file cut short": (content(ADAPTER_WEIGHTS, lambda b: b[:3000]), "damaged or cut short"),
    "a huge rank": (adapter_config(r=HUGE, use_fofs=False), "asks for 4 experts of rank 1000000000"),
    "a billion experts": (adapter_config(num_experts=HUGE, use_fofs=False), "asks for 1000000000 experts"),
    "text for a number": (adapter_config(num_experts="4"), "cannot be read as an adapter"),
    "targets that are not there": (adapter_config(target_modules="nowhere"), "cannot be put into"),
    "no expression": (adapter_config(target_modules="("), "cannot be put into"),
    "an unknown type": (adapter_config(peft_type="EVIL"), "cannot be read as an adapter"),
    "an unknown activation": (adapter_config(base_settings__vision_config={"hidden_act": "evil"}), "'evil'"),
    "taps beyond the tower": (adapter_config(base_settings__feature_layers=[99]), r"\[99\]"),
    "settings that are none": (adapter_config(base_settings=[1]), "cannot be loaded as the base"),
    "a list": (content("adapter_config.json", lambda b: b"[]"), "cannot be read as an adapter"),
    "weights elsewhere": (linked_out(ADAPTER_WEIGHTS), "out of its folder"),
    "a base that is not there": (adapter_config(base_model_name_or_path="/nowhere"), "/nowhere: cannot be loaded as"),
}


@pytest.mark.parametrize(("spoil", "message"), ADAPTERS.values(), ids=ADAPTERS)
def test_an_adapter_that_lies_is_refused_by_name(adapter, spoil, message):
    spoil(adapter)
    with pytest.raises(CheckpointError, match=message) as error:
        load_pretrained(adapter, device="cpu")
    assert_told(error.value, adapter)


def test_an_adapter_of_pickles_is_not_read(adapter, tmp_path):
    torch.save({"evil": Payload(tmp_path / "canary")}, adapter / "adapter_model.bin")
    (adapter / ADAPTER_WEIGHTS).unlink()
    with pytest.raises(CheckpointError, match=r"adapter_model\.safetensors is missing"):
        load_adapter(adapter)
    assert not (tmp_path / "canary").exists()


@pytest.mark.parametrize("spoil", ["payload", "expanded", "huge", "NaN"])
def test_a_base_that_lies_is_refused_by_name(adapter, checkpoint, tmp_path, spoil):
    if spoil == "payload":
        (checkpoint / WEIGHTS).unlink()
        torch.save({"evil": Payload(tmp_path / "canary")}, checkpoint / "pytorch_model.bin")
    elif spoil == "expanded":
        tensors = load_file(checkpoint / WEIGHTS)
        (checkpoint / WEIGHTS).unlink()
        tensors[PROJECTION] = torch.zeros(1).expand(HUGE, HUGE)
        torch.save(tensors, checkpoint / "pytorch_model.bin")
    elif spoil == "huge":
        config(text_config__vocab_size=1 << 20)(checkpoint)
    else:
        weights(lambda t: t["logit_scale"].fill_(float("nan")))(checkpoint)
    message = {
        "payload": "holds posix.system, not only tensors",
        "expanded": "1 of fewer numbers than their shape",
        "huge": "1 misshapen",
        "NaN": "1 non-finite",
    }[spoil]
    with pytest.raises(CheckpointError, match=message) as error:
        load_adapter(adapter, base=checkpoint)
    assert_told(error.value, checkpoint)
    assert not (tmp_path / "canary").exists()


# Other formats


CONV1, TOKENS, BIAS = "visual.conv1.weight", "token_embedding.weight", "visual.transformer.resblocks.0.mlp.c_fc.bias"
LORA = "moe_adapters.0.experts.0.lora_A.weight"


def sparse(*shape: int) -> torch.Tensor:
    return torch.sparse_coo_tensor([[0], [0]], [1.0], shape, check_invariants=True)


TENSORS: dict[str, tuple[dict[Any, torch.Tensor], str]] = {
    "one number for a vocabulary": ({TOKENS: torch.zeros(1).expand(HUGE, 64)}, "1 of fewer numbers than their shape"),
    "a sparse vocabulary": ({TOKENS: sparse(HUGE, 64)}, "1 of fewer numbers than their shape"),
    "no numbers at all": ({TOKENS: torch.empty(HUGE, 64, device="meta")}, "1 of fewer numbers than their shape"),
    "a number for a name": ({7: torch.zeros(2)}, r"1 without a name \(7\)"),
    "a name of two lines": ({"a\nb": torch.zeros(2)}, r"1 unknown \('a\\nb'\)"),
    "a bias that is a number": ({BIAS: torch.tensor(1.0)}, r"1 misshapen \(visual.*: \(\), not"),
    "a bias of nothing": ({BIAS: torch.zeros(0)}, "misshapen"),
    "eighth-precision numbers": ({CONV1: torch.zeros(128, 3, 16, 16).to(torch.float8_e4m3fn)}, "1 of another type"),
    "complex numbers": ({CONV1: torch.zeros(128, 3, 16, 16, dtype=torch.complex64)}, "1 of another type"),
    "thousands of blocks": (
        {f"visual.transformer.resblocks.{block}.ln_1.bias": torch.zeros(1) for block in range(500)},
        "unknown",
    ),
}


@pytest.mark.filterwarnings("ignore:Sparse")
@pytest.mark.parametrize(("tensors", "message"), TENSORS.values(), ids=TENSORS)
def test_a_clip_that_lies_is_refused_by_name(tmp_path, tensors, message):
    path = tmp_path / "clip.pt"
    torch.save(PlainCLIP().state_dict() | tensors, path)
    with pytest.raises(ConversionError, match=message) as error:
        load_clip(path)
    assert_told(error.value, path)


@pytest.mark.parametrize(
    ("name", "tensor"),
    [
        (LORA, torch.zeros(1).expand(8, 10**12)),
        (LORA, torch.empty(8, 128, device="meta")),
        ("seg_proj.0.fc.weight", torch.zeros(1).expand(HUGE, 128)),
    ],
    ids=["one number", "no numbers", "a huge projection"],
)
def test_a_released_adapter_that_lies_is_refused_by_name(tmp_path, name, tensor):
    adapter = random_adapter()
    adapter["image_adapter"][name] = tensor
    torch.save(adapter, tmp_path / "moe_last.pth")
    with pytest.raises(ConversionError, match="1 of fewer numbers than their shape") as error:
        convert_released(tmp_path / "moe_last.pth", PlainCLIP().state_dict())
    assert_told(error.value, tmp_path / "moe_last.pth")


def archive(path: Path, data: bytes, compression: int = zipfile.ZIP_STORED) -> None:
    with zipfile.ZipFile(path, "w", compression) as opened:
        opened.writestr("clip/data.pkl", data)
        opened.writestr("clip/constants.pkl", b"")


_MODULE = b"c__torch__\nM\n)\x81"
ARCHIVES = {
    "a bomb": (b"\x80\x02" + b"0" * (80 << 20), zipfile.ZIP_DEFLATED, "would unpack to 83,886,082 bytes"),
    "a memory of billions": (b"\x80\x02]r\x00\x00\x00\x60.", zipfile.ZIP_STORED, "damaged or cut short"),
    "modules that double": (
        b"\x80\x02" + _MODULE + b"q\x00" + (_MODULE + b"}(U\x01ah\x00U\x01bh\x00ubq\x00") * 40 + b".",
        zipfile.ZIP_STORED,
        "damaged or cut short",
    ),
    "a module within itself": (
        b"\x80\x02" + _MODULE + b"q\x00}U\x01ah\x00sb.",
        zipfile.ZIP_STORED,
        "damaged or cut short",
    ),
}


@pytest.mark.parametrize(("data", "compression", "message"), ARCHIVES.values(), ids=ARCHIVES)
def test_an_archive_that_grows_when_it_is_read_is_refused(tmp_path, data, compression, message):
    archive(tmp_path / "clip.pt", data, compression)
    with pytest.raises(ConversionError, match=message) as error:
        load_clip(tmp_path / "clip.pt")
    assert_told(error.value, tmp_path / "clip.pt")


CLIPS: dict[str, tuple[Spoil, str]] = {
    "a huge vocabulary": (config(text_config__vocab_size=HUGE), "1 misshapen"),
    "a huge depth": (config(vision_config__num_hidden_layers=HUGE), "asks for 1000000000 blocks"),
    "a width beyond numbers": (config(vision_config__hidden_size=2**62), "no model can be made"),
    "a negative width": (config(vision_config__hidden_size=-32), "no model can be made"),
    "whole numbers": (weights(lambda t: t.update(logit_scale=torch.tensor(1))), "1 of another type"),
    "NaN": (weights(lambda t: t["logit_scale"].fill_(float("nan"))), r"1 non-finite \(logit_scale\)"),
    "weights elsewhere": (linked_out(WEIGHTS), "out of its folder"),
    "a list": (content("config.json", lambda b: b"[]"), "cannot be loaded as a CLIP"),
}


@pytest.mark.parametrize(("spoil", "message"), CLIPS.values(), ids=CLIPS)
def test_a_folder_of_a_clip_that_lies_is_refused_by_name(tmp_path, spoil, message):
    from tiny_models import tiny_config
    from transformers import CLIPConfig

    towers = {name: getattr(tiny_config(), name).to_dict() for name in ("text_config", "vision_config")}
    CLIPModel(CLIPConfig(**towers)).save_pretrained(tmp_path / "clip")
    spoil(tmp_path / "clip")
    with pytest.raises(ConversionError, match=message) as error:
        load_clip(tmp_path / "clip")
    assert_told(error.value, tmp_path / "clip")


def test_kernels_that_a_clip_names_are_not_fetched(tmp_path):
    from tiny_models import tiny_config
    from transformers import CLIPConfig

    towers = {name: getattr(tiny_config(), name).to_dict() for name in ("text_config", "vision_config")}
    CLIPModel(CLIPConfig(**towers)).save_pretrained(tmp_path)
    config(attn_implementation="evil/kernel", _attn_implementation="evil/kernel")(tmp_path)
    assert load_clip(tmp_path).config._attn_implementation == "sdpa"
