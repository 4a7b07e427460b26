"""Configuration of a MoECLIP model."""

from collections.abc import Iterable
from itertools import pairwise
from typing import Any

from huggingface_hub.dataclasses import strict
from transformers import CLIPConfig

# The paper's backbone, OpenAI's CLIP ViT-L/14 at 336 pixels.
_VIT_L_14_336_TEXT = {"hidden_size": 768, "intermediate_size": 3072, "num_attention_heads": 12, "projection_dim": 768}
_VIT_L_14_336_VISION = {
    "hidden_size": 1024,
    "intermediate_size": 4096,
    "num_hidden_layers": 24,
    "num_attention_heads": 16,
    "image_size": 336,
    "patch_size": 14,
    "projection_dim": 768,
}

# What no CLIP comes near, and a damaged or hostile file easily exceeds: a model of such a size is not to be tried.
_MAX_SIZE = 1 << 20
_MAX_DEPTH = 1000
_MAX_WINDOW = 255
_SIZES = (
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "projection_dim",
    "vocab_size",
    "max_position_embeddings",
    "num_channels",
    "image_size",
    "patch_size",
)
# Settings of transformers that name code to fetch and run, or other files than those that are looked at.
_NOT_OF_A_FILE = (
    "attn_implementation",
    "_attn_implementation",
    "experts_implementation",
    "_experts_implementation",
    "transformers_weights",
)
# Of weights. transformers takes whatever torch has by that name.
_DTYPES = ("float16", "bfloat16", "float32", "float64")


