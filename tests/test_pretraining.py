"""The recipe of the embedded checkpoint: captions, samples and the pretraining of its CLIP."""

import copy
import json
from itertools import chain

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoTokenizer, CLIPModel

from examples import captioned_textures
from examples import pretrain_tiny_clip as pretraining
from examples.captioned_textures import (
    DAMAGED,
    NORMAL,
    SUBJECTS,
    Caption,
    CaptionedTextures,
    is_true,
    patch_shares,
    render_pictures,
)
from examples.pretrain_tiny_clip import Collator, train_tokenizer
from moeclip_hf.data.textures import DEFECTS, FAMILIES
from moeclip_hf.data.textures.splits import (
    AUXILIARY_FAMILIES,
    SEEN_DEFECTS,
    TEST_FAMILIES,
    UNSEEN_DEFECTS,
    VALIDATION_FAMILIES,
)
from moeclip_hf.modeling.processing_moeclip import compose_prompts


@pytest.fixture(scope="module")
def tokenizer():
    return train_tokenizer()


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(captioned_textures, "PICTURES_A_FAMILY", 1)
        path = tmp_path_factory.mktemp("textures") / "pictures.npy"
        render_pictures(path)
    return path


@pytest.fixture(scope="module")
def samples(pictures):
    textures = CaptionedTextures(pictures, 1000, seed=3)
    return [textures[index] for index in range(80)]


def test_splits_share_nothing_and_leave_nothing_out():
    parts = (AUXILIARY_FAMILIES, VALIDATION_FAMILIES, TEST_FAMILIES)
    assert sorted(sum(parts, ())) == sorted(FAMILIES)
    assert sorted(SEEN_DEFECTS + UNSEEN_DEFECTS) == sorted(DEFECTS)


def test_families_out_of_the_auxiliary_ones_are_never_shown_damaged(samples):
    others = {SUBJECTS.index(name.replace("_", " ")) for name in VALIDATION_FAMILIES + TEST_FAMILIES}
    shown = {sample["shows"][0] for sample in samples}
    assert shown & others and shown - others
    for sample in samples:
        if sample["shows"][0] in others:
            assert sample["damage"].max() == 0
            assert not sample["has_mask"]
            assert sample["opposite"] is None
            assert sample["caption"].state == NORMAL


def test_captions_are_true_of_their_own_images_and_opposites_false(samples):
    damaged = [sample for sample in samples if sample["damage"].max() > 0]
    assert 25 < len(damaged) < 60
    for sample in samples:
        assert is_true(sample["caption"], *sample["shows"])
        assert sample["opposite"] is None or not is_true(sample["opposite"], *sample["shows"])


def test_a_caption_is_true_of_family_state_and_colour():
    crack, hole = 2 + SEEN_DEFECTS.index("crack"), 2 + SEEN_DEFECTS.index("hole")
    assert is_true(Caption(1, DAMAGED, None, ""), 1, crack, 0)
    assert not is_true(Caption(1, hole, None, ""), 1, crack, 0)
    assert not is_true(Caption(2, crack, None, ""), 1, crack, 0)
    assert not is_true(Caption(1, NORMAL, None, ""), 1, crack, 0)
    assert not is_true(Caption(1, crack, 4, ""), 1, crack, 5)
    anything = SUBJECTS.index("object")
    assert is_true(Caption(anything, crack, None, ""), 1, crack, 0)
    assert not is_true(Caption(anything, NORMAL, None, ""), 1, crack, 0)
    assert not is_true(Caption(1, crack, None, ""), anything, crack, 0)


def test_a_sample_depends_on_seed_and_index_alone(samples, pictures):
    again = CaptionedTextures(pictures, 1000, seed=3)[17]
    assert np.array_equal(again["image"], samples[17]["image"])
    assert again["caption"] == samples[17]["caption"]
    assert not np.array_equal(CaptionedTextures(pictures, 1000, seed=4)[17]["image"], samples[17]["image"])


def test_patch_shares_are_means_over_patches():
    mask = np.zeros((112, 112), dtype=bool)
    mask[8:16, 20:24] = True
    shares = patch_shares(mask).reshape(14, 14)
    assert shares[1, 2] == 0.5
    assert shares.sum() == 0.5


def test_tokenizer_holds_prompts_whole_and_ends_no_text_early(tokenizer):
    longest = max(FAMILIES, key=len).replace("_", " ")
    for sentence in chain(*compose_prompts(longest)):
        tokens = tokenizer.tokenize(sentence)
        assert len(tokens) == len(sentence.replace(".", " .").split()), tokens
    for text in ("transistor", "ähnlich Größe", "металл", "金属螺母", "🔩", "x_9 (ok)/%"):
        ids = tokenizer(text).input_ids
        assert ids.count(tokenizer.eos_token_id) == 1, text
        assert len(ids) <= pretraining.TEXT_LENGTH


def test_batch_holds_images_as_the_processor_prepares_them(samples, tokenizer):
    batch = Collator(tokenizer)(samples[:4])
    opposites = sum(sample["opposite"] is not None for sample in samples[:4])
    assert batch["input_ids"].shape[0] == batch["matches"].shape[1] == 4 + opposites
    assert batch["matches"].diagonal().all()
    mean, std = np.array([0.48145466, 0.4578275, 0.40821073]), np.array([0.26862954, 0.26130258, 0.27577711])
    expected = (samples[2]["image"][5, 7] / 255 - mean) / std
    np.testing.assert_allclose(batch["pixel_values"][2, :, 5, 7], expected, rtol=1e-5)


