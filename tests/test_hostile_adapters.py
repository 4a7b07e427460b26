"""Adapters that lie, or whose bases do: each is refused by name in one line, soon, and nothing of it is run."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from spoiled_models import (
    ADAPTER_WEIGHTS,
    HUGE,
    PROJECTION,
    WEIGHTS,
    Payload,
    Spoil,
    assert_told,
    config,
    content,
    linked_out,
    settings,
    weights,
)

from moeclip_hf.adapters import full_to_adapter, load_adapter
from moeclip_hf.errors import CheckpointError
from moeclip_hf.hub import write_repository
from moeclip_hf.pretrained import EMBEDDED_CHECKPOINT, load_pretrained

pytestmark = pytest.mark.usefixtures("bounded_memory")


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
    "no expression": (adapter_config(target_modules="[z-a]"), "cannot be put into"),
    "targets that take hours to match": (adapter_config(target_modules="(.*)*x"), r"target_modules \('\(\.\*\)\*x'\)"),
    "exceptions that take hours to match": (adapter_config(exclude_modules="(.|.)" * 40 + "x"), "exclude_modules"),
    "heads that take hours to match": (adapter_config(modules_to_save=["(.|..|...)*x"]), "modules_to_save"),
    "an unknown type": (adapter_config(peft_type="EVIL"), "cannot be read as an adapter"),
    "an unknown activation": (adapter_config(base_settings__vision_config={"hidden_act": "evil"}), "'evil'"),
    "taps beyond the tower": (adapter_config(base_settings__feature_layers=[99]), r"\[99\]"),
    "a setting that chooses code": (
        adapter_config(base_settings__attn_implementation="kernels-community/evil"),
        "attn_implementation .* is no setting that an adapter relies on",
    ),
    "settings that are none": (adapter_config(base_settings=[1]), "is not a MoE-LoRA adapter made over"),
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


PUBLISHED = ["no experts", "a file cut short", "a huge rank", "text for a number", "an unknown type", "a list"]
PUBLISHED += ["settings that are none"]


@pytest.mark.parametrize("name", PUBLISHED)
def test_what_settings_and_headers_tell_keeps_an_adapter_from_being_published(adapter, tmp_path, name):
    ADAPTERS[name][0](adapter)
    with pytest.raises(CheckpointError) as error:
        write_repository(adapter, tmp_path / "repository", "ann/it", base_model="ann/clip")
    assert_told(error.value, adapter)
    assert not (tmp_path / "repository").exists()


def test_the_card_tells_what_an_adapters_settings_leave_to_their_defaults(adapter, tmp_path):
    document = json.loads((adapter / "adapter_config.json").read_text())
    for name in ("use_fofs", "num_experts_per_tok"):
        del document[name]
    (adapter / "adapter_config.json").write_text(json.dumps(document))
    write_repository(adapter, tmp_path / "repository", "ann/it", base_model="ann/clip")
    card = (tmp_path / "repository" / "README.md").read_text()
    assert ", 2 a token |\n| FOFS | yes |" in card


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
