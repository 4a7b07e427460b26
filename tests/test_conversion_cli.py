"""`moeclip convert` writes whole folders, says what it set, and names what is wrong in one line."""

import json
import sys

import pytest
import torch
from plain_bpe import PlainBPE, learn_merges, write_merges
from plain_clip import PlainCLIP, plain_inputs
from released_adapters import assert_same_adapter, random_adapter
from transformers import AutoModel, AutoProcessor, CLIPImageProcessorPil, CLIPModel, CLIPProcessor

from moeclip_hf import MoECLIPModel, MoECLIPProcessor
from moeclip_hf.cli import main
from moeclip_hf.conversion import convert_openai_clip, convert_released, save_moeclip
from moeclip_hf.pretrained import EMBEDDED_CHECKPOINT

MERGES = 20
VOCAB_SIZE = 256 + 256 + MERGES + 2


@pytest.fixture
def moeclip(monkeypatch, capsys):
    """Runs the command; returns its exit status, output and errors."""

    def run(*arguments) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["moeclip", *map(str, arguments)])
        capsys.readouterr()
        try:
            main()
            status = 0
        except SystemExit as stop:
            status = stop.code or 0
        captured = capsys.readouterr()
        return status, captured.out, captured.err

    return run


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """A CLIP, an adapter and a list of merges, as they are downloaded."""
    folder = tmp_path_factory.mktemp("downloads")
    torch.save(PlainCLIP(vocab_size=VOCAB_SIZE).state_dict(), folder / "ViT.pt")
    torch.save(random_adapter(), folder / "moe_last.pth")
    write_merges(folder / "bpe_simple_vocab_16e6.txt.gz", learn_merges(MERGES))
    return folder


def released(files, output, *others):
    arguments = ["--adapter", files / "moe_last.pth", "--clip", files / "ViT.pt", "--output", output]
    return ["convert", "released", *arguments, "--tokenizer", files / "bpe_simple_vocab_16e6.txt.gz", *others]


def test_released_writes_a_folder_that_the_auto_classes_load(moeclip, files, tmp_path):
    settings = [
        "--lora-alpha",
        "8",
        "--residual-weight",
        "0.2",
        "--num-experts-per-tok",
        "3",
        "--moe-layers",
        "0,2,5,7",
    ]
    status, output, errors = moeclip(*released(files, tmp_path / "out", *settings))
    assert (status, errors) == (0, "")
    assert "gelu, as the released code trains with it" in output

    model = AutoModel.from_pretrained(tmp_path / "out")
    expected = convert_released(
        files / "moe_last.pth",
        files / "ViT.pt",
        lora_alpha=8,
        residual_weight=0.2,
        num_experts_per_tok=3,
        moe_layers=[0, 2, 5, 7],
    )
    assert isinstance(model, MoECLIPModel)
    assert model.state_dict().keys() == expected.state_dict().keys()
    assert all(torch.equal(model.state_dict()[name], tensor) for name, tensor in expected.state_dict().items())
    for name in ("lora_alpha", "residual_weight", "num_experts_per_tok", "moe_layers", "use_fofs", "lora_rank"):
        assert getattr(model.config, name) == getattr(expected.config, name)
    pixels, _ = plain_inputs(PlainCLIP())
    anchors = torch.randn(1, 2, 48)
    with torch.no_grad():
        logits = [m(pixels, text_embeds=anchors).anomaly_logits for m in (model, expected)]
    assert torch.equal(*logits)

    processor = AutoProcessor.from_pretrained(tmp_path / "out")
    assert isinstance(processor, MoECLIPProcessor)
    assert processor.image_processor.size == {"height": 12, "width": 12}
    assert processor.image_processor.patch_size == 4
    encoded = PlainBPE(learn_merges(MERGES)).encode("the a.")
    assert processor.tokenizer("the a.")["input_ids"] == encoded


