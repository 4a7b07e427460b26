"""The pipeline "zero-shot-anomaly-detection": images and a class name in; scores, verdicts and heat maps out."""

import base64
import os
from http.client import HTTPException
from io import BytesIO
from numbers import Real
from typing import Any
from urllib.request import Request, urlopen

import numpy as np
import torch
from PIL import Image
from transformers.pipelines.base import Pipeline
from transformers.utils import logging

from .image_processing_moeclip import ImageLike, open_image, to_rgb
from .modeling_moeclip import MoECLIPOutput

logger = logging.get_logger(__name__)

# Anchors of so many class names are kept at most; where names come from strangers, there is no end to them.
_MAX_ANCHORS = 1024
# Some servers turn away clients without a name.
_USER_AGENT = "moeclip-hf"


class ZeroShotAnomalyDetectionPipeline(Pipeline):
    """
    Tells of images whether what they show is damaged, and where: by the name of what they show, without training.

    The anchors of a class name are computed once and kept for later calls. No score depends on the batch.

    Example:

    ```python
    >>> from transformers import pipeline

    >>> detect = pipeline("zero-shot-anomaly-detection", model="user/moeclip", trust_remote_code=True)
    >>> detect("part.png", class_name="metal nut")
    {'score': 0.71, 'map': tensor(...), 'is_anomalous': True, 'regions': [...], 'heatmap': <PIL.Image.Image>}
    ```

    With the package `moeclip_hf` imported it runs the package's code, and takes no `trust_remote_code`.
    """

    processor: Any
    _load_processor = True
    _load_tokenizer = False
    _load_image_processor = False
    _load_feature_extractor = False
    _load_video_processor = False

    def __init__(self, *args: Any, **kwargs: Any):
        super().__init__(*args, **kwargs)
        if not hasattr(self.processor, "post_process_anomaly_detection"):
            raise ValueError(f"The pipeline takes a MoECLIP and its processor, not a {type(self.processor).__name__}.")
        self.model.eval()
        self._anchors: dict[str, torch.Tensor] = {}

    def __call__(self, inputs: Any, **kwargs: Any) -> Any:
        """
        Score images.

        Args:
            inputs: an image or several: a path, a URL, base64 (also as a `data:` URI), the bytes of a file, a PIL
                image (turned upright as its EXIF tells, like a file), an array or a tensor; or a dict with such an
                `image` and its `class_name`, such as a data set's row, of which no more is read. A list, a generator
                or a torch data set of them.
            class_name (`str`, *optional*, defaults to "object"): what the images show, such as "metal nut".
            threshold (`float`, *optional*): a score from here on is a verdict of anomalous, 0 to 1; by default the
                processor's, which calibration sets.
            pixel_threshold (`float`, *optional*): pixels of a map from here on make regions, 0 to 1; by default the
                processor's.
            timeout (`float`, *optional*): seconds to wait for a URL.
            batch_size (`int`, *optional*, defaults to 1), num_workers (`int`, *optional*, defaults to 0): as in every
                pipeline.

        Returns:
            A dict for an image, a list of them for a list, an iterator for a generator or a data set: `score`
            (`float`, 0 to 1, from that image and the checkpoint alone), `is_anomalous` (`bool`), `regions` (dicts with
            `box` [left, top, right, bottom] in pixels, the last two exclusive, `area` and `score`, highest first),
            `map` (`torch.Tensor` of the image's (H, W), 0 to 1) and `heatmap` (the map as a grey PIL image, 0 to 255).

        Raises:
            ValueError: for what is no image, no class name or no threshold.
        """
        if isinstance(inputs, list) and not inputs:  # of which transformers would look at the first
            return []
        return super().__call__(inputs, **kwargs)

    def save_pretrained(self, save_directory: str | os.PathLike, **kwargs: Any) -> None:
        """
        Save model and processor; and the code, if it is a repository's. The package writes none: `moeclip push` does,
        for those without the package.
        """
        self.model.save_pretrained(save_directory, **kwargs)
        self.processor.save_pretrained(save_directory, **kwargs)

    def _sanitize_parameters(
        self,
        class_name: str | None = None,
        threshold: float | None = None,
        pixel_threshold: float | None = None,
        timeout: float | None = None,
    ) -> tuple[dict[str, Any], dict[str, Any], dict[str, Any]]:
        if class_name is not None:
            _check_class_name(class_name)
        for name, value in (("threshold", threshold), ("pixel_threshold", pixel_threshold)):
            is_number = isinstance(value, Real) and not isinstance(value, bool)
            if value is not None and not (is_number and 0 <= value <= 1):
                raise ValueError(f"{name} is a number from 0 to 1, not {str(value)[:40]!r}.")

        def given(**parameters: Any) -> dict[str, Any]:
            return {name: value for name, value in parameters.items() if value is not None}

        return (
            given(class_name=class_name, timeout=timeout),
            {},
            given(threshold=threshold, pixel_threshold=pixel_threshold),
        )

    def preprocess(
        self, inputs: Any, class_name: str = "object", timeout: float | None = None
    ) -> dict[str, list[Any]]:
        """Pixels, class name and size of an image, in lists of one, so that images of unlike shapes make a batch."""
        if isinstance(inputs, dict):
            if "image" not in inputs:
                raise ValueError(f"A dict holds an image and perhaps its class_name, not {str(list(inputs))[:200]}.")
            if others := inputs.keys() - {"image", "class_name"}:  # of a data set's row
                logger.warning_once(f"Of a dict image and class_name are read, and not {str(sorted(others))[:200]}.")
            inputs, class_name = inputs["image"], inputs.get("class_name", class_name)
            _check_class_name(class_name)
        image = read_image(inputs, timeout)
        pixels = self.processor(images=image, return_tensors="pt")["pixel_values"]
        return {"pixel_values": list(pixels), "class_names": [class_name], "sizes": [(image.height, image.width)]}

    def _forward(self, model_inputs: dict[str, list[Any]]) -> dict[str, list[Any]]:
        pixels, class_names, sizes = (_flat(model_inputs[name]) for name in ("pixel_values", "class_names", "sizes"))
        by_shape: dict[tuple[int, ...], list[int]] = {}
        for index, image in enumerate(pixels):
            by_shape.setdefault(image.shape, []).append(index)
        anomaly_logits: list[Any] = [None] * len(pixels)
        logits_per_image: list[Any] = [None] * len(pixels)
        for indices in by_shape.values():
            outputs = self.model(
                torch.stack([pixels[index] for index in indices]).to(self.model.dtype),
                text_embeds=torch.cat([self._class_anchors(class_names[index]) for index in indices]),
            )
            for place, index in enumerate(indices):
                anomaly_logits[index] = outputs.anomaly_logits[place]
                logits_per_image[index] = outputs.logits_per_image[place]
        return {"anomaly_logits": anomaly_logits, "logits_per_image": logits_per_image, "sizes": sizes}

    def _class_anchors(self, class_name: str) -> torch.Tensor:
        """(1, 2, D), computed when the class is first named."""
        anchors = self._anchors.get(class_name)
        if anchors is None:
            prompts = self.processor(text=[class_name], return_tensors="pt").to(self.device)
            anchors = self.model.get_text_embeds(**prompts)
            if len(self._anchors) >= _MAX_ANCHORS:
                self._anchors.clear()
            self._anchors[class_name] = anchors
        return anchors  # not read back: another thread may have cleared them

    def postprocess(
        self, model_outputs: dict[str, Any], threshold: float | None = None, pixel_threshold: float | None = None
    ) -> dict[str, Any]:
        outputs = MoECLIPOutput(
            anomaly_logits=torch.stack(list(model_outputs["anomaly_logits"])).float(),
            logits_per_image=torch.stack(list(model_outputs["logits_per_image"])).float(),
        )
        result = self.processor.post_process_anomaly_detection(
            outputs, model_outputs["sizes"], threshold, pixel_threshold
        )[0]
        grey = np.rint(result["map"].numpy() * 255).astype(np.uint8)
        return {**result, "heatmap": Image.fromarray(grey)}


