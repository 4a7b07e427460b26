"""Configurations, weights and files at random: each is taken, or refused in one line, and nothing else happens."""

import io
import json
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from plain_clip import PlainCLIP
from released_adapters import random_adapter
from safetensors.torch import save_file

from moeclip_hf import MoECLIPConfig
from moeclip_hf.conversion import convert_openai_clip, convert_released
from moeclip_hf.conversion.reading import read_checkpoint
from moeclip_hf.errors import ConversionError
from moeclip_hf.pretrained import EMBEDDED_CHECKPOINT

# Examples in `make test`, and in `make test-slow`.
FEW, MANY = 60, 1500
COUNTS = [FEW, pytest.param(MANY, marks=pytest.mark.slow)]

CONFIG = json.loads((EMBEDDED_CHECKPOINT / "config.json").read_text())
PLACES = [
    *((name,) for name in CONFIG),
    *((tower, name) for tower in ("text_config", "vision_config") for name in CONFIG[tower]),
    *((name,) for name in ("attn_implementation", "per_layer_config", "id2label", "text_config_dict", "to_dict")),
    ("vision_config", "unknown"),
]
NUMBERS = st.sampled_from([-(2**63), -1, 0, 1, 2, 3, 7, 2**20, 2**31, 2**62, 10**30, -0.5, 0.5, 1e300])
SCALARS = (
    NUMBERS | st.none() | st.booleans() | st.floats() | st.text(max_size=8) | st.sampled_from(["gelu", "moeclip"])
)
VALUES = st.recursive(
    SCALARS, lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=4), inner, max_size=3)
)


pytestmark = pytest.mark.usefixtures("bounded_memory")


def examples(count: int) -> settings:
    """As many, the same ones every time, however slow the machine."""
    return settings(
        max_examples=count,
        derandomize=True,
        database=None,
        suppress_health_check=list(HealthCheck),
    )


def assert_one_line(error: Exception) -> None:
    assert str(error).strip()
    assert "\n" not in str(error)
    assert "allocate" not in str(error)


@pytest.mark.parametrize("count", COUNTS)
def test_a_configuration_is_taken_or_refused_with_a_value_error(count):
    @examples(count)
    @given(st.lists(st.tuples(st.sampled_from(PLACES), VALUES), min_size=1, max_size=3))
    def check(changes: list[tuple[tuple[str, ...], Any]]) -> None:
        document = json.loads(json.dumps(CONFIG))
        for path, value in changes:
            place = document if len(path) == 1 else document[path[0]]
            if isinstance(place, dict):
                place[path[-1]] = value
        try:
            config = MoECLIPConfig.from_dict(document)
        except ValueError as error:
            assert_one_line(error)
            return
        config.validate_architecture()
        for tower in (config.text_config, config.vision_config):
            assert 1 <= tower.num_hidden_layers <= 1000
            assert 1 <= tower.num_attention_heads <= tower.hidden_size <= 1 << 20
        assert config._attn_implementation in (None, "eager", "sdpa")
        again = MoECLIPConfig.from_dict(config.to_dict())
        assert again.to_json_string(use_diff=False) == config.to_json_string(use_diff=False)

    check()


CLIP = PlainCLIP().state_dict()
ADAPTER = random_adapter()
SHAPES = st.lists(st.sampled_from([0, 1, 2, 3, 8, 48, 128]), max_size=3)
DTYPES = st.sampled_from([torch.float16, torch.float64, torch.int8, torch.bool, torch.complex64])


def expanded(shape: list[int]) -> torch.Tensor:
    """Any number of numbers, of one in memory."""
    return torch.zeros(1).expand(*[2**12 * edge for edge in shape], 1)


