"""The configuration of a MoE-LoRA adapter, and its registration with PEFT."""

import json
import re
import subprocess
import sys

import pytest
from limits import time_limit
from peft import PeftConfig, PeftType

from moeclip_hf.tuner import MoELoraConfig, MoELoraModel, register
from moeclip_hf.tuner.model import vision_blocks

SETTINGS = {
    "r": 3,
    "lora_alpha": 7,
    "lora_dropout": 0.2,
    "num_experts": 5,
    "num_experts_per_tok": 4,
    "use_fofs": False,
    "residual_weight": 0.6,
    "initializer_range": 0.03,
    "target_modules": ["encoder.layers.1", "q_proj"],
    "exclude_modules": ["text_model.encoder.layers.1"],
    "modules_to_save": ["text_adapter"],
    "base_settings": {"feature_layers": [1, 2]},
}


@pytest.mark.parametrize("config_class", [MoELoraConfig, PeftConfig])
def test_every_setting_survives_a_folder(tmp_path, config_class):
    MoELoraConfig(**SETTINGS).save_pretrained(tmp_path)
    loaded = config_class.from_pretrained(str(tmp_path))
    assert type(loaded) is MoELoraConfig
    assert loaded.peft_type is PeftType.MOE_LORA
    for name, value in SETTINGS.items():
        expected = set(value) if name in ("target_modules", "exclude_modules") else value
        assert getattr(loaded, name) == expected


def test_the_file_names_the_type(tmp_path):
    MoELoraConfig().save_pretrained(tmp_path)
    assert json.loads((tmp_path / "adapter_config.json").read_text())["peft_type"] == "MOE_LORA"


def test_defaults_are_those_of_the_paper():
    config = MoELoraConfig()
    assert (config.num_experts, config.num_experts_per_tok, config.r, config.lora_alpha) == (4, 2, 8, 16)
    assert (config.lora_dropout, config.residual_weight, config.use_fofs) == (0.05, 0.1, True)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"r": 0}, r"r \(0\)"),
        ({"num_experts": 2, "num_experts_per_tok": 3}, r"num_experts_per_tok \(3\).*num_experts \(2\)"),
        ({"num_experts_per_tok": 0}, r"num_experts_per_tok \(0\).*num_experts \(4\)"),
        ({"initializer_range": -0.1}, r"initializer_range \(-0\.1\)"),
        ({"lora_dropout": 1.5}, r"lora_dropout \(1\.5\) must lie between 0 and 1"),
        ({"residual_weight": -0.1}, r"residual_weight \(-0\.1\) must lie between 0 and 1"),
    ],
)
def test_contradictions_are_refused_with_the_values(settings, message):
    with pytest.raises(ValueError, match=message):
        MoELoraConfig(**settings)


NAME = "vision_model.encoder.layers.11.self_attn.out_proj"
EXPRESSIONS = [
    vision_blocks(range(24)),
    r"vision_model\.encoder\.layers\.(5|11)",
    r".*\.layers\.\d+",
    r".*encoder\.layers\.(?:5|11)\.self_attn\.(q|k|v)_proj",
    r"a\.b|c\.d|[a-z_]+|[^.]x?",
    "all-linear",
    "",
]


@pytest.mark.parametrize("expression", EXPRESSIONS)
def test_expressions_for_targets_that_are_soon_matched_are_taken(expression):
    assert MoELoraConfig(target_modules=expression, exclude_modules=expression).target_modules == expression


def test_the_costliest_expression_that_is_taken_is_soon_matched():
    expression = ".*.*(.|.|.|.|.|.|.|.|.|.)!"
    MoELoraConfig(target_modules=expression)
    with time_limit(5):
        assert re.fullmatch(expression, NAME) is None


@pytest.mark.parametrize("setting", ["target_modules", "exclude_modules"])
@pytest.mark.parametrize(
    "expression",
    [
        "(.*)*x",
        "(.+)+x",
        "(?:a|a)*x",
        "(.?){50}x",
        "(.|.)" * 40 + "x",
        ".?" * 40 + "x",
        ".*" * 4 + "x",
        ".*?" * 4 + "x",
        "[^]]*" * 4 + "x",
        "((.|.)(.|.))" * 20 + "x",
        r"(?=(.*)*x)",
        r"(.*)\1*x",
        "(?x)( . * )*x",
        "(",
    ],
)
def test_expressions_that_may_take_hours_are_refused(setting, expression):
    with pytest.raises(ValueError, match=rf"{setting} .* could take hours"):
        MoELoraConfig(**{setting: expression})


@pytest.mark.parametrize("name", ["(.*)*", "a|b", "", 3])
def test_heads_are_named_not_described(name):
    with pytest.raises(ValueError, match=r"modules_to_save .* names of modules"):
        MoELoraConfig(modules_to_save=[name])


def test_the_type_is_a_member_like_any_other():
    assert PeftType("MOE_LORA") is PeftType.MOE_LORA is PeftType["MOE_LORA"]
    assert PeftType.MOE_LORA == "MOE_LORA"
    assert isinstance(PeftType.MOE_LORA, PeftType)
    assert hash(PeftType.MOE_LORA) == hash("MOE_LORA")
    assert list(PeftType).count(PeftType.MOE_LORA) == 1


def test_registering_again_changes_nothing():
    from peft.mapping import PEFT_TYPE_TO_PREFIX_MAPPING, PEFT_TYPE_TO_TUNER_MAPPING

    before = len(PeftType)
    register()
    assert len(PeftType) == before
    assert PEFT_TYPE_TO_TUNER_MAPPING[PeftType.MOE_LORA] is MoELoraModel
    assert PEFT_TYPE_TO_PREFIX_MAPPING[PeftType.MOE_LORA] == "moe_lora_"


def test_importing_the_tuner_registers_the_type(tmp_path):
    MoELoraConfig(r=3).save_pretrained(tmp_path)
    code = f"import peft, moeclip_hf.tuner; print(peft.PeftConfig.from_pretrained({str(tmp_path)!r}).r)"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "3"
