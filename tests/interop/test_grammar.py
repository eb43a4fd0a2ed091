"""Constrained decoding: whatever the weights, what is written is what the grammar allows."""

import json
import re
from pathlib import Path

import pytest
import torch

from seriatim.interop.grammar import Grammar
from seriatim.interop.tokenizer import PublishedTokenizer
from seriatim.systems.text.next_token import Config, NextToken

llguidance = pytest.importorskip("llguidance")
SCHEMA = {
    "type": "object",
    "properties": {"name": {"enum": ["fox", "dog"]}, "legs": {"type": "integer", "maximum": 9, "minimum": 0}},
    "required": ["name", "legs"], "additionalProperties": False,
}  # fmt: skip


@pytest.fixture(scope="module")
def system() -> NextToken:
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    inner = Tokenizer(models.BPE())
    inner.pre_tokenizer, inner.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(
        vocab_size=290, initial_alphabet=letters, special_tokens=["</s>"], show_progress=False
    )
    inner.train_from_iterator(['{"name": "fox", "legs": 4}'], trainer)
    tokenizer = PublishedTokenizer(inner)
    tokenizer.special = {"eos": 0}
    torch.manual_seed(0)
    made = NextToken(Config(length=128, width=32, depth=2, heads=2, vocab=tokenizer.vocab), tokenizer)
    return made.eval().requires_grad_(False)


@pytest.mark.parametrize("decoder", ["ancestral", "prompt-lookup"])
def test_json_of_a_schema(system, decoder):
    settings = {"grammar": Grammar("json_schema", json.dumps(SCHEMA)), "max_new_tokens": 60, "seed": 1}
    for made in system.generate(["a fox", "two dogs and"], decoder, **settings):
        said = json.loads(made.text)
        assert said["name"] in ("fox", "dog") and 0 <= said["legs"] <= 9
        assert made.ids[-1] == 0


def test_a_regular_expression_and_a_grammar_under_greedy_decoding(system):
    made = system.generate("x", grammar=Grammar("regex", "(ab){3}[0-9]{2}"), temperature=0, max_new_tokens=20)
    assert re.fullmatch("(ab){3}[0-9]{2}", made.text)
    made = system.generate("x", grammar=Grammar("lark", 'start: "yes" | "no"'), temperature=0, max_new_tokens=20)
    assert made.text in ("yes", "no")


def test_what_is_no_grammar_is_refused():
    with pytest.raises(ValueError, match="no JSON"):
        Grammar("json_schema", "{name")
    with pytest.raises(ValueError, match="json_schema, regex, lark"):
        Grammar("gbnf", "root ::= x")


def test_a_grammar_that_is_not_understood_is_refused_before_anything_is_generated(system):
    with pytest.raises(ValueError, match="regex is not understood"):
        system.generate("x", grammar=Grammar("regex", "[a-"), max_new_tokens=5)


def test_a_tokenizer_without_pieces_of_text_is_refused():
    bytes_only = NextToken(Config(length=32, width=32, depth=1, heads=2)).eval()
    with pytest.raises(ValueError, match="needs a tokenizer"):
        bytes_only.generate("x", grammar=Grammar("regex", "a+"), max_new_tokens=5)


def test_the_command_reads_schemas_from_files(system, monkeypatch, capsys, tmp_path: Path):
    from seriatim.cli import generating
    from seriatim.cli.main import main

    monkeypatch.setattr(generating, "load", lambda *a: system)
    (tmp_path / "schema.json").write_text(json.dumps(SCHEMA))
    line = [
        "generate",
        "run",
        "--prompt",
        "a",
        "--json-schema",
        str(tmp_path / "schema.json"),
        "--json",
        "--length",
        "60",
    ]
    assert main(line) == 0
    assert json.loads(json.loads(capsys.readouterr().out)["text"])["name"] in ("fox", "dog")
    assert main([*line[:-4], str(tmp_path / "none.json")]) == 2
