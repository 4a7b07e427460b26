"""Processor of MoECLIP: images and class names in; maps, scores, verdicts and regions out."""

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch.nn import functional as F
from transformers import BatchFeature, CLIPConfig
from transformers.processing_utils import ProcessorMixin
from transformers.utils import logging

from .image_processing_moeclip import ImageLike, MoECLIPImageProcessor
from .modeling_moeclip import MoECLIPOutput

logger = logging.get_logger(__name__)

# State phrases and sentence templates: 6 normal and 10 abnormal sentences a class, state-major.
NORMAL_STATES = ("{}", "a {}", "the {}")
ABNORMAL_STATES = ("a damaged {}", "a broken {}", "a {} with flaw", "a {} with defect", "a {} with damage")
SENTENCE_TEMPLATES = ("{}.", "a photo of {}.")

# Side and deviation, in patches, of the Gaussian that smooths anomaly maps.
_BLUR = {"industrial": (7, 1.0), "medical": (9, 1.5)}


def compose_prompts(class_name: str) -> tuple[list[str], list[str]]:
    """Write a class's 6 normal and 10 abnormal sentences."""
    normal, abnormal = (
        [template.format(state.format(class_name)) for state in states for template in SENTENCE_TEMPLATES]
        for states in (NORMAL_STATES, ABNORMAL_STATES)
    )
    return normal, abnormal


def blur_matrix(length: int, kernel_size: int, sigma: float) -> torch.Tensor:
    """
    A Gaussian blur along one edge of a grid, with reflected borders, as a (length, length) matrix.

    Reflection goes on beyond the far border, so that a grid may be smaller than half the kernel.
    """
    offsets = torch.arange(kernel_size) - kernel_size // 2
    kernel = torch.exp(-0.5 * (offsets / sigma) ** 2)
    kernel = kernel / kernel.sum()
    places = torch.arange(length)
    period = (2 * places[-1]).clamp_min(1)  # a tensor, so that a graph of any grid can be exported
    reflected = (places.unsqueeze(1) + offsets).remainder(period)
    source = torch.minimum(reflected, period - reflected)
    return torch.zeros(length, length).scatter_add_(1, source, kernel.expand(length, -1))


