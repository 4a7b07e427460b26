"""Images and class names in; maps, scores, verdicts and regions out."""

import math
import sys
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
from golden import CASES, golden_case
from PIL import Image
from tiny_models import tiny_model
from torch.nn import functional as F

from moeclip_hf import MoECLIPImageProcessor, MoECLIPOutput, MoECLIPProcessor
from moeclip_hf.data import BENCHMARKS
from moeclip_hf.modeling.image_processing_moeclip import open_image, to_rgb
from moeclip_hf.modeling.processing_moeclip import blur_matrix, compose_prompts, find_regions
from moeclip_hf.pretrained import EMBEDDED_CHECKPOINT


@pytest.fixture(scope="module")
def processor(tokenizer):
    return MoECLIPProcessor(MoECLIPImageProcessor(size={"height": 28, "width": 28}), tokenizer)


def random_outputs(num_images: int = 3, num_maps: int = 4, grid: tuple[int, int] = (6, 5)) -> MoECLIPOutput:
    generator = torch.Generator().manual_seed(0)
    return MoECLIPOutput(
        anomaly_logits=4 * torch.randn(num_images, num_maps, *grid, generator=generator),
        logits_per_image=torch.rand(num_images, 2, generator=generator),
    )


# Class names


def test_sentences_are_the_reference_ones(processor):
    for prompts in golden_case("default").prompts.values():
        name = prompts[0][0].removesuffix(".")
        assert list(compose_prompts(name)) == prompts


def test_class_names_become_grouped_sentences(processor):
    inputs = processor(text=["metal nut", "wood"], return_tensors="pt")
    assert inputs["input_ids"].shape == inputs["attention_mask"].shape
    assert inputs["prompt_groups"].tolist() == [0] * 6 + [1] * 10 + [2] * 6 + [3] * 10
    decoded = processor.tokenizer.batch_decode(inputs["input_ids"], skip_special_tokens=True)
    normal, abnormal = compose_prompts("wood")
    assert [text.replace(" ", "") for text in decoded[16:]] == [s.replace(" ", "") for s in normal + abnormal]
    alone = processor(text="wood", return_tensors="pt")["input_ids"]
    assert torch.equal(alone, inputs["input_ids"][16:, : alone.shape[1]])


def test_a_name_too_long_is_cut_and_said_and_keeps_the_words_that_tell_abnormal(processor, caplog):
    name = " ".join(["wood"] * 10_000)
    inputs = processor(text=[name], return_tensors="pt")
    limit = processor.tokenizer.model_max_length
    assert inputs["input_ids"].shape[1] <= limit
    assert "too long" in caplog.text
    decoded = processor.tokenizer.batch_decode(inputs["input_ids"], skip_special_tokens=True)
    assert decoded[-1].replace(" ", "").endswith("withdamage.")


def test_a_word_that_is_cut_may_fall_into_more_tokens():
    processor = MoECLIPProcessor.from_pretrained(EMBEDDED_CHECKPOINT)
    limit = processor.tokenizer.model_max_length
    for benchmark in BENCHMARKS.values():
        for name in benchmark.classes.values():
            assert processor(text=[name], return_tensors="pt")["input_ids"].shape[1] <= limit, name


def test_threads_that_share_a_processor_get_what_one_gets():
    processor = MoECLIPProcessor.from_pretrained(EMBEDDED_CHECKPOINT)
    names = ["brick", "brick wall with moss", "brick wall " * 40]
    expected = [processor(text=[name], return_tensors="pt") for name in names]
    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)  # between any two steps, as it may happen
    try:
        with ThreadPoolExecutor(8) as threads:
            found = list(threads.map(lambda name: processor(text=[name], return_tensors="pt"), names * 40))
    finally:
        sys.setswitchinterval(interval)
    for ours, theirs in zip(found, expected * 40, strict=True):
        assert ours.keys() == theirs.keys()
        assert all(torch.equal(ours[key], theirs[key]) for key in theirs)


