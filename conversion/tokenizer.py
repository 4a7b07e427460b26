"""The tokenizer of a CLIP: transformers' own, or made of the merges that OpenAI publishes."""

import gzip
import zlib
from pathlib import Path
from typing import Any

from transformers import AutoTokenizer, CLIPTextConfig, CLIPTokenizer, PreTrainedTokenizerBase

from moeclip_hf.conversion.reading import one_line
from moeclip_hf.errors import ConversionError
from moeclip_hf.pretrained import tokenizer_difference

# Bytes that stand for themselves in the vocabulary, which lists them first; the others become characters from 256 on.
_PRINTABLE_BYTES = (*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1))
_START, _END = "<|startoftext|>", "<|endoftext|>"
_WORD_END = "</w>"
# OpenAI's file unpacks to 3 MB.
_MAX_MERGES_BYTES = 1 << 26


def load_tokenizer(source: str | Path, text_config: CLIPTextConfig) -> PreTrainedTokenizerBase:
    """
    Load the tokenizer that belongs to a text tower.

    Args:
        source (`str` or `Path`): a transformers folder or Hub id, or OpenAI's `bpe_simple_vocab_16e6.txt.gz`.
        text_config ([`~transformers.CLIPTextConfig`]): tells the size of the vocabulary and the longest sentence.

    Raises:
        ConversionError: if it cannot be read, or its ids are not the text tower's.
    """
    if str(source).endswith(".gz"):
        tokenizer: PreTrainedTokenizerBase = tokenizer_from_merges(source, text_config.vocab_size)
    else:
        try:
            tokenizer = AutoTokenizer.from_pretrained(str(source), trust_remote_code=False)
        except Exception as error:  # whatever a missing or broken tokenizer leads to
            raise ConversionError(
                f"{source}: no tokenizer can be loaded from there; pass a transformers folder or Hub id, or OpenAI's "
                f"bpe_simple_vocab_16e6.txt.gz (--tokenizer): {one_line(error)}"
            ) from error
    if difference := tokenizer_difference(tokenizer, text_config):
        raise ConversionError(
            f"{source} holds another tokenizer than the CLIP's: {difference}: pass the CLIP's own (--tokenizer)."
        )
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    tokenizer.model_max_length = min(tokenizer.model_max_length, text_config.max_position_embeddings)
    return tokenizer


def tokenizer_from_merges(path: str | Path, vocab_size: int) -> CLIPTokenizer:
    """
    Make a CLIP tokenizer of OpenAI's list of byte-pair merges.

    The vocabulary is, in this order: 256 symbols for the bytes, the same at a word's end, one token a merge, start and
    end of text. The list is longer than CLIP's vocabulary, so as many merges are taken as leave room for the rest.
    Unlike OpenAI's code it pads with end-of-text, not with 0; only the first end-of-text token is ever looked at.

    Args:
        path (`str` or `Path`): `bpe_simple_vocab_16e6.txt.gz`.
        vocab_size (`int`): of the text tower; 49,408 for OpenAI's.

    Raises:
        ConversionError: if the file is no such list, or too short.
    """
    symbols = [chr(byte) for byte in _PRINTABLE_BYTES]
    symbols += [chr(256 + index) for index in range(256 - len(symbols))]
    vocabulary = symbols + [symbol + _WORD_END for symbol in symbols]
    merges = _read_merges(path, vocab_size - len(vocabulary) - 2)
    vocabulary += [merge.replace(" ", "") for merge in merges] + [_START, _END]
    ids = {token: index for index, token in enumerate(vocabulary)}
    if len(ids) != vocab_size:
        raise ConversionError(f"{path} makes {vocab_size - len(ids)} of its tokens twice: it is no list of merges.")
    try:
        pairs: Any = [tuple(merge.split(" ")) for merge in merges]
        return CLIPTokenizer(vocab=ids, merges=pairs)
    except Exception as error:  # a merge of symbols that no earlier merge makes
        raise ConversionError(f"{path} is no list of merges: {one_line(error)}") from error


def _read_merges(path: str | Path, count: int) -> list[str]:
    """Read the first merges of a list, which stand behind a line that names its version."""
    try:
        with gzip.open(path) as file:
            lines = file.read(_MAX_MERGES_BYTES).decode().split("\n")[1 : 1 + count]
    except FileNotFoundError:
        raise ConversionError(f"{path}: no such file.") from None
    except (OSError, EOFError, zlib.error, UnicodeDecodeError) as error:
        raise ConversionError(f"{path} cannot be read as gzipped text: {one_line(error)}") from error
    merges = [line for line in lines if line]
    if count < 0 or len(merges) != count or any(line.count(" ") != 1 for line in merges):
        raise ConversionError(
            f"{path} must hold at least {max(count, 0)} lines of two symbols each, behind one of its version."
        )
    return merges
