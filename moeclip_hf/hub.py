"""Publishing: a checkpoint or an adapter as a Hub repository that loads with the package and without it.

A full checkpoint gets its code (`modeling/`, found by `auto_map` and `custom_pipelines`), a handler for Inference
Endpoints with its requirements, and a model card. An adapter gets a model card alone: PEFT runs no code of a
repository, and where there are both an adapter and a custom pipeline, `pipeline` loads the adapter's base instead.
"""

from __future__ import annotations

import fnmatch
import json
import os
import posixpath
import re
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from importlib.metadata import requires
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any
from urllib.parse import unquote

from huggingface_hub import CommitInfo, CommitOperationAdd, CommitOperationDelete, HfApi, hf_hub_download
from huggingface_hub.errors import HFValidationError, RemoteEntryNotFoundError
from huggingface_hub.utils import validate_repo_id

import moeclip_hf.modeling
from moeclip_hf.errors import CheckpointError, PublishingError
from moeclip_hf.hub_errors import describe_hub_error
from moeclip_hf.model_card import CardFacts, compose_card, read_evaluation, read_json
from moeclip_hf.modeling.configuration_moeclip import MoECLIPConfig
from moeclip_hf.pretrained import (
    ADAPTER_CONFIG,
    CONFIG,
    Pretrained,
    check_checkpoint,
    fetch_checkpoint,
    is_adapter,
    is_hub_id,
    leads_out,
)
from moeclip_hf.registration import PIPELINE_TASK
from moeclip_hf.stored_weights import ADAPTER_WEIGHTS, SAFETENSORS, weight_files

if TYPE_CHECKING:
    from os import PathLike

CARD = "README.md"
PROCESSOR = "processor_config.json"

AUTO_MAP = {"AutoConfig": "configuration_moeclip.MoECLIPConfig", "AutoModel": "modeling_moeclip.MoECLIPModel"}
CUSTOM_PIPELINES = {
    PIPELINE_TASK: {
        "impl": "pipeline_moeclip.ZeroShotAnomalyDetectionPipeline",
        "pt": ["AutoModel"],
        "type": "image",
    }
}
_PROCESSOR_CLASS = "processing_moeclip.MoECLIPProcessor"
_IMAGE_PROCESSOR_CLASS = "image_processing_moeclip.MoECLIPImageProcessor"

# What is taken from a folder beside the weights that would be loaded. Nothing else leaves the user's disk.
_OF_A_RUN = ("recipe.json", "training_curves.png")
_BESIDE = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    *_OF_A_RUN,
    "LICENSE*",
)
# What of a repository is replaced as a whole: a file of these that is no longer published is deleted.
_OURS = (
    *SAFETENSORS,
    "model-*-of-*.safetensors",
    ADAPTER_WEIGHTS,
    *_OF_A_RUN,
    CONFIG,
    ADAPTER_CONFIG,
    "*_moeclip.py",
    "moe_lora.py",
    "handler.py",
)

# What of a folder its card may show, and how Markdown and the HTML in it link to that.
_SHOWN = (".png", ".jpg", ".jpeg", ".gif", ".webp", ".svg", ".md", ".txt", ".pdf")
_LINKS = re.compile(
    r"""
      \]\(\s*<([^<>\n]+)>                                # [text](<a link>)
    | \]\(\s*([^\s()<>]+(?:\([^\s()<>]*\)[^\s()<>]*)*)   # [text](link "title")
    | ^[ ]{0,3}\[[^]\n]+\]:\s*<?([^\s<>]+)                # [text]: link
    | <(?:a|img)\s[^<>]*?\b(?:href|src)\s*=\s*(?:"([^"]+)"|'([^']+)'|([^\s"'<>]+))
    """,
    re.VERBOSE | re.MULTILINE | re.IGNORECASE,
)

# What the code of a repository imports; the ranges are this package's own.
_REQUIREMENTS = ("torch", "transformers", "huggingface_hub", "safetensors", "numpy", "pillow", "scipy")