def test_a_transformers_clip_brings_its_tokenizer(moeclip, files, tmp_path, tokenizer):
    clip = PlainCLIP(vocab_size=len(tokenizer)).state_dict()
    config = {"bos_token_id": tokenizer.bos_token_id, "eos_token_id": tokenizer.eos_token_id}
    convert_openai_clip(clip, text_config=config).save_pretrained(tmp_path / "clip")
    tokenizer.save_pretrained(tmp_path / "clip")
    adapter = files / "moe_last.pth"
    arguments = ["--adapter", adapter, "--clip", tmp_path / "clip", "--output", tmp_path / "out", "--image-size", 20]
    arguments += ["--aggregation-sizes", "1"]
    _, output, _ = moeclip("convert", "released", *arguments)
    assert "4, the third last tap, which the released code takes without PAA" in output
    status, output, _ = moeclip("convert", "released", *arguments, "--json")
    assert status == 0
    facts = json.loads(output)
    assert facts["moe_layers"] == [1, 3, 5, 7]
    assert (facts["image_feature_layer"], facts["activation"]) == (4, "gelu")
    processor = AutoProcessor.from_pretrained(tmp_path / "out")
    assert processor.image_processor.size == {"height": 20, "width": 20}
    assert processor.tokenizer.get_vocab() == tokenizer.get_vocab()
    assert processor.tokenizer.model_max_length == 12
    assert AutoModel.from_pretrained(tmp_path / "out").config.image_feature_layer == 4


def test_export_gives_back_the_adapter(moeclip, files, tmp_path):
    moeclip(*released(files, tmp_path / "out", "--lora-alpha", "8"))
    status, output, _ = moeclip(
        "convert", "export", "--model", tmp_path / "out", "--output", tmp_path / "new" / "moe.pth"
    )
    assert status == 0
    assert "lora alpha" in output
    assert "activation           gelu\nimage size           12, 12\n" in output
    exported = torch.load(tmp_path / "new" / "moe.pth", weights_only=True)
    assert exported.keys() == random_adapter().keys()
    assert_same_adapter(exported, random_adapter())


def test_export_says_where_the_released_code_would_run_another_activation(moeclip, files, tmp_path):
    status, output, _ = moeclip(*released(files, tmp_path / "out", "--activation", "quick_gelu"))
    assert (status, "as the released code" in output) == (0, False)
    config = MoECLIPModel.from_pretrained(tmp_path / "out").config
    assert config.vision_config.hidden_act == config.text_config.hidden_act == "quick_gelu"
    _, output, _ = moeclip("convert", "export", "--model", tmp_path / "out", "--output", tmp_path / "moe.pth")
    assert "quick_gelu, where the released code runs gelu" in output


def test_an_adapter_without_experts_is_converted_with_the_option_that_the_error_names(moeclip, files, tmp_path):
    adapter = random_adapter()
    for part in list(adapter["image_adapter"]):
        if part.startswith("moe_adapters."):
            del adapter["image_adapter"][part]
    torch.save(adapter, tmp_path / "bare.pth")
    arguments = released(files, tmp_path / "out")
    arguments[arguments.index("--adapter") + 1] = tmp_path / "bare.pth"
    status, _, errors = moeclip(*arguments)
    assert (status, "--moe-layers" in errors) == (1, True)
    assert moeclip(*arguments, "--moe-layers", "")[0] == 0
    assert MoECLIPModel.from_pretrained(tmp_path / "out").config.moe_layers == []


def test_openai_writes_a_clip_folder(moeclip, files, tmp_path):
    bpe = files / "bpe_simple_vocab_16e6.txt.gz"
    arguments = ["--clip", files / "ViT.pt", "--output", tmp_path, "--tokenizer", bpe, "--dtype", "bfloat16"]
    status, output, _ = moeclip("convert", "openai", *arguments)
    assert status == 0
    assert "quick_gelu" in output
    clip = AutoModel.from_pretrained(tmp_path)
    assert type(clip) is CLIPModel
    assert clip.dtype == torch.bfloat16
    expected = convert_openai_clip(files / "ViT.pt").to(torch.bfloat16).state_dict()
    assert all(torch.equal(tensor, expected[name]) for name, tensor in clip.state_dict().items())
    assert isinstance(AutoProcessor.from_pretrained(tmp_path), CLIPProcessor)
    assert MoECLIPProcessor.from_pretrained(tmp_path).image_processor.size == {"height": 12, "width": 12}