def test_match_loss_is_cross_entropy_to_an_even_spread_over_what_matches():
    logits = torch.tensor([[2.0, -1.0, 0.5], [0.0, 1.0, 3.0], [1.0, 1.0, 1.0]])
    matches = torch.tensor([[True, False, False], [False, True, True], [False, False, False]])
    first = -torch.log(torch.exp(torch.tensor(2.0)) / torch.exp(logits[0]).sum())
    second = -(torch.log(torch.exp(logits[1, 1:]) / torch.exp(logits[1]).sum())).mean()
    loss = pretraining.PretrainingModel.match_loss(logits, matches)
    torch.testing.assert_close(loss, (first + second) / 2)


def test_bfloat16_in_the_vision_tower_hardly_moves_loss_and_gradients(samples, tokenizer):
    torch.manual_seed(0)
    clip, batch = pretraining.tiny_clip(tokenizer), Collator(tokenizer)(samples[:8])
    plain, quick = (
        pretraining.PretrainingModel(clip),
        pretraining.PretrainingModel(copy.deepcopy(clip), torch.bfloat16),
    )
    quick.heads.load_state_dict(plain.heads.state_dict())
    seen = []
    for block in quick.clip.vision_model.encoder.layers:
        block.mlp.fc1.register_forward_hook(lambda *call: seen.append(call[2].dtype))
    losses = [model(**batch)["loss"] for model in (plain, quick)]
    for loss in losses:
        loss.backward()
    assert set(seen) == {torch.bfloat16}
    torch.testing.assert_close(losses[1], losses[0], rtol=1e-3, atol=0)
    for (name, weight), narrow in zip(plain.named_parameters(), quick.parameters(), strict=True):
        if weight.grad is None or name.endswith("k_proj.bias"):  # adding to all keys alike changes no attention
            continue
        assert narrow.grad.dtype == torch.float32
        cosine = torch.nn.functional.cosine_similarity(weight.grad.ravel(), narrow.grad.ravel(), dim=0)
        assert cosine > 0.998, name


def test_matrices_of_a_shape_at_once_take_the_steps_of_torchs_muon_one_by_one():
    generator = torch.Generator().manual_seed(0)
    shapes = [(128, 128), (512, 128), (128, 512), (128, 128), (128, 512)]
    starts = [torch.randn(shape, generator=generator) for shape in shapes]
    batched, plain = ([torch.nn.Parameter(start.clone()) for start in starts] for _ in range(2))
    settings = {"lr": 0.1, "weight_decay": 0.05, "adjust_lr_fn": "match_rms_adamw"}
    optimizers = pretraining.BatchedMuon(batched, **settings), torch.optim.Muon(plain, **settings)
    for step in range(3):
        for index, pair in enumerate(zip(batched, plain, strict=True)):
            gradient = torch.randn(pair[0].shape, generator=generator) * 10.0 ** (step - index)
            for weight in pair:
                weight.grad = gradient.clone() if index + step < 6 else None
        for optimizer in optimizers:
            optimizer.step()
        # A step is some 0.2 * 0.1 long in each number, and bfloat16 has 8 bits.
        torch.testing.assert_close(batched, plain, atol=2e-4, rtol=0)
    assert optimizers[0].state_dict()["state"].keys() == optimizers[1].state_dict()["state"].keys()


def test_command_pretrains_goes_on_after_a_cut_and_writes_a_clip(tmp_path, monkeypatch, pictures):
    def pretrain(output, *options):
        (output / "pictures.npy").symlink_to(pictures)
        arguments = ["pretrain_tiny_clip", "--output-dir", str(output), "--batch-size", "4", "--save-steps", "2"]
        monkeypatch.setattr("sys.argv", [*arguments, *options])
        pretraining.main()

    (tmp_path / "unbroken").mkdir()
    pretrain(tmp_path / "unbroken", "--max-steps", "4")
    cut = tmp_path / "cut" / "run"
    cut.mkdir(parents=True)
    (tmp_path / "unbroken" / "run" / "checkpoint-2").rename(cut / "checkpoint-2")
    (cut / "checkpoint-3").mkdir()  # killed while it was written: weights, and no state yet
    (cut / "checkpoint-3" / "model.safetensors").write_bytes(b"half")
    pretrain(tmp_path / "cut", "--max-steps", "4")
    weights, again = (load_file(tmp_path / run / "model.safetensors") for run in ("unbroken", "cut"))
    assert all(torch.equal(weights[name], again[name]) for name in weights)
    steps = json.loads((cut / "checkpoint-4" / "trainer_state.json").read_text())["global_step"]
    assert steps == 4
    assert not (cut / "checkpoint-3").exists()
    clip, tokenizer = CLIPModel.from_pretrained(tmp_path / "cut"), AutoTokenizer.from_pretrained(tmp_path / "cut")
    assert clip.config.text_config.eos_token_id == tokenizer.eos_token_id
    assert "truncation_strategy" not in json.loads((tmp_path / "cut" / "tokenizer_config.json").read_text())