def push_to_hub(
    source: str | PathLike[str] | Pretrained,
    repo_id: str,
    *,
    evaluation: str | PathLike[str] | None = None,
    base_model: str | None = None,
    datasets: Sequence[str] = (),
    license: str | None = None,
    private: bool | None = None,
    revision: str | None = None,
    create_pr: bool = False,
    commit_message: str | None = None,
    token: str | None = None,
) -> CommitInfo:
    """
    Publish a checkpoint or an adapter in one commit. Files of the repository that this replaces are deleted; a model
    card that is there keeps what its user wrote ([`moeclip_hf.model_card`]).

    Args:
        source: a folder of a checkpoint or an adapter; or a model ([`MoECLIPModel`], or a `PeftModel` over one) with
            its processor, as [`Pretrained`].
        repo_id (`str`): USER/NAME; made if it is not there.
        evaluation (path, *optional*): the `results.json` that `moeclip evaluate` wrote of these weights.
        base_model (`str`, *optional*): Hub id of the CLIP it is made of; an adapter knows its own.
        datasets (`Sequence[str]`, *optional*): that it was trained on.
        license (`str`, *optional*): as the Hub names licences, such as "apache-2.0".
        private (`bool`, *optional*): of a new repository; by default as the user's account is set.
        revision (`str`, *optional*): branch to commit to, made if it is not there; "main" by default.
        create_pr (`bool`): propose the commit as a pull request to a repository that is there.
        commit_message (`str`, *optional*)
        token (`str`, *optional*): instead of that of `hf auth login` or of HF_TOKEN.

    Returns:
        `CommitInfo` with `commit_url`, `oid`, `repo_url` and `pr_url`.

    Raises:
        CheckpointError: if the source is not what can be published, or the evaluation is of another model.
        PublishingError: if the Hub does not take it; says why.
    """
    _check_repo_id(repo_id)
    api = HfApi(token=token)
    with _as_folder(source) as folder:
        facts = _facts(folder, evaluation, base_model, datasets, license)
        repository_files(folder, repo_id, facts)  # before a repository is made
        try:
            if not create_pr:
                api.create_repo(repo_id, private=private, exist_ok=True)
                if revision:
                    api.create_branch(repo_id, branch=revision, exist_ok=True)
            # One commit is looked at and built upon: what somebody pushes meanwhile is not overwritten unseen.
            head = api.repo_info(repo_id, revision=revision).sha
            card = None if (folder / CARD).exists() else _card_of_repository(repo_id, head, token)
            files = repository_files(folder, repo_id, facts, card)
            stale = [path for path in api.list_repo_files(repo_id, revision=head) if _is_stale(path, files)]
            return api.create_commit(
                repo_id,
                [
                    *(CommitOperationAdd(path, content) for path, content in files.items()),
                    *(CommitOperationDelete(path) for path in stale),
                ],
                commit_message=commit_message or f"Publish with moeclip-hf: {len(files)} files",
                revision=revision,
                create_pr=create_pr,
                parent_commit=head,
            )
        except CheckpointError:
            raise
        except Exception as error:  # of the Hub, of the network, or no token at all
            reason = describe_hub_error(error, repo_id, revision)
            raise PublishingError(
                reason or f"{repo_id}: cannot be pushed to: {' '.join(str(error).split())}"
            ) from error


def write_repository(
    source: str | PathLike[str] | Pretrained,
    folder: str | PathLike[str],
    repo_id: str,
    *,
    evaluation: str | PathLike[str] | None = None,
    base_model: str | None = None,
    datasets: Sequence[str] = (),
    license: str | None = None,
) -> list[Path]:
    """
    Write what [`push_to_hub`] would publish to a folder.

    Args:
        source, repo_id, evaluation, base_model, datasets, license: as of [`push_to_hub`].
        folder (`str` or path): new, or empty.

    Returns:
        The files.

    Raises:
        CheckpointError: as [`push_to_hub`] does, or if the folder is not empty.
    """
    from moeclip_hf.calibration import refuse_filled_folder

    _check_repo_id(repo_id)
    target = Path(folder)
    refuse_filled_folder(target)
    with _as_folder(source) as checkpoint:
        files = repository_files(checkpoint, repo_id, _facts(checkpoint, evaluation, base_model, datasets, license))
        for name, content in files.items():
            path = target / name
            path.parent.mkdir(parents=True, exist_ok=True)
            if isinstance(content, bytes):
                path.write_bytes(content)
            else:
                shutil.copyfile(content, path)
    return [target / name for name in files]