def test_sentences_are_padded_as_asked_and_the_mask_tells(processor):
    end = processor.tokenizer.eos_token_id
    alone = processor(text="wood", padding=False)
    limit = processor.tokenizer.model_max_length
    for padding, length in ((True, max(map(len, alone["input_ids"]))), ("max_length", limit)):
        padded = processor(text="wood", padding=padding)
        for tokens, ids, mask in zip(alone["input_ids"], padded["input_ids"], padded["attention_mask"], strict=True):
            assert tokens[-1] == end
            filling = length - len(tokens)
            assert ids == tokens + [processor.tokenizer.pad_token_id] * filling
            assert mask == [1] * len(tokens) + [0] * filling


@pytest.mark.parametrize("names", [["wood", "  "], [""], []])
def test_an_empty_name_is_refused_with_the_remedy(processor, names):
    with pytest.raises(ValueError, match='use "object"'):
        processor(text=names)


@pytest.mark.parametrize("name", [1, "two\nlines", "\udcff"])
def test_what_is_no_printable_text_is_no_name(processor, name):
    with pytest.raises(ValueError, match="printable text"):
        processor(text=[name])


def test_unknown_arguments_are_refused_and_known_ones_count(processor):
    with pytest.raises(TypeError, match="do_resize"):
        processor(images=GREY, do_resize=False)
    assert processor(images=GREY, size=56, return_tensors="pt")["pixel_values"].shape == (1, 3, 56, 56)
    padded = processor(text="wood", padding="max_length", return_tensors="pt")["input_ids"]
    assert padded.shape[1] == processor.tokenizer.model_max_length
    with pytest.raises(ValueError, match="smaller than a patch"):
        processor(images=GREY, size=3)


# Images


def test_pixels_are_resized_by_pil_and_normalised(processor):
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (50, 81, 3), dtype=np.uint8))
    pixel_values = processor(images=[image], return_tensors="pt")["pixel_values"]
    resized = np.asarray(image.resize((28, 28), Image.Resampling.BICUBIC), dtype=np.float64) / 255
    mean, std = np.array([0.48145466, 0.4578275, 0.40821073]), np.array([0.26862954, 0.26130258, 0.27577711])
    expected = torch.from_numpy(((resized - mean) / std).transpose(2, 0, 1)).float()
    assert pixel_values.shape == (1, 3, 28, 28)
    assert torch.allclose(pixel_values[0], expected, atol=1e-5)


def test_an_aspect_ratio_can_be_kept(tokenizer):
    image_processor = MoECLIPImageProcessor(size={"shortest_edge": 56}, patch_size=14)
    wide, tall = Image.new("RGB", (400, 200)), Image.new("RGB", (90, 300))
    assert image_processor(wide, return_tensors="pt")["pixel_values"].shape == (1, 3, 56, 112)
    assert image_processor(tall, return_tensors="pt")["pixel_values"].shape == (1, 3, 182, 56)
    with pytest.raises(ValueError, match="unlike aspect ratios"):
        image_processor([wide, tall], return_tensors="pt")
    assert len(image_processor([wide, tall])["pixel_values"]) == 2


def same_picture(image, expected: np.ndarray, tolerance: int = 0) -> bool:
    actual = np.asarray(to_rgb(image)).astype(int)
    return actual.shape == expected.shape and np.abs(actual - expected).max() <= tolerance


GREY = np.arange(200, dtype=np.uint8).reshape(10, 20)
COLOUR = np.random.default_rng(1).integers(0, 256, (10, 20, 3), dtype=np.uint8)
GREY_RGB = np.repeat(GREY[..., None], 3, axis=2)


