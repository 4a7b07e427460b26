"""`moeclip convert`: checkpoints of other formats, in and out."""

import json
from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from moeclip_hf.cli.predict import Dtype
from moeclip_hf.cli.usage import LARGEST_EDGE, check_folder

convert = typer.Typer(help="Convert released adapters and OpenAI's CLIP, in and out.", no_args_is_help=True)

# All of OpenAI's CLIPs have one tokenizer: its merges as they publish them, and a Hub repository that holds it.
_MERGES_FILE = "bpe_simple_vocab_16e6.txt.gz"
_OPENAI_TOKENIZER = "openai/clip-vit-large-patch14"

_MOECLIP_SETTINGS = (
    "num_experts",
    "num_experts_per_tok",
    "lora_rank",
    "lora_alpha",
    "use_fofs",
    "moe_layers",
    "residual_weight",
    "feature_layers",
    "aggregation_sizes",
    "shared_projections",
    "projection_activation",
    "image_feature_layer",
)


def _whole_numbers(text: str) -> list[int]:
    if not text.strip():
        return []
    try:
        return [int(number) for number in text.split(",")]
    except ValueError:
        raise typer.BadParameter(f"{text!r} is no list of whole numbers such as 6,12,18,24.") from None


Clip = Annotated[
    str,
    typer.Option(help="File of OpenAI's (.pt), state dict, safetensors, or transformers folder or Hub id."),
]
Tokenizer = Annotated[
    str | None,
    typer.Option(
        help="Transformers folder or Hub id, or OpenAI's bpe_simple_vocab_16e6.txt.gz.",
        show_default="that of a transformers CLIP, or OpenAI's",
    ),
]
StoredDtype = Annotated[Dtype, typer.Option(help="Type that weights are stored in.")]
VisionHeads = Annotated[
    int | None, typer.Option(min=1, help="Attention heads.", show_default="width / 64, or the CLIP's")
]
TextHeads = Annotated[
    int | None, typer.Option(min=1, help="Attention heads.", show_default="width / 64, or the CLIP's")
]
Activation = Annotated[
    Literal["gelu", "quick_gelu"],
    typer.Option(help="Of both towers: gelu as the released code runs it, or quick_gelu as OpenAI's CLIPs were made."),
]
Revision = Annotated[str | None, typer.Option(help="Of a CLIP on the Hub.", show_default="main")]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON for machines.")]


def _layers(help: str, default: str) -> Any:
    return typer.Option(parser=_whole_numbers, metavar="N,N,...", help=help, show_default=default)


@convert.command()
def released(
    adapter: Annotated[Path, typer.Option(help="Adapter checkpoint of the released code (.pth).")],
    clip: Clip,
    output: Annotated[Path, typer.Option(help="Checkpoint folder to write.")],
    tokenizer: Tokenizer = None,
    image_size: Annotated[
        int | None,
        typer.Option(
            min=1,
            max=LARGEST_EDGE,
            help="Pixels that images are resized to.",
            show_default="518 for patch 14 at 336, else the CLIP's",
        ),
    ] = None,
    moe_layers: Annotated[
        list | None, _layers("Adapted blocks, counted from 0.", "the quarters of the depth: 5,11,17,23 of 24")
    ] = None,
    feature_layers: Annotated[
        list | None, _layers("Taps, counted from 1.", "the quarters of the depth: 6,12,18,24 of 24")
    ] = None,
    aggregation_sizes: Annotated[list | None, _layers("Windows of PAA; 1 turns it off.", "1,3,5")] = None,
    num_experts_per_tok: Annotated[
        int | None, typer.Option(min=1, help="k, experts a token.", show_default="2")
    ] = None,
    lora_alpha: Annotated[
        float | None, typer.Option(help="Experts are scaled by alpha / rank.", show_default="16")
    ] = None,
    residual_weight: Annotated[
        float | None, typer.Option(help="lambda, the experts' share in a token.", show_default="0.1")
    ] = None,
    image_feature_layer: Annotated[
        int | None,
        typer.Option(
            help="Tap of the image embedding.", show_default="the last, or without PAA the third last, as released"
        ),
    ] = None,
    vision_heads: VisionHeads = None,
    text_heads: TextHeads = None,
    activation: Activation = "gelu",
    dtype: StoredDtype = Dtype.float32,
    revision: Revision = None,
    as_json: AsJson = False,
) -> None:
    """Join a released adapter with its CLIP to a complete checkpoint folder with its processor.

    What the shapes tell is inferred. The activation is exact GELU, as the released code trains with it, unless told
    otherwise.
    """
    check_folder(output)
    clip = _fetch_revision(clip, revision)
    tokenizer = _find_tokenizer(tokenizer, clip)

    import torch
    from transformers.utils import logging

    from moeclip_hf.conversion import convert_released, load_tokenizer, save_moeclip
    from moeclip_hf.conversion.assembly import merge_settings

    logging.disable_progress_bar()

    given = {
        "moe_layers": moe_layers,
        "feature_layers": feature_layers,
        "aggregation_sizes": aggregation_sizes,
        "num_experts_per_tok": num_experts_per_tok,
        "lora_alpha": lora_alpha,
        "residual_weight": residual_weight,
        "image_feature_layer": image_feature_layer,
    }
    settings = {name: value for name, value in given.items() if value is not None}
    towers = {tower: {"hidden_act": activation} for tower in ("text_config", "vision_config")}
    model = convert_released(adapter, clip, **settings, **merge_settings(towers, _heads(vision_heads, text_heads)))
    save_moeclip(
        model,
        load_tokenizer(tokenizer, model.config.text_config),
        output,
        image_size=image_size,
        dtype=getattr(torch, dtype.value),
    )
    reasons = {"activation": "as the released code trains with it"} if activation == "gelu" else {}
    if image_feature_layer is None and model.config.image_feature_layer != model.config.feature_layers[-1]:
        reasons["image_feature_layer"] = "the third last tap, which the released code takes without PAA"
    _report({**_describe_moeclip(model.config), "output": output}, reasons, as_json)


