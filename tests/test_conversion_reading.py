"""Checkpoint files are read as data: what is damaged, or would run code, is refused in one line."""

import os
import pickle
import struct
import zipfile

import pytest
import torch
from plain_clip import PlainCLIP
from safetensors.torch import save_file

from moeclip_hf.conversion import convert_openai_clip, convert_released, load_clip
from moeclip_hf.conversion.reading import is_repository, read_checkpoint
from moeclip_hf.errors import ConversionError


class Payload:
    """Touches a file when it is unpickled."""

    def __init__(self, canary):
        self.canary = canary

    def __reduce__(self):
        return os.system, (f"touch {self.canary}",)


def write_archive(path, entries: dict[str, bytes]) -> None:
    with zipfile.ZipFile(path, "w") as archive:
        for name, content in entries.items():
            archive.writestr(name, content)


def scripted_entries(tmp_path) -> dict[str, bytes]:
    """The entries of a TorchScript archive with one weight of twelve numbers."""
    torch.jit.script(torch.nn.Linear(4, 3, bias=False)).save(str(tmp_path / "linear.pt"))
    with zipfile.ZipFile(tmp_path / "linear.pt") as archive:
        return {name: archive.read(name) for name in archive.namelist()}


@pytest.mark.parametrize("form", ["zip", "legacy", "torchscript", "folder"])
def test_a_file_that_would_run_code_is_refused_and_its_code_not_run(tmp_path, form):
    canary = tmp_path / "canary"
    path = tmp_path / "moe_last.pth"
    content = {"text_adapter": Payload(canary), "image_adapter": {}}
    if form == "torchscript":
        write_archive(path, {"clip/data.pkl": pickle.dumps(content), "clip/constants.pkl": b""})
    elif form == "folder":
        convert_openai_clip(PlainCLIP().state_dict()).config.save_pretrained(tmp_path)
        torch.save({"logit_scale": Payload(canary)}, tmp_path / "pytorch_model.bin")
    else:
        torch.save(content, path, _use_new_zipfile_serialization=form == "zip")
    with pytest.raises(ConversionError) as error:
        load_clip(tmp_path) if form == "folder" else convert_released(path, PlainCLIP().state_dict())
    assert not canary.exists()
    assert "\n" not in str(error.value)
    if form != "folder":
        assert str(error.value).startswith(f"{path} holds posix.system, not only tensors")


def test_the_canary_would_show_if_the_code_ran(tmp_path):
    torch.save(Payload(tmp_path / "canary"), tmp_path / "file.pt")
    torch.load(tmp_path / "file.pt", weights_only=False)
    assert (tmp_path / "canary").exists()


@pytest.mark.parametrize(("module", "name"), [("builtins", "eval"), ("__torch__x", "system"), ("torch", "load")])
def test_an_archive_finds_nothing_but_tensors_lists_and_its_own_modules(tmp_path, module, name):
    write_archive(tmp_path / "clip.pt", {"clip/data.pkl": f"c{module}\n{name}\n.".encode(), "clip/constants.pkl": b""})
    with pytest.raises(ConversionError, match=rf"holds {module}\.{name}, not only tensors"):
        read_checkpoint(tmp_path / "clip.pt")


@pytest.mark.filterwarnings("ignore:.*torch.jit")
def test_a_tensor_that_reaches_beyond_its_storage_is_refused(tmp_path):
    entries = scripted_entries(tmp_path)
    write_archive(tmp_path / "whole.pt", entries)
    assert read_checkpoint(tmp_path / "whole.pt")["weight"].shape == (3, 4)
    entries["linear/data/0"] = entries["linear/data/0"][:-4]
    write_archive(tmp_path / "short.pt", entries)
    with pytest.raises(ConversionError, match="damaged or cut short"):
        read_checkpoint(tmp_path / "short.pt")