class MoECLIPProcessor(ProcessorMixin):
    """
    Prepares images and class names for [`MoECLIPModel`], and reads its outputs.

    Args:
        image_processor ([`MoECLIPImageProcessor`]): `from_pretrained` of a plain CLIP makes one without its crops.
        tokenizer ([`~transformers.CLIPTokenizer`])
        domain (`str`): `"industrial"` or `"medical"`; how strongly maps are smoothed and how scores are made.
        image_threshold (`float`): a score from here on is a verdict of anomalous, 0 to 1.
        pixel_threshold (`float`): pixels of a map from here on make up regions, 0 to 1. The default of both, 0.5,
            is where normal and abnormal are equally likely to the model; calibration sets better ones.
    """

    def __init__(
        self,
        image_processor: MoECLIPImageProcessor | None = None,
        tokenizer: Any = None,
        domain: str = "industrial",
        image_threshold: float = 0.5,
        pixel_threshold: float = 0.5,
        **kwargs: Any,
    ):
        self.domain = _checked_domain(domain)
        self.image_threshold = image_threshold
        self.pixel_threshold = pixel_threshold
        super().__init__(image_processor, tokenizer, **kwargs)

    @classmethod
    def _get_arguments_from_pretrained(
        cls, pretrained_model_name_or_path: Any, processor_dict: Any = None, **kwargs: Any
    ) -> list[Any]:
        """As in transformers; the image processor of a plain CLIP, which crops, is replaced by one that fits it."""
        kwargs.pop("dtype", None)  # which `pipeline` means for the model; a tokenizer that keeps it cannot be saved
        image_processor, tokenizer = super()._get_arguments_from_pretrained(
            pretrained_model_name_or_path, processor_dict, **kwargs
        )
        if not hasattr(image_processor, "patch_size"):
            names = ("revision", "token", "cache_dir", "subfolder", "local_files_only")
            where = {name: kwargs[name] for name in names if name in kwargs}
            vision: Any = CLIPConfig.from_pretrained(pretrained_model_name_or_path, **where).vision_config
            image_processor = MoECLIPImageProcessor.for_clip(
                vision.image_size,
                vision.patch_size,
                image_mean=image_processor.image_mean,
                image_std=image_processor.image_std,
            )
        return [image_processor, tokenizer]

    def __call__(
        self,
        images: ImageLike | Sequence[ImageLike] | None = None,
        text: str | Sequence[str] | None = None,
        return_tensors: str | None = None,
        size: dict[str, int] | int | None = None,
        padding: bool | str = True,
    ) -> BatchFeature:
        """
        Prepare a model's inputs.

        Args:
            images: one image or several, as [`MoECLIPImageProcessor`] takes them.
            text (`str` or `list[str]`): class names such as "metal nut"; "object" serves when none is known. A name
                too long for the text tower is cut, with a warning.
            return_tensors (`str`, *optional*): `"pt"`, `"np"` or `None`.
            size (`dict[str, int]`, *optional*): that images are resized to, instead of the image processor's own.
            padding (`bool` or `str`): of sentences; `"max_length"` pads them to the text tower's length.

        Returns:
            `BatchFeature`: `pixel_values` (B, 3, H, W) of the images; of the text `input_ids` and `attention_mask`
            (P, length) and `prompt_groups` (P,), 2c for a normal and 2c + 1 for an abnormal sentence of class c.
        """
        if images is None and text is None:
            raise ValueError("Pass images, text (class names) or both.")
        data: dict[str, Any] = {}
        if images is not None:
            data.update(self.image_processor(images, return_tensors=return_tensors, size=size))
        if text is not None:
            data.update(self._encode_class_names([text] if isinstance(text, str) else list(text), padding))
        return BatchFeature(data, tensor_type=return_tensors)

    def _encode_class_names(self, class_names: list[str], padding: bool | str) -> dict[str, Any]:
        if not class_names:
            raise ValueError('There is no class name: use "object" when none is known.')
        input_ids, groups = [], []
        for index, name in enumerate(class_names):
            if not isinstance(name, str) or not name.isprintable():
                raise ValueError(f"A class name is a printable text, not {name!r}.")
            if not name.strip():
                raise ValueError('A class name is empty: use "object" when none is known.')
            if self.tokenizer.bos_token in name or self.tokenizer.eos_token in name:
                raise ValueError(
                    f"A class name cannot hold marks of a sentence's begin or end, as {name[:60]!r} does."
                )
            fitting, encoded = self._fit(name)
            if fitting != name.strip():
                logger.warning(f"The class name {name[:60]!r}... is too long for the text tower; read as {fitting!r}.")
            input_ids += encoded
            for is_abnormal, prompts in enumerate(compose_prompts(fitting)):
                groups += [2 * index + is_abnormal] * len(prompts)
        padded = self.tokenizer.pad({"input_ids": input_ids}, padding=padding, return_attention_mask=True)
        return {**padded, "prompt_groups": groups}

    def fit_class_name(self, name: str) -> str:
        """
        Cut a class name to the length at which its longest sentence still fits the text tower.

        Args:
            name (`str`): with or without spaces around it.

        Raises:
            ValueError: where not even a part of it fits.
        """
        return self._fit(name)[0]

    def _fit(self, name: str) -> tuple[str, list[list[int]]]:
        """A class name, cut where it has to be, and the tokens of its 16 sentences."""
        fitting = name = name.strip()
        # Once more where a word that was cut falls into more pieces than it was part of.
        while (excess := max(map(len, encoded := self._encode(fitting))) - self.tokenizer.model_max_length) > 0:
            parts = self.tokenizer(fitting, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
            ends = [end for _, end in parts["offset_mapping"]]
            fitting = fitting[: min(ends[-excess - 1], len(fitting) - 1)].rstrip() if excess < len(ends) else ""
            if not fitting:
                raise ValueError(
                    f"No class name fits sentences of {self.tokenizer.model_max_length} tokens: {name[:60]!r}."
                )
        return fitting, encoded

    def _encode(self, name: str) -> list[list[int]]:
        """
        The tokens of a class name's sentences, of unlike lengths. Nothing here has the tokenizer pad: it would do so
        in every thread that shares it.
        """
        normal, abnormal = compose_prompts(name)
        return self.tokenizer(normal + abnormal, verbose=False)["input_ids"]

    def post_process_anomaly_maps(
        self, outputs: MoECLIPOutput, target_sizes: tuple[int, int], domain: str | None = None
    ) -> torch.Tensor:
        """
        The benchmark's anomaly maps: `(s_a + 1 - s_n) / 2` per map, smoothed on the patch grid, upsampled, summed.

        All three are linear, so one smoothing and one upsampling serve all maps.

        Args:
            outputs ([`MoECLIPOutput`])
            target_sizes (`tuple[int, int]`): (H, W) of the maps.
            domain (`str`, *optional*): instead of the processor's own.

        Returns:
            `torch.Tensor` of shape (B, H, W), on the benchmark's own scale, which is not 0 to 1.
        """
        if len(target_sizes) != 2:
            raise ValueError(f"target_sizes ({target_sizes}) must be one (H, W) for all maps of the benchmark.")
        summed = ((outputs.anomaly_logits + 1) / 2).sum(dim=1)
        return upsample(smooth(summed, domain or self.domain), target_sizes)

    def post_process_anomaly_detection(
        self,
        outputs: MoECLIPOutput,
        target_sizes: Any = None,
        threshold: float | None = None,
        pixel_threshold: float | None = None,
        domain: str | None = None,
    ) -> list[dict[str, Any]]:
        """
        Read a verdict for each image, from that image and the checkpoint alone.

        Every one of the M maps holds, as trained, a softmax's probability of abnormal; they are smoothed and upsampled
        as the benchmark's maps are, and averaged. The score is the map's maximum, and in industry its mean with the
        probability of abnormal that the image embedding gives, a softmax of its two cosines as trained. The maximum is
        taken over patches, so that a score does not depend on the size of the map.

        Args:
            outputs ([`MoECLIPOutput`])
            target_sizes (`list[tuple[int, int]]`, *optional*): (H, W) an image, or one for all; the patch grid's own
                by default.
            threshold (`float`, *optional*): of the verdict, instead of the processor's `image_threshold`.
            pixel_threshold (`float`, *optional*): of the regions, instead of the processor's own.
            domain (`str`, *optional*): instead of the processor's own.

        Returns:
            A dict an image: `score` (`float`, 0 to 1), `map` (`torch.Tensor` of shape (H, W), 0 to 1), `is_anomalous`
            (`bool`) and `regions`, a list of dicts with `box` ([left, top, right, bottom] in pixels, the last two
            exclusive), `area` (pixels) and `score` (the map's maximum within), highest score first.
        """
        return self.read_patch_maps(
            *patch_maps(outputs, domain or self.domain), target_sizes, threshold, pixel_threshold
        )

    def read_patch_maps(
        self,
        grids: torch.Tensor,
        scores: torch.Tensor,
        target_sizes: Any = None,
        threshold: float | None = None,
        pixel_threshold: float | None = None,
    ) -> list[dict[str, Any]]:
        """
        Read verdicts off smoothed maps and scores, as [`patch_maps`] or an exported graph gives them.

        Args:
            grids (`torch.Tensor`): (B, h, w), 0 to 1.
            scores (`torch.Tensor`): (B,), 0 to 1.
            target_sizes, threshold, pixel_threshold: as for
                [`~MoECLIPProcessor.post_process_anomaly_detection`], which returns the same.
        """
        if target_sizes is None:
            target_sizes = [(grids.shape[-2], grids.shape[-1])] * len(grids)
        elif len(target_sizes) == 2 and all(isinstance(edge, int) for edge in target_sizes):
            target_sizes = [target_sizes] * len(grids)
        if len(target_sizes) != len(grids):
            raise ValueError(f"There are {len(target_sizes)} target_sizes for {len(grids)} images.")
        threshold = self.image_threshold if threshold is None else threshold
        pixel_threshold = self.pixel_threshold if pixel_threshold is None else pixel_threshold
        results = []
        for grid, score, (height, width) in zip(grids, read_scores(scores), target_sizes, strict=True):
            anomaly_map = upsample(grid.unsqueeze(0), (int(height), int(width)))[0]
            results.append(
                {
                    "score": score,
                    "map": anomaly_map,
                    "is_anomalous": score >= threshold,
                    "regions": find_regions(anomaly_map, pixel_threshold),
                }
            )
        return results


def patch_maps(outputs: MoECLIPOutput, domain: str) -> tuple[torch.Tensor, torch.Tensor]:
    """
    Maps on the patch grid and scores, as [`MoECLIPProcessor.post_process_anomaly_detection`] describes them.

    Args:
        outputs ([`MoECLIPOutput`])
        domain (`str`): `"industrial"` or `"medical"`.

    Returns:
        Maps (B, h, w) and scores (B,), both 0 to 1.
    """
    # A sigmoid, written out: onnxruntime's own ends at 1.5e-8, and the order of faultless pixels would be lost.
    abnormal = (1 + (-outputs.anomaly_logits).exp()).reciprocal()
    grids = smooth(abnormal.mean(dim=1), domain)
    scores = grids.flatten(1).amax(dim=1)
    if domain == "industrial":
        scores = (scores + outputs.logits_per_image.softmax(dim=1)[:, 1]) / 2
    return grids, scores


def read_scores(scores: torch.Tensor) -> list[float]:
    """
    Scores (B,) as numbers.

    Raises:
        ValueError: for NaN, which holds for a map as well, as its maximum is in the score. No threshold is reached by
            NaN, and the image would pass for normal.
    """
    numbers: list[float] = scores.tolist()
    if any(map(math.isnan, numbers)):
        raise ValueError("The model gives NaN: its weights hold NaN, or its type is too narrow for it; try float32.")
    return numbers


def smooth(grids: torch.Tensor, domain: str) -> torch.Tensor:
    """Blur maps (B, h, w) on the patch grid: 7 x 7 and sigma 1 in industry, 9 x 9 and sigma 1.5 in medicine."""
    kernel_size, sigma = _BLUR[_checked_domain(domain)]
    rows, columns = (blur_matrix(length, kernel_size, sigma).to(grids) for length in grids.shape[-2:])
    return rows @ grids @ columns.T


def find_regions(anomaly_map: torch.Tensor, threshold: float) -> list[dict[str, Any]]:
    """
    Find the connected areas (8 neighbours) of a map at or over a threshold.

    Args:
        anomaly_map (`torch.Tensor`): (H, W).
        threshold (`float`)

    Returns:
        Dicts with `box` ([left, top, right, bottom], the last two exclusive), `area` (pixels) and `score` (the maximum
        within), highest score first.
    """
    from scipy import ndimage

    values = anomaly_map.detach().float().cpu().numpy()
    labels, _ = ndimage.label(values >= threshold, structure=[[1, 1, 1]] * 3)
    regions = []
    for label, (rows, columns) in enumerate(ndimage.find_objects(labels), start=1):
        inside = labels[rows, columns] == label
        regions.append(
            {
                "box": [columns.start, rows.start, columns.stop, rows.stop],
                "area": int(inside.sum()),
                "score": float(values[rows, columns][inside].max()),
            }
        )
    return sorted(regions, key=lambda region: region["score"], reverse=True)


def upsample(grid: torch.Tensor, size: tuple[int, int]) -> torch.Tensor:
    """(B, h, w) to (B, H, W): bilinear, corners aligned."""
    return F.interpolate(grid.unsqueeze(1), size=tuple(size), mode="bilinear", align_corners=True).squeeze(1)


def _checked_domain(domain: str) -> str:
    if domain not in _BLUR:
        raise ValueError(f'domain must be "industrial" or "medical", not {domain!r}.')
    return domain


__all__ = [
    "MoECLIPProcessor",
    "blur_matrix",
    "compose_prompts",
    "find_regions",
    "patch_maps",
    "read_scores",
    "smooth",
    "upsample",
]