@convert.command()
def openai(
    clip: Clip,
    output: Annotated[Path, typer.Option(help="Checkpoint folder to write.")],
    tokenizer: Tokenizer = None,
    vision_heads: VisionHeads = None,
    text_heads: TextHeads = None,
    dtype: StoredDtype = Dtype.float32,
    revision: Revision = None,
    as_json: AsJson = False,
) -> None:
    """Write a CLIP as a transformers folder with its processor, such as training starts from."""
    check_folder(output)
    clip = _fetch_revision(clip, revision)
    tokenizer = _find_tokenizer(tokenizer, clip)

    import torch
    from transformers.utils import logging

    from moeclip_hf.conversion import image_statistics, load_clip, load_tokenizer, save_clip

    logging.disable_progress_bar()

    model = load_clip(clip, **_heads(vision_heads, text_heads))
    save_clip(
        model,
        load_tokenizer(tokenizer, model.config.text_config),
        output,
        dtype=getattr(torch, dtype.value),
        **image_statistics(clip),
    )
    facts = {**_describe_towers(model.config), "activation": model.config.vision_config.hidden_act, "output": output}
    _report(facts, {"activation": "as this CLIP was pretrained with it"}, as_json)


@convert.command()
def export(
    model: Annotated[str, typer.Option(help="MoECLIP checkpoint folder or Hub id.")],
    output: Annotated[Path, typer.Option(help="Adapter checkpoint to write (.pth).")],
    revision: Annotated[str | None, typer.Option(help="Of a checkpoint on the Hub.", show_default="main")] = None,
    as_json: AsJson = False,
) -> None:
    """Write a checkpoint's adapter as the released code saves it; its CLIP is not in it."""
    if output.is_dir():
        raise typer.BadParameter(f"{output} is a folder, not a file", param_hint="--output")
    check_folder(output.parent)

    import torch
    from transformers.utils import logging

    from moeclip_hf.conversion import export_released, settings_beside_adapter
    from moeclip_hf.pretrained import load_pretrained

    logging.disable_progress_bar()

    loaded, processor = load_pretrained(model, device="cpu", dtype=torch.float32, revision=revision)
    output.parent.mkdir(parents=True, exist_ok=True)
    torch.save({"epoch": 0, "optimizer_state_dict": {}, **export_released(loaded)}, output)
    if not as_json:
        typer.echo("Not in the file, and to be set by hand where it is used:")
    facts = settings_beside_adapter(loaded.config)
    activations = {facts.pop(tower)["hidden_act"] for tower in ("text_config", "vision_config")}
    facts["activation"] = ", ".join(sorted(activations))
    facts["image_size"] = list(processor.image_processor.size.values())
    other = "where the released code runs gelu, so that its scores are others"
    _report({**facts, "output": output}, {"activation": other} if activations != {"gelu"} else {}, as_json)


def _fetch_revision(clip: str, revision: str | None) -> str:
    """The folder with a revision of a Hub repository, from which tokenizer and processor are taken too."""
    from moeclip_hf.conversion.reading import is_repository

    if revision is None or not is_repository(clip):
        return clip
    from moeclip_hf.pretrained import fetch_clip

    return str(fetch_clip(clip, revision))


def _find_tokenizer(tokenizer: str | None, clip: str) -> str:
    """The tokenizer given, that of a transformers CLIP, the merges beside a CLIP file, or OpenAI's on the Hub."""
    if tokenizer is not None:
        return tokenizer
    from moeclip_hf.conversion.reading import is_repository

    if is_repository(clip):
        return clip
    merges = Path(clip).with_name(_MERGES_FILE)
    return str(merges) if merges.exists() else _OPENAI_TOKENIZER


def _heads(vision: int | None, text: int | None) -> dict[str, Any]:
    given = {"vision_config": vision, "text_config": text}
    return {tower: {"num_attention_heads": heads} for tower, heads in given.items() if heads is not None}


def _describe_towers(config: Any) -> dict[str, Any]:
    towers = {
        name: f"{tower.num_hidden_layers} blocks, width {tower.hidden_size}, {tower.num_attention_heads} heads"
        for name, tower in (("vision_tower", config.vision_config), ("text_tower", config.text_config))
    }
    towers["vision_tower"] += f", patch {config.vision_config.patch_size}, {config.vision_config.image_size} pixels"
    return towers


def _describe_moeclip(config: Any) -> dict[str, Any]:
    facts = {name: getattr(config, name) for name in _MOECLIP_SETTINGS}
    return _describe_towers(config) | facts | {"activation": config.vision_config.hidden_act}


def _report(facts: dict[str, Any], reasons: dict[str, str], as_json: bool) -> None:
    """Print facts, and for people why some of them are as they are."""
    if as_json:
        print(json.dumps(facts, default=str))
        return
    width = max(map(len, facts))
    for name, value in facts.items():
        shown = ", ".join(map(str, value)) if isinstance(value, list) else str(value)
        reason = f", {reasons[name]}" if name in reasons else ""
        typer.echo(f"{name.replace('_', ' '):<{width}}  {shown}{reason}")
