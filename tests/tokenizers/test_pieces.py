"""What ids stand for: the same text as the tokenizer writes, whatever it is; and ids of one as ids of another."""

from __future__ import annotations

import pytest

from seriatim.interop.tokenizer import PublishedTokenizer
from seriatim.tokenizers.pieces import agree, byte_letters, pieces, translation
from seriatim.tokenizers.text import ByteTokenizer, PairTokenizer

TEXTS = ["the cat sat on the mat, the cat sat", "ein schöner Tag – ja!", "def f(x):\n    return x\n"] * 4


@pytest.fixture(scope="module")
def pairs() -> PairTokenizer:
    return PairTokenizer.train(TEXTS, 300)


def sentencepiece() -> PublishedTokenizer:
    from tokenizers import Tokenizer, decoders, models

    vocab = {"<s>": 0, "\u2581the": 1, "\u2581cat": 2, "<0x0A>": 3, "s": 4}
    inner = Tokenizer(models.BPE(vocab, []))
    inner.decoder = decoders.Metaspace()
    inner.add_special_tokens(["<s>"])
    return PublishedTokenizer(inner)


def test_the_pieces_of_a_text_are_its_bytes(pairs):
    for tokenizer in (pairs, ByteTokenizer()):
        known = pieces(tokenizer)
        assert len(known) == tokenizer.vocab
        for text in TEXTS:
            assert b"".join(known[i] for i in tokenizer.encode(text)) == text.encode()


def test_special_ids_are_names_and_no_text(pairs):
    assert pieces(pairs)[pairs.special["eos"]] == "<eos>"
    assert pieces(ByteTokenizer())[ByteTokenizer.special["mask"]] == "<mask>"
    assert pieces(ByteTokenizer())[-1] is None  # a spare one
    assert pieces(sentencepiece()) == ("<s>", b" the", b" cat", b"\n", b"s")


def test_each_byte_has_a_letter_of_its_own():
    letters = byte_letters()
    assert sorted(letters.values()) == list(range(256)) and letters["a"] == ord("a") and letters["\u0120"] == ord(" ")


def test_a_vocabulary_agrees_with_itself_and_with_a_longer_one_that_begins_alike(pairs):
    longer = PairTokenizer.train(TEXTS, 300)
    longer.inner.add_tokens(["a piece more"])
    longer.vocab = longer.inner.get_vocab_size()
    assert longer.vocab == pairs.vocab + 1
    assert agree(pairs, pairs) and agree(pairs, longer) and agree(longer, pairs)
    assert not agree(pairs, ByteTokenizer()) and not agree(ByteTokenizer(), sentencepiece())


def test_ids_are_exchanged_where_pieces_are_equal_and_else_by_what_they_end_with(pairs):
    same, like = translation(pairs, ByteTokenizer())
    known, theirs = pieces(pairs), pieces(ByteTokenizer())
    longer = 0
    for i, piece in enumerate(known):
        if same[i] >= 0:
            assert theirs[same[i]] == piece and like[i] == same[i]
        elif isinstance(piece, bytes):
            assert theirs[like[i]] == piece[-1:]
            longer += 1
    assert int((same >= 0).sum()) == 256 + 6 and longer > 10


def test_of_several_pieces_with_which_a_text_ends_the_longest_is_read(pairs):
    _, like = translation(sentencepiece(), pairs)
    known = pieces(pairs)
    assert known[like[1]] in (b" the", b"the") and known[like[3]] == b"\n"
    back, _ = translation(pairs, sentencepiece())
    assert sorted(pieces(sentencepiece())[i] for i in back[back >= 0].tolist()) == [b"\n", b" cat", b" the", b"s"]
