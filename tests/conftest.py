import os

# Before torch: several small tests side by side are quicker on one thread each, and a Hub must never be asked.
os.environ.setdefault("OMP_NUM_THREADS", "2")
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["HF_HUB_DISABLE_PROGRESS_BARS"] = "1"

import pytest


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