TENSORS = (
    st.builds(torch.zeros, SHAPES)
    | st.builds(expanded, SHAPES)
    | st.builds(torch.full, SHAPES, st.sampled_from([float("nan"), float("inf")]))
    | st.builds(lambda shape, dtype: torch.zeros(shape, dtype=dtype), SHAPES, DTYPES)
    | st.builds(lambda shape: torch.empty(shape, device="meta"), SHAPES)
    | st.none()
    | st.lists(st.integers(), max_size=2)
)


def names(known: list[str]) -> st.SearchStrategy[Any]:
    """Of weights that are there, of others of their kind, and what is no name."""
    numbers = st.integers(0, 9999).map(str)
    others = st.builds(
        lambda name, number: ".".join(number if part.isdecimal() else part for part in name.split(".")),
        st.sampled_from(known),
        numbers,
    )
    return st.sampled_from(known) | others | st.text(max_size=5) | st.integers() | st.none()


DROPPED = object()


@pytest.mark.parametrize("count", COUNTS)
def test_a_clip_is_converted_or_refused_by_name(count):
    @examples(count)
    @given(st.dictionaries(names(sorted(CLIP)), TENSORS | st.just(DROPPED), min_size=1, max_size=3))
    def check(changes: dict[Any, Any]) -> None:
        tensors = {name: value for name, value in (CLIP | changes).items() if value is not DROPPED}
        try:
            model = convert_openai_clip(tensors)
        except ConversionError as error:
            assert_one_line(error)
        else:
            assert all(tensor.isfinite().all() for tensor in model.state_dict().values())

    check()


@pytest.mark.parametrize("count", COUNTS)
def test_a_released_adapter_is_converted_or_refused_by_name(count):
    clip = convert_openai_clip(CLIP)
    known = sorted(ADAPTER["image_adapter"])

    @examples(count)
    @given(
        st.dictionaries(names(known), TENSORS | st.just(DROPPED), max_size=3),
        st.dictionaries(names(["0.fc.0.weight"]), TENSORS | st.just(DROPPED), max_size=1),
    )
    def check(image: dict[Any, Any], text: dict[Any, Any]) -> None:
        adapter = {
            part: {name: value for name, value in (ADAPTER[part] | changes).items() if value is not DROPPED}
            for part, changes in (("image_adapter", image), ("text_adapter", text))
        }
        try:
            model = convert_released(adapter, clip)
        except ConversionError as error:
            assert_one_line(error)
        else:
            assert all(tensor.isfinite().all() for tensor in model.state_dict().values())

    check()


def stored(form: str, folder: Path) -> bytes:
    """A few weights as a file of each kind."""
    weights = {"weight": torch.arange(12.0).reshape(3, 4), "bias": torch.zeros(3)}
    file = io.BytesIO()
    if form == "safetensors":
        save_file(weights, folder / "file")
        return (folder / "file").read_bytes()
    if form == "torchscript":
        with warnings.catch_warnings(action="ignore"):
            torch.jit.save(torch.jit.script(torch.nn.Linear(4, 3)), file)
    else:
        torch.save(weights, file, _use_new_zipfile_serialization=form == "zip")
    return file.getvalue()


@pytest.mark.parametrize("count", COUNTS)
@pytest.mark.parametrize("form", ["zip", "legacy", "torchscript", "safetensors"])
def test_a_damaged_file_is_read_or_refused_by_name(tmp_path, form, count):
    whole = stored(form, tmp_path)
    path = tmp_path / ("clip.safetensors" if form == "safetensors" else "clip.pt")
    place = st.integers(0, len(whole) - 1)

    @examples(count)
    @given(st.dictionaries(place, st.integers(0, 255), max_size=4), st.none() | place)
    def check(changes: dict[int, int], end: int | None) -> None:
        damaged = bytearray(whole)
        for index, value in changes.items():
            damaged[index] = value
        path.write_bytes(damaged[:end])
        try:
            content = read_checkpoint(path)
        except ConversionError as error:
            assert str(error).startswith(str(path))
            assert "\n" not in str(error)
        else:
            assert isinstance(content, dict)

    check()