def repository_files(folder: Path, repo_id: str, facts: CardFacts, card: str | None = None) -> dict[str, Path | bytes]:
    """
    Put together a repository: the content of its files, or where it lies, by name.

    Args:
        folder: of a checkpoint or an adapter.
        repo_id (`str`): what the card calls the repository.
        facts ([`CardFacts`]): for the card.
        card (`str`, *optional*): the text of a card to go on from, where the folder has none.

    Raises:
        CheckpointError: if the folder is not what can be published.
    """
    adapter = is_adapter(folder)
    config = _adapter_config(folder, facts.base_model) if adapter else _model_config(folder)
    processor = _processor_config(folder)
    check_checkpoint(folder)
    weights = weight_files(folder, (ADAPTER_WEIGHTS,) if adapter else SAFETENSORS)
    files: dict[str, Path | bytes] = {path.name: path for path in weights}
    files |= {
        path.name: path
        for path in sorted(folder.iterdir())
        if path.is_file() and any(fnmatch.fnmatch(path.name, pattern) for pattern in _BESIDE)
    }
    if adapter:
        files[ADAPTER_CONFIG] = _json(config)
    else:
        processor["auto_map"] = {"AutoProcessor": _PROCESSOR_CLASS}
        processor["image_processor"]["auto_map"] = {"AutoImageProcessor": _IMAGE_PROCESSOR_CLASS}
        files[CONFIG] = _json(config | {"auto_map": AUTO_MAP, "custom_pipelines": CUSTOM_PIPELINES})
        code = Path(next(iter(moeclip_hf.modeling.__path__)))
        files |= {path.name: path for path in sorted(code.glob("*.py")) if path.name != "__init__.py"}
        files["requirements.txt"] = handler_requirements().encode()
    files[PROCESSOR] = _json(processor)
    has_card = (folder / CARD).exists()
    if has_card:
        card = (folder / CARD).read_text(encoding="utf-8", errors="replace")
    composed = compose_card(folder, config, adapter, repo_id, facts, card, keep_results=has_card)
    # A card that somebody else may have written does not say which of this disk's files are published.
    shown = _shown_by_card(folder, composed, files) if has_card else {}
    return {CARD: composed.encode(), **files, **shown}


def handler_requirements() -> str:
    """The `requirements.txt` of a repository: what its code imports, in the ranges that this package takes."""
    ranges = {}
    for line in requires("moeclip-hf") or ():
        if match := re.fullmatch(r"([\w-]+)([^;]*)", line):
            ranges[match[1].lower().replace("-", "_")] = match[2].replace(" ", "")
    return "".join(f"{name}{ranges[name]}\n" for name in _REQUIREMENTS)


def _facts(
    folder: Path,
    evaluation: str | PathLike[str] | None,
    base_model: str | None,
    datasets: Sequence[str],
    license: str | None,
) -> CardFacts:
    if base_model is not None and not is_hub_id(base_model):
        raise CheckpointError(f"base model {base_model!r} is no Hub id (USER/NAME) by which others can load it.")
    document = read_evaluation(Path(evaluation)) if evaluation is not None else None
    if document is not None:
        _refuse_foreign_evaluation(folder, document, Path(str(evaluation)))
    return CardFacts(document, base_model, tuple(datasets), license)


def _refuse_foreign_evaluation(folder: Path, document: dict[str, Any], path: Path) -> None:
    """Refuse to publish figures of another model."""
    from moeclip_hf.evaluation.protocol import find_differences

    if difference := find_differences(folder, document):
        raise CheckpointError(
            f"{path}: was measured with another model than {folder} holds ({difference}): evaluate this one."
        )