@pytest.mark.parametrize(
    "image",
    [
        Image.fromarray(GREY),
        Image.fromarray(GREY.astype(np.uint16) * 257),
        Image.fromarray(GREY.astype(np.int32) * 257),
        Image.fromarray(GREY.astype(np.float32) / 255),
        Image.fromarray(GREY.astype(np.float32)),
        GREY,
        GREY[..., None],
        GREY[None],
        GREY.astype(np.uint16) * 257,
        torch.from_numpy(GREY),
        torch.from_numpy(GREY_RGB).permute(2, 0, 1),
        torch.from_numpy(GREY_RGB).permute(2, 0, 1).float() / 255,
        GREY.astype(np.int64),
    ],
)
def test_grey_images_of_every_kind_are_one_picture(image):
    assert same_picture(image, GREY_RGB, tolerance=0)


def test_colour_images_of_every_mode_are_one_picture(tmp_path):
    image = Image.fromarray(COLOUR)
    assert same_picture(image, COLOUR)
    assert same_picture(image.convert("RGBA"), COLOUR)
    assert same_picture(image.convert("CMYK"), COLOUR, tolerance=1)
    palette = image.quantize(256)
    assert same_picture(palette, np.asarray(palette.convert("RGB")))
    for suffix in ("png", "bmp", "tif", "webp"):
        path = tmp_path / f"image.{suffix}"
        image.save(path, lossless=True)
        assert same_picture(path, COLOUR), suffix
        assert same_picture(str(path), COLOUR), suffix


def test_ten_or_twelve_bits_in_sixteen_are_told_once_by_name(tmp_path, caplog):
    camera, whole = tmp_path / "mono12.png", tmp_path / "mono16.png"
    Image.fromarray(GREY.astype(np.uint16) * 16).save(camera)
    Image.fromarray(GREY.astype(np.uint16) * 257).save(whole)
    for _ in range(2):
        assert same_picture(camera, np.rint(GREY_RGB * (16 / 257)))
        assert same_picture(whole, GREY_RGB)
        same_picture(Image.fromarray(np.zeros((4, 4), dtype=np.uint16)), np.zeros((4, 4, 3)))
    (told,) = caplog.messages
    assert told == f"{camera}: looks like 10 or 12 bits in 16 (it reaches 3184): scale it to 65535."


def test_floats_that_overshoot_their_range_are_clipped_not_read_on_another_scale():
    assert np.asarray(to_rgb(np.array([[0.5, 1.0001, -0.001]], dtype=np.float32)))[0, :, 0].tolist() == [128, 255, 0]


def test_half_precision_tensors_are_images():
    grey = torch.tensor([[0.0, 0.5, 1.0]], dtype=torch.bfloat16)
    assert np.asarray(to_rgb(grey))[0, :, 0].tolist() == [0, 128, 255]


def test_transparency_lies_over_white():
    transparent = np.dstack([COLOUR, np.zeros((10, 20), dtype=np.uint8)])
    assert same_picture(Image.fromarray(transparent), np.full((10, 20, 3), 255))
    palette = Image.fromarray(COLOUR).quantize(4)
    palette.info["transparency"] = bytes(4)
    assert same_picture(palette, np.full((10, 20, 3), 255))


@pytest.mark.parametrize("orientation", range(1, 9))
def test_files_are_read_upright(tmp_path, orientation):
    upright = Image.fromarray(COLOUR)
    inverse = {2: [0], 3: [3], 4: [1], 5: [5], 6: [2], 7: [6], 8: [4]}  # PIL's transpositions that undo the rotation
    stored = upright
    for method in inverse.get(orientation, []):
        stored = stored.transpose(Image.Transpose(method))
    exif = Image.Exif()
    exif[0x0112] = orientation
    stored.save(tmp_path / "image.png", exif=exif)
    assert same_picture(tmp_path / "image.png", COLOUR)