@pytest.mark.filterwarnings("ignore:.*torch.jit")
def test_a_storage_that_is_not_in_the_archive_is_refused(tmp_path):
    entries = scripted_entries(tmp_path)
    del entries["linear/data/0"]
    write_archive(tmp_path / "clip.pt", entries)
    with pytest.raises(ConversionError, match="damaged or cut short"):
        read_checkpoint(tmp_path / "clip.pt")


def write_cut_short(path, legacy: bool) -> None:
    torch.save({"weight": torch.arange(1000.0)}, path, _use_new_zipfile_serialization=not legacy)
    path.write_bytes(path.read_bytes()[:2000])


def write_flipped(path) -> None:
    """The numbers of a state dict are not those that it was saved with."""
    torch.save({"weight": torch.arange(1000.0)}, path)
    content = path.read_bytes()
    start = content.index(torch.arange(1000.0).numpy().tobytes())
    path.write_bytes(content[:start] + b"\xff" * 64 + content[start + 64 :])


def write_lying_header(path) -> None:
    save_file({"weight": torch.zeros(4)}, path)
    content = path.read_bytes()
    path.write_bytes(struct.pack("<Q", 1 << 40) + content[8:])


def write_short_safetensors(path) -> None:
    save_file({"weight": torch.zeros(400)}, path)
    path.write_bytes(path.read_bytes()[:-100])


DAMAGED = {
    "empty.pt": (lambda path: path.touch(), "is empty"),
    "page.pt": (lambda path: path.write_text("\n<!DOCTYPE html><html>404</html>"), "is a web page"),
    "pointer.safetensors": (
        lambda path: path.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n"),
        "git lfs pull",
    ),
    "cut.pt": (lambda path: write_cut_short(path, legacy=False), "damaged or cut short"),
    "cut_legacy.pt": (lambda path: write_cut_short(path, legacy=True), "damaged or cut short"),
    "flipped.pt": (write_flipped, "is damaged: fetch it anew"),
    "header.safetensors": (write_lying_header, "no valid safetensors file"),
    "short.safetensors": (write_short_safetensors, "no valid safetensors file"),
    "text.pth": (lambda path: path.write_text('{"epoch": 1}'), "is neither a PyTorch file"),
    "other.zip": (lambda path: write_archive(path, {"readme.txt": b"nothing here"}), "damaged or cut short"),
    "list.pt": (lambda path: torch.save([torch.zeros(1)], path), "holds a list"),
    "folder": (lambda path: path.mkdir(), "is a folder"),
    "missing.pt": (lambda path: None, "no such file"),
}


def test_a_safetensors_header_whose_length_spells_a_web_page_is_read(tmp_path):
    path = tmp_path / "clip.safetensors"
    save_file({"weight": torch.arange(4.0)}, path)
    content = path.read_bytes()
    length = struct.unpack("<Q", content[:8])[0]
    padded = 0x3C20  # a space and a "<"
    header = content[8 : 8 + length].ljust(padded)
    path.write_bytes(struct.pack("<Q", padded) + header + content[8 + length :])
    assert path.read_bytes()[:2] == b" <"
    assert read_checkpoint(path)["weight"].tolist() == [0, 1, 2, 3]


@pytest.mark.parametrize("name", DAMAGED)
def test_a_file_that_is_no_checkpoint_is_told_in_one_line(tmp_path, name):
    write, message = DAMAGED[name]
    path = tmp_path / name
    write(path)
    with pytest.raises(ConversionError, match=message) as error:
        read_checkpoint(path)
    assert str(error.value).startswith(str(path))
    assert "\n" not in str(error.value)


def test_folders_and_hub_ids_are_repositories_and_paths_of_files_are_not(tmp_path):
    assert is_repository(tmp_path)
    assert is_repository("openai/clip-vit-large-patch14-336")
    assert not is_repository("ViT-L-14-336px.pt")
    assert not is_repository("weights/clip.safetensors")
    assert not is_repository("a/b/c")