def test_a_clip_keeps_how_its_images_are_normalised(moeclip, files, tmp_path, tokenizer):
    clip = PlainCLIP(vocab_size=len(tokenizer)).state_dict()
    config = {"bos_token_id": tokenizer.bos_token_id, "eos_token_id": tokenizer.eos_token_id}
    convert_openai_clip(clip, text_config=config).save_pretrained(tmp_path / "clip")
    tokenizer.save_pretrained(tmp_path / "clip")
    images = CLIPImageProcessorPil(image_mean=[0.5, 0.4, 0.3], image_std=[0.2, 0.3, 0.4])
    images.save_pretrained(tmp_path / "clip")
    status, _, _ = moeclip("convert", "openai", "--clip", tmp_path / "clip", "--output", tmp_path / "out")
    assert status == 0
    stored = AutoProcessor.from_pretrained(tmp_path / "out").image_processor
    assert (list(stored.image_mean), list(stored.image_std)) == ([0.5, 0.4, 0.3], [0.2, 0.3, 0.4])


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"{",
        b"[]",
        b"\xff\xfe",
        b'{"image_mean": "half"}',
        b'{"image_mean": [0.5]}',
        b'{"image_mean": null}',
        b'{"image_std": [0.2, 0.0, 0.2]}',
        b'{"image_std": [0.2, NaN, 0.2]}',
    ],
)
@pytest.mark.parametrize("name", ["preprocessor_config.json", "processor_config.json"])
def test_a_damaged_processor_of_a_clip_is_told_before_anything_is_written(moeclip, tmp_path, tokenizer, name, content):
    clip = PlainCLIP(vocab_size=len(tokenizer)).state_dict()
    config = {"bos_token_id": tokenizer.bos_token_id, "eos_token_id": tokenizer.eos_token_id}
    convert_openai_clip(clip, text_config=config).save_pretrained(tmp_path / "clip")
    tokenizer.save_pretrained(tmp_path / "clip")
    if name == "processor_config.json" and content.startswith(b'{"'):
        content = b'{"image_processor": ' + content + b"}"
    (tmp_path / "clip" / name).write_bytes(content)
    status, _, errors = moeclip("convert", "openai", "--clip", tmp_path / "clip", "--output", tmp_path / "out")
    assert status == 1
    assert "clip: its processor cannot be " in errors
    assert len(errors.strip().splitlines()) == 1
    assert not list((tmp_path / "out").glob("*"))


def test_weights_are_stored_in_the_type_asked_for_and_refused_where_they_overflow(moeclip, files, tmp_path):
    assert moeclip(*released(files, tmp_path / "half", "--dtype", "float16"))[0] == 0
    assert AutoModel.from_pretrained(tmp_path / "half").dtype == torch.float16
    adapter = random_adapter()
    adapter["image_adapter"]["det_proj.ln.bias"][3] = 1e5
    torch.save(adapter, tmp_path / "large.pth")
    arguments = released(files, tmp_path / "out", "--dtype", "float16")
    arguments[arguments.index("--adapter") + 1] = tmp_path / "large.pth"
    status, _, errors = moeclip(*arguments)
    assert status == 1
    assert "depthwise_adapter.layer_norm.bias" in errors
    assert not (tmp_path / "out" / "config.json").exists()