@pytest.mark.parametrize(
    ("array", "words"),
    [
        (np.full((4, 4), np.nan, dtype=np.float32), "NaN"),
        (np.full((4, 4), np.inf, dtype=np.float32), "infinite"),
        (np.full((4, 4), -0.5, dtype=np.float32), "-0.5"),
        (np.full((4, 4), 300.0, dtype=np.float32), "300"),
        (np.full((4, 4), 300), "16 bits take uint16"),
        (np.zeros((5, 5, 7), dtype=np.uint8), r"\(5, 5, 7\)"),
        (np.zeros((0, 4), dtype=np.uint8), r"\(0, 4\)"),
        (np.zeros(5, dtype=np.uint8), r"\(5,\)"),
    ],
)
def test_arrays_that_are_no_images_are_refused(array, words):
    with pytest.raises(ValueError, match=words):
        to_rgb(array)


def test_files_that_are_no_images_are_named(tmp_path):
    with pytest.raises(ValueError, match=r"missing\.png: no such file"):
        open_image(tmp_path / "missing.png")
    for name, content in {"empty.png": b"", "text.png": b"hello", "cut.png": _png()[:60]}.items():
        (tmp_path / name).write_bytes(content)
        with pytest.raises(ValueError, match=f"{name}: cannot be read"):
            open_image(tmp_path / name)


