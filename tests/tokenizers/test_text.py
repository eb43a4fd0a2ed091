"""Text tokenizers: what comes back, what is reserved, and how many bytes an id stands for."""

from __future__ import annotations

import json

import pytest
import torch

from seriatim.systems.text_system import Windows
from seriatim.tokenizers.text import (
    RESERVED,
    SPECIAL,
    ByteTokenizer,
    PairTokenizer,
    WordTokenizer,
    from_json,
    id_stream,
    load_text_tokenizer,
)
from seriatim.training.checkpoint import save_json

TEXTS = ["def f(x):\n    return x  # naïve café\n" * 20, "Ω tabs\tand\r\nlines \U0001f600 " * 20, "aaaa bbbb " * 30]
STRANGE = ["", " ", "\n\n\t", "日本語 – né\U0001f469‍\U0001f680", "<bos> is text here, <mask> too", "\x00\x7f"]


@pytest.fixture(scope="module", params=["bytes", "bpe"])
def exact(request):
    return ByteTokenizer() if request.param == "bytes" else PairTokenizer.train(TEXTS, 300)


@pytest.mark.parametrize("text", [*TEXTS, *STRANGE[:4], STRANGE[5]])
def test_bytes_and_pairs_give_any_text_back(exact, text):
    ids = exact.encode(text)
    assert exact.decode(ids) == text
    assert all(0 <= i < exact.vocab for i in ids)
    assert int(exact.bytes_of[torch.tensor(ids, dtype=torch.long)].sum()) == len(text.encode())


def test_reserved_ids_stand_for_no_text(exact):
    ids = list(exact.special.values())
    assert tuple(exact.special) == SPECIAL and len(set(ids)) == len(SPECIAL)
    assert exact.decode(ids) == "" and exact.bytes_of[ids].tolist() == [0] * len(ids)


def test_what_users_write_is_no_special_id():
    """A prompt cannot smuggle in the end of a text."""
    tokenizer = ByteTokenizer()
    assert not set(tokenizer.encode(STRANGE[4])) & set(tokenizer.special.values())
    pairs = PairTokenizer.train(TEXTS, 300)
    assert not set(pairs.encode(STRANGE[4])) & set(pairs.special.values())
    assert pairs.decode(pairs.encode(STRANGE[4])) == STRANGE[4]


def test_pairs_shorten_what_they_were_trained_on():
    pairs = PairTokenizer.train(TEXTS, 400)
    assert pairs.vocab <= 400 and len(pairs.encode(TEXTS[2])) < len(TEXTS[2]) / 3
    assert min(i for i in pairs.encode(TEXTS[0])) >= RESERVED


def test_words_are_the_most_frequent_ones():
    words = WordTokenizer.train(["one two two three three three"], RESERVED + 2)
    assert words.encode("three two one") == [RESERVED, RESERVED + 1, words.inner.token_to_id("<spare0>")]
    assert words.decode([RESERVED + 1, RESERVED]) == "two three"


@pytest.mark.parametrize(
    "kind", [ByteTokenizer, lambda: PairTokenizer.train(TEXTS, 300), lambda: WordTokenizer.train(TEXTS)]
)
def test_a_saved_tokenizer_is_the_same(kind, tmp_path):
    tokenizer = kind()
    save_json(tokenizer.to_json(), tmp_path / "tokenizer.json")
    again = load_text_tokenizer(tmp_path)
    assert type(again) is type(tokenizer) and again.special == tokenizer.special and again.vocab == tokenizer.vocab
    assert again.encode(TEXTS[0]) == tokenizer.encode(TEXTS[0])
    assert torch.equal(again.bytes_of, tokenizer.bytes_of)
    assert from_json(json.loads(json.dumps(tokenizer.to_json()))).kind == tokenizer.kind


def test_broken_and_missing_files_and_impossible_sizes_are_refused(tmp_path):
    with pytest.raises(FileNotFoundError, match="no tokenizer"):
        load_text_tokenizer(tmp_path)
    (tmp_path / "tokenizer.json").write_text('{"kind": "bpe", "tok')
    with pytest.raises(ValueError, match="cut short"):
        load_text_tokenizer(tmp_path)
    with pytest.raises(ValueError, match="starts from 272 ids"):
        PairTokenizer.train(TEXTS, 200)


def test_a_stream_ends_every_document(exact):
    ids = id_stream(exact, ["ab", "", "c"])
    eos = exact.special["eos"]
    assert ids.tolist() == [*exact.encode("ab"), eos, eos, *exact.encode("c"), eos]


def test_windows_are_stretches_of_the_stream_and_must_fit():
    windows = Windows(torch.arange(100, dtype=torch.int32), 10)
    assert len(windows) == 91
    taken = windows.take(torch.tensor([0, 90]))["token"]
    assert taken.tolist() == [list(range(10)), list(range(90, 100))] and taken.dtype == torch.long
    with pytest.raises(ValueError, match="a window takes 10"):
        Windows(torch.arange(5), 10)