def quarters(depth: int) -> list[int]:
    """The blocks at the quarters of a tower's depth, counted from 1: `[6, 12, 18, 24]` for 24 blocks."""
    return sorted({max(1, depth * quarter // 4) for quarter in (1, 2, 3, 4)})


def _without_unused_code(config_class: Any, config_dict: dict[str, Any]) -> dict[str, Any]:
    """
    Settings that name no code which is not used: registered pipelines need none of the checkpoint, nor does a class
    that is not the checkpoint's own. What is saved has no such code, and would ask in vain for trust in it.
    """
    if config_class._auto_class is None:
        config_dict = {name: value for name, value in config_dict.items() if name != "auto_map"}
    if "custom_pipelines" not in config_dict:
        return config_dict
    from transformers.pipelines import PIPELINE_REGISTRY

    tasks = PIPELINE_REGISTRY.get_supported_tasks()
    others = {task: info for task, info in config_dict["custom_pipelines"].items() if task not in tasks}
    rest = {name: value for name, value in config_dict.items() if name != "custom_pipelines"}
    return rest | ({"custom_pipelines": others} if others else {})


def _refuse_foreign_settings(config_class: type, settings: Any) -> None:
    """Refuse a file's settings that choose code, or stand in for a part of the configuration's or torch's own code."""
    if not isinstance(settings, dict):
        raise ValueError(f"A configuration is a table of settings, not a {type(settings).__name__}.")
    for name in ("dtype", "torch_dtype"):
        dtype = settings.get(name)
        if dtype is not None and str(dtype).removeprefix("torch.") not in _DTYPES:
            raise ValueError(f"{name} ({dtype!r}) must be one of {', '.join(_DTYPES)}.")
    for name in settings:
        if name in _NOT_OF_A_FILE:
            raise ValueError(f"{name} ({settings[name]!r}) is not for a file to set: pass it when you load the model.")
        if callable(getattr(config_class, name, None)):
            raise ValueError(f"{name} ({settings[name]!r}) is no setting.")


def _refuse_sizes(tower: str, settings: dict[str, Any]) -> None:
    """Refuse sizes of a tower that no model can have. What is no whole number is refused by its type, elsewhere."""
    for name in _SIZES:
        size, largest = settings.get(name), _MAX_DEPTH if name == "num_hidden_layers" else _MAX_SIZE
        if isinstance(size, int) and not 1 <= size <= largest:
            raise ValueError(f"{name} ({size}) of {tower} must lie between 1 and {largest}.")


def _is_ascending(values: Iterable[int]) -> bool:
    return all(a < b for a, b in pairwise(values))


@strict
class MoECLIPConfig(CLIPConfig):
    r"""
    Configuration of a [`MoECLIPModel`]: that of its CLIP, and beside it what MoECLIP adds (arXiv 2603.03101).

    Args:
        num_experts (`int`, *optional*, defaults to 4):
            K, the number of LoRA experts behind every adapted block.
        num_experts_per_tok (`int`, *optional*, defaults to 2):
            k, the number of experts that a token is routed to; at most `num_experts`.
        lora_rank (`int`, *optional*, defaults to 8):
            r, the rank of an expert.
        lora_alpha (`float`, *optional*, defaults to 16):
            An expert's output is scaled by `lora_alpha / lora_rank`.
        lora_dropout (`float`, *optional*, defaults to 0.05):
            Dropout on the experts' input while training.
        use_fofs (`bool`, *optional*, defaults to `True`):
            Frozen orthogonal feature separation: every expert reads its own chunk of the features through a frozen
            projection with orthonormal rows. `False` gives every expert a trained projection of all the features.
        moe_layers (`list[int]`, *optional*):
            The blocks of the vision tower, counted from 0, whose output is adapted; by default those at the quarters
            of its depth, which is `[5, 11, 17, 23]` for ViT-L.
        residual_weight (`float`, *optional*, defaults to 0.1):
            lambda: an adapted block returns `lambda * experts + (1 - lambda) * block`.
        feature_layers (`list[int]`, *optional*):
            The taps, counted from 1 as in the paper: tap n is the output of the n-th block, behind its experts. By
            default the quarters of the tower's depth, which is `[6, 12, 18, 24]` for ViT-L.
        aggregation_sizes (`list[int]`, *optional*, defaults to `[1, 3, 5]`):
            Odd sides of the windows of patch average aggregation (PAA), in patches; `[1]` turns PAA off.
        shared_projections (`bool`, *optional*, defaults to `True`):
            One projection a tap for the maps of all window sizes; `False` gives every map its own.
        projection_activation (`str`, *optional*):
            `"leaky_relu"` (slope 0.01) behind the projections, or `None`.
        image_feature_layer (`int`, *optional*):
            The tap that the image embedding is made from, the last one by default. The authors' training code takes
            the third last tap where PAA is off, and checkpoints trained so need that tap here.
        etf_loss_coef (`float`, *optional*, defaults to 0.01):
            Weight of the equiangular tight frame (ETF) term of the loss.
        router_aux_loss_coef (`float`, *optional*, defaults to 0.01):
            Weight of the term of the loss that balances the load of the experts.
        text_config, vision_config, projection_dim, logit_scale_init_value, initializer_factor:
            As in [`~transformers.CLIPConfig`]. Without any of the first two: the paper's ViT-L/14 at 336 pixels.

    Raises:
        ValueError: if two settings contradict each other; the message holds both values.

    Example:

    ```python
    >>> from moeclip_hf import MoECLIPConfig, MoECLIPModel

    >>> config = MoECLIPConfig(num_experts=8)
    >>> model = MoECLIPModel(config)
    ```
    """

    model_type = "moeclip"

    num_experts: int = 4
    num_experts_per_tok: int = 2
    lora_rank: int = 8
    lora_alpha: float | int = 16
    lora_dropout: float | int = 0.05
    use_fofs: bool = True
    moe_layers: list[int] | tuple[int, ...] | None = None
    residual_weight: float | int = 0.1
    feature_layers: list[int] | tuple[int, ...] | None = None
    aggregation_sizes: list[int] | tuple[int, ...] = (1, 3, 5)
    shared_projections: bool = True
    projection_activation: str | None = None
    image_feature_layer: int | None = None
    etf_loss_coef: float | int = 0.01
    router_aux_loss_coef: float | int = 0.01

    def __post_init__(self, **kwargs: Any) -> None:
        if self.text_config is None and self.vision_config is None:
            self.text_config, self.vision_config = dict(_VIT_L_14_336_TEXT), dict(_VIT_L_14_336_VISION)
            self.projection_dim = 768
        for name in ("text_config", "vision_config"):  # before the towers' own checks divide by them
            if isinstance(tower := getattr(self, name), dict):
                _refuse_sizes(name, tower)
        super().__post_init__(**kwargs)
        depth = self.vision_config.num_hidden_layers
        if self.feature_layers is None:
            self.feature_layers = quarters(depth)
        if self.moe_layers is None:
            self.moe_layers = [block - 1 for block in quarters(depth)]
        self.moe_layers, self.feature_layers = list(self.moe_layers), list(self.feature_layers)
        self.aggregation_sizes = list(self.aggregation_sizes)
        if self.image_feature_layer is None and self.feature_layers:
            self.image_feature_layer = self.feature_layers[-1]
        # Here too, so that it is a plain ValueError; `strict` wraps what it runs itself.
        self.validate_architecture()

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], **kwargs: Any) -> Any:
        """
        As in transformers; settings in `kwargs` are checked, and followed by the defaults that depend on them.

        Raises:
            ValueError: if a setting is of the wrong type, contradicts another one, or names code to run.
        """
        _refuse_foreign_settings(cls, config_dict)
        for name in ("text_config", "vision_config"):
            if isinstance(tower := config_dict.get(name), dict):
                _refuse_foreign_settings(cls, tower)
        settings = {name: kwargs.pop(name) for name in cls.__annotations__ if name in kwargs}
        taps = config_dict.get("feature_layers")
        if "feature_layers" in settings and taps and config_dict.get("image_feature_layer") == taps[-1]:
            settings.setdefault("image_feature_layer", None)
        try:
            return super().from_dict(_without_unused_code(cls, config_dict) | settings, **kwargs)
        except Exception as error:  # of `strict`, or whatever a foreign file's settings lead to
            raise ValueError(" ".join(str(error).split()) or type(error).__name__) from error

    def validate_architecture(self) -> None:
        """Refuse settings that contradict each other; part of the validation that `strict` runs."""
        super().validate_architecture()
        self._validate_towers()
        self._validate_experts()
        self._validate_layers()

    def _validate_towers(self) -> None:
        from transformers.activations import ACT2FN  # which imports torch

        if not isinstance(self.projection_dim, int):
            raise ValueError(f"projection_dim ({self.projection_dim!r}) must be a whole number.")
        _refuse_sizes("the model", {"projection_dim": self.projection_dim})
        for name in ("text_config", "vision_config"):
            tower = getattr(self, name)
            _refuse_sizes(name, vars(tower))
            if tower.hidden_size % tower.num_attention_heads:
                raise ValueError(
                    f"hidden_size ({tower.hidden_size}) of {name} must be a multiple of num_attention_heads "
                    f"({tower.num_attention_heads})."
                )
            if tower.hidden_act not in ACT2FN:
                raise ValueError(f"hidden_act ({tower.hidden_act!r}) of {name} is no activation of transformers.")
            if not 0 < (tower.layer_norm_eps or 0) < 1:
                raise ValueError(f"layer_norm_eps ({tower.layer_norm_eps}) of {name} must lie between 0 and 1.")
            if not 0 <= (tower.attention_dropout or 0) <= 1:
                raise ValueError(f"attention_dropout ({tower.attention_dropout}) of {name} must lie between 0 and 1.")
        edge, patch = self.vision_config.image_size, self.vision_config.patch_size
        if not (isinstance(edge, int) and isinstance(patch, int) and patch <= edge):
            raise ValueError(
                f"image_size ({edge}) must be one number of pixels, and patch_size ({patch}) at most that."
            )

    def _validate_experts(self) -> None:
        width = self.vision_config.hidden_size
        if not 1 <= self.num_experts_per_tok <= self.num_experts:
            raise ValueError(
                f"num_experts_per_tok ({self.num_experts_per_tok}) must lie between 1 and num_experts "
                f"({self.num_experts})."
            )
        if self.num_experts > _MAX_DEPTH:
            raise ValueError(f"num_experts ({self.num_experts}) must be at most {_MAX_DEPTH}.")
        if not 1 <= self.lora_rank <= width:
            raise ValueError(f"lora_rank ({self.lora_rank}) must lie between 1 and the tower's width ({width}).")
        if self.use_fofs and width // self.num_experts < self.lora_rank:
            raise ValueError(
                f"lora_rank ({self.lora_rank}) exceeds the {width // self.num_experts} features that FOFS gives each "
                f"of num_experts ({self.num_experts}) of a width of {width}."
            )
        for name, low, high in (("lora_dropout", 0, 1), ("residual_weight", 0, 1)):
            if not low <= getattr(self, name) <= high:
                raise ValueError(f"{name} ({getattr(self, name)}) must lie between {low} and {high}.")
        for name in ("lora_alpha", "etf_loss_coef", "router_aux_loss_coef"):
            if not 0 <= getattr(self, name) <= _MAX_SIZE:
                raise ValueError(f"{name} ({getattr(self, name)}) must be a number from 0 to {_MAX_SIZE}.")
        if self.projection_activation not in (None, "leaky_relu"):
            raise ValueError(f'projection_activation ({self.projection_activation!r}) must be None or "leaky_relu".')

    def _validate_layers(self) -> None:
        depth = self.vision_config.num_hidden_layers
        for name, first, last in (("moe_layers", 0, depth - 1), ("feature_layers", 1, depth)):
            layers = getattr(self, name)
            if not _is_ascending(layers) or any(not first <= layer <= last for layer in layers):
                raise ValueError(
                    f"{name} ({layers}) must ascend within {first} to {last}, as the vision tower has {depth} blocks."
                )
        if not self.feature_layers:
            raise ValueError("feature_layers is empty: name at least one block to take features from.")
        if self.image_feature_layer not in self.feature_layers:
            raise ValueError(
                f"image_feature_layer ({self.image_feature_layer}) must be one of feature_layers "
                f"({self.feature_layers})."
            )
        sizes = self.aggregation_sizes
        if not sizes or not _is_ascending(sizes) or any(size < 1 or size % 2 == 0 for size in sizes):
            raise ValueError(f"aggregation_sizes ({sizes}) must be odd and ascend, such as [1, 3, 5].")
        if sizes[-1] > _MAX_WINDOW:
            raise ValueError(f"aggregation_sizes ({sizes[:3]}, ...) must be at most {_MAX_WINDOW} patches.")

    @property
    def num_maps(self) -> int:
        """M, the number of anomaly maps: one a tap and window size."""
        return len(self.feature_layers) * len(self.aggregation_sizes)


__all__ = ["MoECLIPConfig"]