def _model_config(folder: Path) -> dict[str, Any]:
    config = read_json(folder / CONFIG)
    if config.get("model_type") != "moeclip":
        raise CheckpointError(f"{folder}: is no MoECLIP: its config.json is of type {config.get('model_type')!r}.")
    try:
        MoECLIPConfig.from_dict(config)
    except ValueError as error:
        raise CheckpointError(f"{folder / CONFIG}: {error}") from error
    return config


def _processor_config(folder: Path) -> dict[str, Any]:
    path = folder / PROCESSOR
    config = read_json(path) if path.exists() else {}
    if not isinstance(config.get("image_processor"), dict):
        raise CheckpointError(
            f"{folder}: has no processor of a MoECLIP: save it there with MoECLIPProcessor.save_pretrained."
        )
    return config


def _adapter_config(folder: Path, base_model: str | None) -> dict[str, Any]:
    config = read_json(folder / ADAPTER_CONFIG)
    if config.get("peft_type") != "MOE_LORA":
        raise CheckpointError(f"{folder}: is no adapter of type MOE_LORA but of {config.get('peft_type')!r}.")
    recorded = config.get("base_model_name_or_path")
    base = base_model or recorded
    if not isinstance(base, str) or not is_hub_id(base):
        raise CheckpointError(
            f"{folder}: names {base!r} as its base, which others cannot load: name that CLIP's Hub id as base model."
        )
    # A revision is one of the base that is recorded with it.
    return config | {"base_model_name_or_path": base, "revision": config.get("revision") if base == recorded else None}


def _check_repo_id(repo_id: str) -> None:
    try:
        validate_repo_id(repo_id)
    except HFValidationError:
        raise PublishingError(f"{repo_id!r} is no id of a Hub repository: name it USER/NAME.") from None
    if "/" not in repo_id:
        raise PublishingError(f"{repo_id!r} lacks its owner: name it USER/{repo_id}.")


def _json(document: dict[str, Any]) -> bytes:
    return (json.dumps(document, indent=2, sort_keys=True) + "\n").encode()


def _shown_by_card(folder: Path, card: str, files: dict[str, Path | bytes]) -> dict[str, Path | bytes]:
    """Pictures and documents of the folder that the text of its own card links to; hidden files stay hidden."""
    shown: dict[str, Path | bytes] = {}
    for found in _LINKS.finditer(card):
        link = next(filter(None, found.groups()), "")
        name = posixpath.normpath(unquote(re.split("[?#]", link)[0]))
        path = folder / name
        if path.suffix.lower() not in _SHOWN or any(part[:1] in ("", ".") for part in name.split("/")):
            continue
        if os.path.isfile(path) and not leads_out(path, folder) and name not in files and name != CARD:
            shown[name] = path
    return shown


def _is_stale(path: str, files: dict[str, Path | bytes]) -> bool:
    return "/" not in path and path not in files and any(fnmatch.fnmatch(path, pattern) for pattern in _OURS)


def _card_of_repository(repo_id: str, revision: str | None, token: str | None) -> str | None:
    try:
        return Path(hf_hub_download(repo_id, CARD, revision=revision, token=token)).read_text(encoding="utf-8")
    except RemoteEntryNotFoundError:  # the Hub's own word; a request that failed says nothing about the card
        return None


@contextmanager
def _as_folder(source: str | PathLike[str] | Pretrained) -> Iterator[Path]:
    """The folder of a checkpoint; a model and its processor are written to one that lasts as long."""
    if not isinstance(source, tuple):
        if not Path(source).is_dir():
            raise CheckpointError(f"{source}: no such folder of a checkpoint or an adapter.")
        yield fetch_checkpoint(source)
        return
    model, processor = source
    with TemporaryDirectory() as temporary:
        folder = Path(temporary)
        model.save_pretrained(folder)
        name = getattr(model, "active_adapter", None)
        if isinstance(name, str) and (folder / name).is_dir():  # where PEFT puts an adapter with a name of its own
            folder = folder / name
        processor.save_pretrained(folder)
        yield fetch_checkpoint(folder)


__all__ = ["handler_requirements", "push_to_hub", "repository_files", "write_repository"]