def read_image(image: ImageLike | bytes, timeout: float | None = None) -> Image.Image:
    """
    Read an image, wherever it is, upright and in RGB.

    Args:
        image: a path, a URL, base64, the bytes of a file, a PIL image (which is turned as a file would be), an array
            or a tensor.
        timeout (`float`, *optional*): seconds to wait for a URL.

    Raises:
        ValueError: for what is not there, or is no image.
    """
    if isinstance(image, str) and image.startswith(("http://", "https://")):
        return to_rgb(open_image(BytesIO(_download(image, timeout)), image), image)
    if isinstance(image, str) and not os.path.isfile(image):
        name = image if len(image) <= 200 else f"{image[:40]}..."
        try:
            return to_rgb(open_image(BytesIO(_decode_base64(image))))
        except ValueError:
            raise ValueError(f"{name}: no such file, and neither a URL nor base64 of an image.") from None
    if isinstance(image, bytes):
        return to_rgb(open_image(BytesIO(image), "bytes"), "bytes")
    return to_rgb(image, upright=True)


def _check_class_name(name: Any) -> None:
    if not isinstance(name, str):
        kind = type(name).__name__
        raise ValueError(
            f"class_name is a text, not a {kind}: for a class an image, pass dicts of image and class_name."
        )


def _download(url: str, timeout: float | None) -> bytes:
    try:
        with urlopen(Request(url, headers={"User-Agent": _USER_AGENT}), timeout=timeout) as response:
            return response.read()
    except (OSError, ValueError, HTTPException) as error:  # of the network, of the server, or of the URL itself
        raise ValueError(f"{url}: cannot be fetched ({error}).") from error


def _decode_base64(text: str) -> bytes:
    """The bytes that base64, plain or in a `data:` URI, stands for; a `ValueError` for any other text."""
    encoded = text.partition(",")[2] if text.startswith("data:") else text
    return base64.b64decode("".join(encoded.split()), validate=True)


def _flat(values: list[Any]) -> list[Any]:
    """One list of a batch's lists; the list itself where an image is no batch."""
    return [item for value in values for item in (value if isinstance(value, list) else [value])]


__all__ = ["ZeroShotAnomalyDetectionPipeline", "read_image"]
