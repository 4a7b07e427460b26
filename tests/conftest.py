import os

# Before torch. No more threads than the machines that tests are made for have cores, and a Hub must never be asked.
os.environ.setdefault("OMP_NUM_THREADS", "2")
# The same bits wherever numbers lie in memory, which tests of exactness compare: by itself MKL rounds matrix products
# otherwise on some processors when the weights come from a file.
os.environ.setdefault("MKL_CBWR", "AVX2,STRICT")
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["HF_HUB_DISABLE_PROGRESS_BARS"] = "1"

import shutil
import sys
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from hypothesis import settings
from limits import memory_limit

settings.register_profile("untimed", deadline=None)  # a busy machine is no failure
settings.load_profile("untimed")


def pytest_make_parametrize_id(val: object, argname: str) -> str | None:
    """No bytes in a test's name: gzip writes the time of day, and then the suite's processes find other tests each."""
    return argname if isinstance(val, bytes) else None


@pytest.fixture(scope="session")
def tokenizer():
    """A CLIP tokenizer that knows a few words and every letter, with room for 20 tokens."""
    from transformers import CLIPTokenizer

    words = "a the photo of with damaged broken flaw defect damage object metal nut wood . scan"
    symbols = ["<|startoftext|>", "<|endoftext|>"]
    vocab: dict[str, int] = {}
    merges = []
    for letter in "abcdefghijklmnopqrstuvwxyz.0123456789'-":
        symbols += [letter, f"{letter}</w>"]
    for word in words.split():
        pieces = [*word[:-1], f"{word[-1]}</w>"]
        while len(pieces) > 1:
            merges.append(f"{pieces[0]} {pieces[1]}")
            pieces[:2] = [pieces[0] + pieces[1]]
            symbols.append(pieces[0])
    for symbol in symbols:
        vocab.setdefault(symbol, len(vocab))
    return CLIPTokenizer(
        vocab=vocab, merges=[tuple(merge.split()) for merge in dict.fromkeys(merges)], model_max_length=20
    )


@pytest.fixture(scope="session")
def clip(tmp_path_factory, tokenizer) -> Path:
    """The folder of a small random CLIP, to train on."""
    from training_runs import write_plain_clip

    return write_plain_clip(tmp_path_factory.mktemp("clip"), tokenizer)


@pytest.fixture(scope="session")
def rows(tmp_path_factory):
    """24 images of two classes with masks, to train on."""
    from training_runs import write_folder

    from moeclip_hf.data import load_folder

    return load_folder(write_folder(tmp_path_factory.mktemp("data")))


@pytest.fixture
def bounded_memory() -> Iterator[None]:
    """Nothing may set aside more than 2 GB; what would is refused by the system, not by luck."""
    with memory_limit(2 << 30):
        yield


@pytest.fixture
def checkpoint(tmp_path) -> Path:
    """A copy of the embedded checkpoint, to be spoiled."""
    from moeclip_hf.pretrained import EMBEDDED_CHECKPOINT

    return Path(shutil.copytree(EMBEDDED_CHECKPOINT, tmp_path / "checkpoint"))


@pytest.fixture
def command(monkeypatch, capfdbinary) -> Callable[..., tuple[int, bytes, bytes]]:
    """Runs `moeclip` in this process, and gives its status, what it printed, and what it said on standard error."""
    from moeclip_hf.cli import main

    def run(*arguments: str | Path) -> tuple[int, bytes, bytes]:
        monkeypatch.setattr(sys, "argv", ["moeclip", *map(str, arguments)])
        monkeypatch.setattr(warnings, "showwarning", warnings.showwarning)
        with pytest.raises(SystemExit) as ended:
            main()
        return int(ended.value.code or 0), *capfdbinary.readouterr()

    return run