@pytest.mark.parametrize(("patch_size", "grid", "edge"), [(14, 24, 518), (14, 16, 224), (16, 21, 336)])
def test_images_are_518_pixels_for_the_clip_of_the_method_and_the_clips_own_size_else(
    tmp_path, tokenizer, patch_size, grid, edge
):
    clip = PlainCLIP(64, 64, 8, 60, grid, patch_size, 8).state_dict()
    model = convert_released(random_adapter(64, 64, 8), clip)
    save_moeclip(model, tokenizer, tmp_path)
    assert MoECLIPProcessor.from_pretrained(tmp_path).image_processor.size == {"height": edge, "width": edge}


def test_what_does_not_fit_is_one_line_and_exit_status_1(moeclip, files, tmp_path):
    status, output, errors = moeclip(*released(files, tmp_path / "out", "--moe-layers", "1,2"))
    assert (status, output) == (1, "")
    assert errors.startswith(f"moeclip: {files / 'moe_last.pth'} adapts 4 blocks, but moe_layers ([1, 2]) names 2")
    assert errors.count("\n") == 1
    assert not (tmp_path / "out").exists()


def test_wrong_usage_is_exit_status_2_and_names_the_option(moeclip, files, tmp_path):
    output = tmp_path / "out"
    status, _, errors = moeclip(*released(files, output, "--feature-layers", "2,x"))
    assert status == 2
    assert "--feature-layers" in errors
    output.touch()
    for folder in (output, output / "below"):
        status, _, errors = moeclip(*released(files, folder))
        assert status == 2
        assert "--output" in errors


def test_without_a_tokenizer_the_merges_beside_the_clip_serve_or_openais_on_the_hub(moeclip, files, tmp_path):
    adapter, clip, output = files / "moe_last.pth", files / "ViT.pt", tmp_path / "out"
    status, _, _ = moeclip("convert", "released", "--adapter", adapter, "--clip", clip, "--output", output)
    assert status == 0
    alone = tmp_path / "ViT.pt"
    alone.write_bytes(clip.read_bytes())
    status, _, errors = moeclip("convert", "released", "--adapter", adapter, "--clip", alone, "--output", output)
    assert status == 1
    for word in ("openai/clip-vit-large-patch14", "--tokenizer", "bpe_simple_vocab_16e6.txt.gz"):
        assert word in errors


def test_a_folder_that_is_no_checkpoint_cannot_be_exported(moeclip, tmp_path):
    status, _, errors = moeclip("convert", "export", "--model", tmp_path, "--output", tmp_path / "moe.pth")
    assert status == 1
    assert str(tmp_path) in errors
    assert not (tmp_path / "moe.pth").exists()


def test_a_tokenizer_that_is_not_the_clips_is_refused_before_anything_is_written(files, tmp_path, tokenizer, moeclip):
    tokenizer.save_pretrained(tmp_path / "tokenizer")
    arguments = released(files, tmp_path / "out")
    arguments[arguments.index("--tokenizer") + 1] = tmp_path / "tokenizer"
    status, _, errors = moeclip(*arguments)
    assert status == 1
    assert f"expects {VOCAB_SIZE - 1}" in errors
    assert not (tmp_path / "out").exists()


def test_the_embedded_checkpoint_is_whole_and_small():
    """Its weights are the adapter's own: experts that differ from where a fresh model starts, in the type stored."""
    folder = EMBEDDED_CHECKPOINT
    model, info = MoECLIPModel.from_pretrained(folder, output_loading_info=True)
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    assert model.dtype == torch.float16
    assert sum(file.stat().st_size for file in folder.iterdir()) < 6_000_000
    assert (model.config.moe_layers, model.config.feature_layers) == ([1, 3, 5, 7], [4, 6, 8])
    assert all(layer.lora_B.abs().max() > 0 and layer.router.weight.abs().max() > 0 for layer in model.moe_layers)
    processor = AutoProcessor.from_pretrained(folder)
    assert processor.image_processor.size == {"height": 320, "width": 320}
    assert len(processor.tokenizer) == model.config.text_config.vocab_size
