"""CLIP's byte-pair encoding written plainly, and merges for it learnt from a few words."""

import gzip
from itertools import pairwise
from pathlib import Path

import regex

CORPUS = """a photo of a damaged dark bottle with flaw. the broken transistor isn't here; it's the defect of the pcb!
1001 scratches on über naïve café façades, 日本 texture 日本 textures, and 'quoted' words they'll've seen re-seen"""


def byte_characters() -> dict[int, str]:
    """CLIP's stand-ins for bytes: itself where it prints, else the next character from 256 on."""
    characters, spare = {}, 256
    for byte in range(256):
        if 33 <= byte <= 126 or 161 <= byte <= 172 or 174 <= byte <= 255:
            characters[byte] = chr(byte)
    for byte in range(256):
        if byte not in characters:
            characters[byte] = chr(spare)
            spare += 1
    return characters


class PlainBPE:
    """Byte-pair encoding as CLIP does it: lower-case words, bytes, then the earliest merge first."""

    words = regex.compile(r"'s|'t|'re|'ve|'m|'ll|'d|\p{L}+|\p{N}|[^\s\p{L}\p{N}]+", regex.IGNORECASE)

    def __init__(self, merges: list[tuple[str, str]]):
        self.characters = byte_characters()
        self.ranks = {merge: rank for rank, merge in enumerate(merges)}
        symbols = list(self.characters.values())
        vocabulary = symbols + [f"{s}</w>" for s in symbols] + ["".join(merge) for merge in merges]
        self.ids = {token: index for index, token in enumerate(vocabulary)}
        self.start, self.end = len(vocabulary), len(vocabulary) + 1

    def split(self, text: str) -> list[list[str]]:
        words = self.words.findall(" ".join(text.split()).lower())
        spelt = [[self.characters[byte] for byte in word.encode()] for word in words]
        return [[*word[:-1], f"{word[-1]}</w>"] for word in spelt]

    def merge(self, word: list[str]) -> list[str]:
        while True:
            pairs = [(self.ranks[pair], i) for i, pair in enumerate(pairwise(word)) if pair in self.ranks]
            if not pairs:
                return word
            _, i = min(pairs)
            word = [*word[:i], word[i] + word[i + 1], *word[i + 2 :]]

    def encode(self, text: str) -> list[int]:
        tokens = [token for word in self.split(text) for token in self.merge(word)]
        return [self.start, *(self.ids[token] for token in tokens), self.end]


def learn_merges(count: int) -> list[tuple[str, str]]:
    """The merges of the corpus's most frequent pairs, one after the other."""
    spelling = PlainBPE([])
    words, merges = spelling.split(CORPUS), []
    while len(merges) < count:
        pairs: dict[tuple[str, str], int] = {}
        for word in words:
            for pair in pairwise(word):
                pairs[pair] = pairs.get(pair, 0) + 1
        best = max(pairs, key=pairs.get)
        merges.append(best)
        words = [PlainBPE([best]).merge(word) for word in words]
    return merges


def write_merges(path: Path, merges: list[tuple[str, str]]) -> Path:
    """Write a list of merges as OpenAI publishes its own."""
    lines = ["#version: 0.2", *(" ".join(merge) for merge in merges), ""]
    path.write_bytes(gzip.compress("\n".join(lines).encode()))
    return path
