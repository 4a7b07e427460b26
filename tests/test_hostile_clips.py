"""CLIPs and released adapters that lie: each is refused by name in one line, soon, and nothing of it is run."""

import zipfile
from pathlib import Path
from typing import Any

import pytest
import torch
from plain_clip import PlainCLIP
from released_adapters import random_adapter
from spoiled_models import HUGE, WEIGHTS, Spoil, assert_told, config, content, linked_out, weights
from tiny_models import tiny_config
from transformers import CLIPConfig, CLIPModel

from moeclip_hf.conversion import convert_released, load_clip
from moeclip_hf.errors import ConversionError

pytestmark = pytest.mark.usefixtures("bounded_memory")

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


def write_clip(folder: Path) -> None:
    towers = {name: getattr(tiny_config(), name).to_dict() for name in ("text_config", "vision_config")}
    CLIPModel(CLIPConfig(**towers)).save_pretrained(folder)


CLIPS: dict[str, tuple[Spoil, str]] = {
    "a huge vocabulary": (config(text_config__vocab_size=HUGE), "1 misshapen"),
    "a huge depth": (config(vision_config__num_hidden_layers=HUGE), "asks for 1000000000 blocks"),
    "a width beyond numbers": (config(vision_config__hidden_size=2**62), "no model can be made"),
    "a negative width": (config(vision_config__hidden_size=-32), "no model can be made"),
    "whole numbers": (weights(lambda t: t.update(logit_scale=torch.tensor(1))), "1 of another type"),
    "NaN": (weights(lambda t: t["logit_scale"].fill_(float("nan"))), r"1 non-finite \(logit_scale\)"),
    "weights elsewhere": (linked_out(WEIGHTS), "out of its folder"),
    "weights of two saves": (
        lambda folder: (folder / f"{WEIGHTS}.index.json").write_text("{}"),
        r"twice, in model\.safetensors and in the files of model\.safetensors\.index\.json: delete those",
    ),
    "a list": (content("config.json", lambda b: b"[]"), "cannot be loaded as a CLIP"),
}


@pytest.mark.parametrize(("spoil", "message"), CLIPS.values(), ids=CLIPS)
def test_a_folder_of_a_clip_that_lies_is_refused_by_name(tmp_path, spoil, message):
    write_clip(tmp_path / "clip")
    spoil(tmp_path / "clip")
    with pytest.raises(ConversionError, match=message) as error:
        load_clip(tmp_path / "clip")
    assert_told(error.value, tmp_path / "clip")


def test_kernels_that_a_clip_names_are_not_fetched(tmp_path):
    write_clip(tmp_path)
    config(attn_implementation="evil/kernel", _attn_implementation="evil/kernel")(tmp_path)
    assert load_clip(tmp_path).config._attn_implementation == "sdpa"
