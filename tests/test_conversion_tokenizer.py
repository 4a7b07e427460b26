"""OpenAI's list of merges makes the tokenizer that CLIP's own code makes of it."""

import gzip

import pytest
from plain_bpe import PlainBPE, learn_merges, write_merges
from plain_clip import CONTEXT_LENGTH
from transformers import AutoTokenizer, CLIPTextConfig

from moeclip_hf.conversion import load_tokenizer
from moeclip_hf.errors import ConversionError

STRINGS = [
    "a photo of a damaged dark bottle with defect.",
    "The  BROKEN\ttransistor\n",
    "it's they'll isn't 'tis 'S",
    "naïve café über FAÇADE",
    "日本語 texture 日本",
    "pcb4 x2000 3.5mm 50%",
    "!?... --- (a_b) #@",
    "smile 🙂 zażółć",
    "",
]


@pytest.fixture(scope="module")
def merges():
    return learn_merges(80)


def text_config(vocab_size: int, **settings) -> CLIPTextConfig:
    ids = {"bos_token_id": vocab_size - 2, "eos_token_id": vocab_size - 1}
    return CLIPTextConfig(vocab_size=vocab_size, max_position_embeddings=CONTEXT_LENGTH, **(ids | settings))


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory, merges):
    """Of the first 60 merges: a list longer than the vocabulary is cut."""
    path = write_merges(tmp_path_factory.mktemp("bpe") / "bpe_simple_vocab_16e6.txt.gz", merges)
    return load_tokenizer(path, text_config(256 + 256 + 60 + 2))


@pytest.mark.parametrize("text", STRINGS)
def test_ids_equal_those_of_plain_byte_pair_encoding(tokenizer, merges, text):
    assert tokenizer(text)["input_ids"] == PlainBPE(merges[:60]).encode(text)


def test_merges_make_words_shorter_than_their_letters(tokenizer):
    assert len(tokenizer("a photo of a bottle")["input_ids"]) < 2 + len("aphotoofabottle")


def test_the_vocabulary_of_openai_is_laid_out_as_published(tokenizer):
    """Facts of the published vocabulary: where its symbols, word ends and merges begin."""
    assert tokenizer.convert_tokens_to_ids(["!", "~", "¡", "Ā", "!</w>", "~</w>"]) == [0, 93, 94, 188, 256, 349]
    assert tokenizer.convert_tokens_to_ids(["<|startoftext|>", "<|endoftext|>"]) == [572, 573]


def test_it_pads_with_end_of_text_and_knows_the_longest_sentence(tokenizer):
    batch = tokenizer(["a", "a photo of a bottle"], padding=True)
    assert batch["input_ids"][0][2:] == [573] * (len(batch["input_ids"][1]) - 2)
    assert batch["attention_mask"][0][:4] == [1, 1, 1, 0]
    assert tokenizer.model_max_length == CONTEXT_LENGTH


def test_it_comes_back_from_a_folder_the_same(tmp_path, tokenizer):
    tokenizer.save_pretrained(tmp_path)
    for again in (AutoTokenizer.from_pretrained(tmp_path), load_tokenizer(tmp_path, text_config(574))):
        assert [again(text)["input_ids"] for text in STRINGS] == [tokenizer(text)["input_ids"] for text in STRINGS]


def test_the_end_id_of_old_configurations_means_the_last_token(tmp_path, tokenizer):
    tokenizer.save_pretrained(tmp_path)
    assert load_tokenizer(tmp_path, text_config(574, eos_token_id=2)).eos_token_id == 573


def test_a_tokenizer_of_another_clip_is_refused(tmp_path, tokenizer):
    tokenizer.save_pretrained(tmp_path)
    with pytest.raises(ConversionError, match=r"574 tokens and ends texts with 573, where the text tower has 550 "):
        load_tokenizer(tmp_path, text_config(550))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"not gzip", "cannot be read as gzipped text"),
        (gzip.compress(b"a b\n" * 500)[:20], "cannot be read as gzipped text"),
        (gzip.compress(b"\xff\xfe\n" * 500), "cannot be read as gzipped text"),
        (gzip.compress(b"#version\na b\n"), "at least 60 lines of two symbols"),
        (gzip.compress(b"#version\n" + b"a b c\n" * 60), "at least 60 lines of two symbols"),
        (gzip.compress(b"#version\n" + b"a b\n" * 60), "59 of its tokens twice"),
        (
            gzip.compress("\n".join(["#version", *(f"a{i} b{i}" for i in range(60))]).encode()),
            "is no list of merges",
        ),
    ],
)
def test_a_file_that_is_no_list_of_merges_is_refused(tmp_path, content, message):
    path = tmp_path / "bpe.txt.gz"
    path.write_bytes(content)
    with pytest.raises(ConversionError, match=message) as error:
        load_tokenizer(path, text_config(574))
    assert "\n" not in str(error.value)


def test_nothing_there_is_refused(tmp_path):
    with pytest.raises(ConversionError, match="no such file"):
        load_tokenizer(tmp_path / "bpe.txt.gz", text_config(574))
    with pytest.raises(ConversionError, match="no tokenizer can be loaded from there"):
        load_tokenizer(tmp_path, text_config(574))