def test_a_damaged_exif_block_is_said_in_one_line(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.fromarray(COLOUR).save(tmp_path / "image.jpg", exif=exif)
    content = bytearray((tmp_path / "image.jpg").read_bytes())
    start = content.index(b"Exif")
    content[start + 6 : start + 40] = bytes(range(34))
    (tmp_path / "image.jpg").write_bytes(content)
    try:
        to_rgb(tmp_path / "image.jpg")
    except ValueError as error:
        assert "image.jpg: cannot be read" in str(error)


def _png() -> bytes:
    import io

    buffer = io.BytesIO()
    Image.fromarray(COLOUR).save(buffer, "png")
    return buffer.getvalue()


# Maps


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("domain", ["Industrial", "Medical"])
def test_benchmark_maps_equal_the_reference(processor, name, domain):
    case = golden_case(name)
    with torch.no_grad():
        outputs = case.model(
            case.inputs["pixel_values"],
            input_ids=case.input_ids,
            prompt_groups=case.prompt_groups,
            class_index=case.class_index([case.config["score_class"]] * 3),
        )
        maps = processor.post_process_anomaly_maps(outputs, target_sizes=(70, 70), domain=domain.lower())
    expected = case.outputs[f"anomaly_map.{domain}"]
    assert (maps - expected).abs().max() / expected.abs().max() < 1e-5


@pytest.mark.parametrize(("kernel_size", "sigma"), [(7, 1.0), (9, 1.5)])
@pytest.mark.parametrize("length", [5, 8, 37])
def test_the_blur_is_a_gaussian_with_reflected_borders(length, kernel_size, sigma):
    values = torch.randn(1, 1, length, generator=torch.Generator().manual_seed(length))
    kernel = torch.tensor(
        [math.exp(-(o**2) / (2 * sigma**2)) for o in range(-(kernel_size // 2), kernel_size // 2 + 1)]
    )
    padded = F.pad(values, (kernel_size // 2, kernel_size // 2), mode="reflect")
    expected = F.conv1d(padded, (kernel / kernel.sum()).view(1, 1, -1))[0, 0]
    assert torch.allclose(blur_matrix(length, kernel_size, sigma) @ values[0, 0], expected, atol=1e-6)


@pytest.mark.parametrize("length", [1, 2, 3])
def test_the_blur_holds_on_grids_smaller_than_its_kernel(length):
    matrix = blur_matrix(length, 9, 1.5)
    assert torch.allclose(matrix.sum(dim=1), torch.ones(length))
    reflected = np.pad(np.eye(length), ((4, 4), (0, 0)), mode="reflect") if length > 1 else np.ones((9, 1))
    kernel = np.exp(-(np.arange(-4, 5) ** 2) / (2 * 1.5**2))
    expected = [kernel / kernel.sum() @ reflected[i : i + 9] for i in range(length)]
    assert torch.allclose(matrix, torch.tensor(np.array(expected), dtype=torch.float32), atol=1e-6)


def test_one_blur_and_one_upsampling_equal_one_a_map(processor):
    outputs = random_outputs()
    kernel = blur_matrix(6, 7, 1.0), blur_matrix(5, 7, 1.0)
    expected = torch.zeros(3, 20, 30)
    for number in range(outputs.anomaly_logits.shape[1]):
        blurred = kernel[0] @ ((outputs.anomaly_logits[:, number] + 1) / 2) @ kernel[1].T
        expected += F.interpolate(blurred[:, None], size=(20, 30), mode="bilinear", align_corners=True)[:, 0]
    maps = processor.post_process_anomaly_maps(outputs, (20, 30))
    assert torch.allclose(maps, expected, atol=1e-4)


# Verdicts


@pytest.mark.parametrize("domain", ["industrial", "medical"])
def test_a_verdict_depends_on_its_image_alone(processor, domain):
    outputs = random_outputs()
    sizes = [(20, 30), (40, 7), (11, 11)]
    together = processor.post_process_anomaly_detection(outputs, sizes, domain=domain)
    for index, size in enumerate(sizes):
        alone = MoECLIPOutput(
            anomaly_logits=outputs.anomaly_logits[index : index + 1],
            logits_per_image=outputs.logits_per_image[index : index + 1],
        )
        result = processor.post_process_anomaly_detection(alone, [size], domain=domain)[0]
        assert result["map"].shape == together[index]["map"].shape == size
        assert torch.allclose(result["map"], together[index]["map"], atol=1e-6)
        assert result["score"] == pytest.approx(together[index]["score"], abs=1e-6)
        other_size = processor.post_process_anomaly_detection(alone, [(91, 17)], domain=domain)[0]
        assert other_size["score"] == result["score"]
        assert 0 <= result["score"] <= 1
        assert result["map"].min() >= 0
        assert result["map"].max() <= 1


@pytest.mark.parametrize("domain", ["industrial", "medical"])
def test_maps_are_means_of_each_maps_probability_of_abnormal(processor, domain):
    outputs = random_outputs()
    kernel = {"industrial": (7, 1.0), "medical": (9, 1.5)}[domain]
    rows, columns = blur_matrix(6, *kernel), blur_matrix(5, *kernel)
    expected = torch.zeros(3, 20, 30)
    for number in range(4):
        normal_and_abnormal = torch.stack([torch.zeros(3, 6, 5), outputs.anomaly_logits[:, number]], dim=1)
        blurred = rows @ normal_and_abnormal.softmax(dim=1)[:, 1] @ columns.T
        expected += F.interpolate(blurred[:, None], size=(20, 30), mode="bilinear", align_corners=True)[:, 0] / 4
    results = processor.post_process_anomaly_detection(outputs, [(20, 30)] * 3, domain=domain)
    assert torch.allclose(torch.stack([result["map"] for result in results]), expected, atol=1e-6)


def test_scores_are_fused_as_the_domain_asks(processor):
    outputs = MoECLIPOutput(anomaly_logits=torch.zeros(1, 2, 4, 4), logits_per_image=torch.tensor([[0.1, 0.6]]))
    industrial = processor.post_process_anomaly_detection(outputs)[0]
    medical = processor.post_process_anomaly_detection(outputs, domain="medical")[0]
    assert industrial["score"] == pytest.approx((0.5 + 1 / (1 + math.exp(-0.5))) / 2)
    assert medical["score"] == pytest.approx(0.5)
    with pytest.raises(ValueError, match="'agricultural'"):
        processor.post_process_anomaly_detection(outputs, domain="agricultural")


def test_thresholds_are_the_processors_unless_given(processor, tokenizer):
    outputs = MoECLIPOutput(anomaly_logits=torch.zeros(1, 2, 4, 4), logits_per_image=torch.tensor([[0.1, 0.6]]))
    assert processor.post_process_anomaly_detection(outputs)[0]["is_anomalous"] is True
    assert processor.post_process_anomaly_detection(outputs, threshold=0.6)[0]["is_anomalous"] is False
    calibrated = MoECLIPProcessor(processor.image_processor, tokenizer, image_threshold=0.57, pixel_threshold=0.6)
    result = calibrated.post_process_anomaly_detection(outputs)[0]
    assert (result["is_anomalous"], result["regions"]) == (False, [])


def test_regions_are_connected_areas_with_box_area_and_score():
    anomaly_map = torch.zeros(10, 12)
    anomaly_map[1:3, 2:5] = 0.7
    anomaly_map[3, 5] = 0.9  # touches the first by a corner
    anomaly_map[7, 9:11] = 0.6
    anomaly_map[5, 0] = 0.4
    assert find_regions(anomaly_map, 0.5) == [
        {"box": [2, 1, 6, 4], "area": 7, "score": pytest.approx(0.9)},
        {"box": [9, 7, 11, 8], "area": 2, "score": pytest.approx(0.6)},
    ]
    assert find_regions(anomaly_map, 0.95) == []


# Files


def test_the_processor_survives_its_files(processor, tmp_path):
    from transformers import AutoProcessor

    saved = MoECLIPProcessor(
        MoECLIPImageProcessor(size={"shortest_edge": 42}, patch_size=7, image_mean=[0.1, 0.2, 0.3]),
        processor.tokenizer,
        domain="medical",
        image_threshold=0.625,
        pixel_threshold=0.375,
    )
    saved.save_pretrained(tmp_path / "moeclip")
    tiny_model().save_pretrained(tmp_path / "moeclip")
    for loaded in (
        AutoProcessor.from_pretrained(tmp_path / "moeclip"),
        MoECLIPProcessor.from_pretrained(tmp_path / "moeclip"),
    ):
        assert type(loaded) is MoECLIPProcessor
        assert loaded.image_processor.to_dict() == saved.image_processor.to_dict()
        assert (loaded.domain, loaded.image_threshold, loaded.pixel_threshold) == ("medical", 0.625, 0.375)
        assert loaded(text=["wood"])["input_ids"] == saved(text=["wood"])["input_ids"]


def test_a_plain_clips_processor_loses_its_crop_and_gains_the_methods_size(tokenizer, tmp_path):
    from transformers import CLIPConfig, CLIPImageProcessorPil, CLIPProcessor

    for edge, patch_size, expected in ((336, 14, 518), (224, 32, 224)):
        CLIPConfig(vision_config={"image_size": edge, "patch_size": patch_size}).save_pretrained(tmp_path)
        clip = CLIPImageProcessorPil(size={"shortest_edge": edge}, crop_size={"height": edge, "width": edge})
        CLIPProcessor(clip, tokenizer).save_pretrained(tmp_path)
        processor = MoECLIPProcessor.from_pretrained(tmp_path)
        pixel_values = processor(images=Image.new("RGB", (300, 100)), return_tensors="pt")["pixel_values"]
        assert pixel_values.shape == (1, 3, expected, expected)
        assert processor.image_processor.patch_size == patch_size


def test_a_plain_clip_in_a_subfolder_is_told_its_size_by_its_own_configuration(tokenizer, tmp_path):
    from transformers import CLIPConfig, CLIPImageProcessorPil, CLIPProcessor

    for folder, patch_size in ((tmp_path, 16), (tmp_path / "clip", 14)):
        CLIPConfig(vision_config={"image_size": 224, "patch_size": patch_size}).save_pretrained(folder)
        CLIPProcessor(CLIPImageProcessorPil(), tokenizer).save_pretrained(folder)
    processor = MoECLIPProcessor.from_pretrained(tmp_path, subfolder="clip")
    assert processor.image_processor.patch_size == 14
