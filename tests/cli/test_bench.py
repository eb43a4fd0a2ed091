"""Decoders side by side, as a user compares them: figures that fit together, faults that are caught, mistakes."""

from __future__ import annotations

import json
from io import StringIO

import pytest
import torch
from PIL import Image
from rich.console import Console

from seriatim.cli.benching import figures_table, groups_table
from seriatim.cli.main import main
from seriatim.decoding.draft import NGram
from seriatim.decoding.verify import Verifier
from seriatim.evaluation.bench import Prompt, take_turns
from seriatim.interop.chat import ChatTemplate
from seriatim.systems import decoders, language_model
from seriatim.systems.text.next_token import Config, NextToken
from seriatim.tokenizers.text import ByteTokenizer
from seriatim.verbs import bench as verb
from seriatim.verbs import bench_lossless
from seriatim.verbs.bench import bench
from seriatim.verbs.bench_lossless import plain_row

TEXTS = ("abcabcab", "the cat and the cat and th", "xyz xyz xy", "one two one two one tw", "so far so good so f")
SETTINGS = {"new_tokens": 24, "runs": 2}


def model(length: int = 96) -> NextToken:
    torch.manual_seed(0)
    made = NextToken(Config(length=length, width=32, depth=2, heads=2))
    for p in made.parameters():
        p.data.mul_(6 if p.dim() > 1 else 1)
    return made.double().eval().requires_grad_(False)


@pytest.fixture(scope="module")
def system() -> NextToken:
    return model()


@pytest.fixture(scope="module")
def prompts(tmp_path_factory):
    path = tmp_path_factory.mktemp("prompts") / "prompts.txt"
    path.write_text("\n\n".join(TEXTS), encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A trained model in a folder."""
    folder = tmp_path_factory.mktemp("runs")
    (folder / "book.txt").write_text("The quick brown fox jumps over the lazy dog.\n\n" * 300, encoding="utf-8")
    sizes = ["--length", "64", "--batch", "2", "--steps", "2", "--width", "16", "--depth", "1", "--heads", "2"]
    data = ["--data", str(folder / "book.txt"), "--out", str(folder / "run")]
    assert main(["train", "next-token", *data, *sizes]) == 0
    return folder / "run"


class Reckless(Verifier):
    """Wrong on purpose: accepts whatever is drafted."""

    def verify(self, turn, random):
        for r in turn.alive:
            nodes = [i for i, token in enumerate(turn.value[r]) if token >= 0]
            if all(turn.emit(r, turn.value[r][i], i) for i in nodes):
                turn.emit(r, int(turn.at([r]).sample(random, turn.key([r]))[0, 0]))


@pytest.fixture
def reckless(monkeypatch):
    """A decoder of that name."""

    def decoder_of(system, name, sampling, stop=None):
        if name == "reckless":
            return decoders.Decoding(Reckless(stop), NGram())
        return decoders.decoder_of(system, name, sampling, stop)

    monkeypatch.setattr(language_model, "decoder_of", decoder_of)
    monkeypatch.setattr(verb, "named", lambda name: (name, None, {}))
    monkeypatch.setattr(bench_lossless, "is_relaxed", lambda name: False)


# ---- what comes out --------------------------------------------------------------------------------------------------


def test_figures_fit_together_and_to_what_generation_says(system, prompts):
    told = bench(system, ["prompt-lookup", "jacobi"], prompts, **SETTINGS)
    assert list(told["decoders"]) == ["ancestral", "prompt-lookup", "jacobi"]
    assert any("ancestral was added" in note for note in told["notes"])
    assert told["prompts"]["count"] == len(told["by_prompt"]) == 5 and told["dtype"] == "float64"
    for name, own in told["decoders"].items():
        parts = [own, *([own["looping"]] if own["outputs"] == "varied" and own["looping"] else [])]
        assert sum(p["prompts"] for p in parts) == 5
        made = [system.generate(text, name, max_new_tokens=24, temperature=0) for text in TEXTS]
        for key, expected in (
            ("tokens", sum(len(g.ids) for g in made)),
            ("forwards", sum(g.forwards for g in made)),
            ("drafted", sum(g.drafted for g in made)),
            ("accepted", sum(g.accepted for g in made)),
        ):
            assert sum(p[key] for p in parts) == expected
        for part in parts:
            assert part["tokens_per_second"] == pytest.approx(part["tokens"] / part["seconds"])
            assert part["mean_accepted_length"] == pytest.approx(part["tokens"] / part["forwards"])
            assert 0 < part["first_token_seconds"] < part["seconds"]
            assert len(part["ratios"]) == 2
    plain, drafted = told["decoders"]["ancestral"], told["decoders"]["prompt-lookup"]
    assert plain["ratio"] == plain["mean_accepted_length"] == 1 and plain["lossless"]["verdict"] == "baseline"
    assert drafted["ratio"] == pytest.approx(drafted["tokens_per_second"] / plain["tokens_per_second"])
    assert drafted["forwards"] < plain["forwards"] and drafted["lossless"]["verdict"] == "holds"


@pytest.mark.parametrize(
    "spec, relaxed",
    [("medusa:x", False), ("medusa:x+typical=true", True), ("beam", True), ("token-recycling+nodes=80", False)],
)
def test_losslessness_is_claimed_by_card_and_options(spec, relaxed):
    assert decoders.is_relaxed(spec) == relaxed


@pytest.mark.parametrize("runs", (1, 3))
def test_no_run_profits_from_what_a_decoder_learned_of_the_same_prompts(system, prompts, runs, monkeypatch):
    def forwards(name: str) -> list[int]:
        decoders.forget(system)
        return [system.generate(text, name, max_new_tokens=24, temperature=0).forwards for text in TEXTS]

    hot, cold, met = forwards("token-recycling"), forwards("token-recycling+hot=false"), []
    assert hot[0] == cold[0] and sum(hot) < sum(cold)
    monkeypatch.setattr(verb, "take_turns", lambda *given: met.append(take_turns(*given)) or met[0])
    bench(system, ["token-recycling"], prompts, new_tokens=24, runs=runs, memory=False)
    assert [[w.forwards for w in each] for each in met[0]["token-recycling"]] == [[n] * runs for n in hot]


def test_a_model_that_repeats_itself_is_told_apart(prompts):
    constant = model()
    constant.model.heads["token"].weight.data.zero_()
    told = bench(constant, ["prompt-lookup"], prompts, **SETTINGS)
    assert all(p["looping"] for p in told["by_prompt"])
    assert told["decoders"]["prompt-lookup"]["outputs"] == "looping"
    assert any("5 of 5 outputs repeat themselves" in note for note in told["notes"])


def test_a_decoder_that_accepts_everything_is_caught_greedily(system, prompts, reckless):
    told = bench(system, ["reckless"], prompts, **SETTINGS)["decoders"]["reckless"]["lossless"]
    assert told["verdict"] == "fails" and told["divergences"]


def test_a_decoder_that_accepts_everything_is_caught_in_bfloat16_where_rounding_is_allowed(prompts, reckless):
    rounded = model().to(torch.bfloat16)
    told = bench(rounded, ["reckless", "prompt-lookup"], prompts, **SETTINGS)["decoders"]
    assert told["reckless"]["lossless"]["verdict"] == "fails"
    assert told["reckless"]["lossless"]["largest_steps"] > 2
    assert told["prompt-lookup"]["lossless"]["verdict"] == "holds"


def test_sampling_is_judged_by_equal_texts_and_where_they_differ_by_draws(system, prompts, reckless):
    settings = {**SETTINGS, "temperature": 1.0}
    told = bench(system, ["prompt-lookup", "reckless"], prompts, **settings)["decoders"]
    assert told["prompt-lookup"]["lossless"]["verdict"] == "holds"
    assert told["prompt-lookup"]["lossless"]["equal_texts"] == 5
    assert told["reckless"]["lossless"]["verdict"] == "not tested"
    assert "--draws" in told["reckless"]["lossless"]["rule"]
    drawn = bench(system, ["prompt-lookup", "reckless"], prompts, draws=1000, **settings)["decoders"]
    assert drawn["reckless"]["lossless"]["verdict"] == "fails"
    assert drawn["prompt-lookup"]["lossless"]["verdict"] == "holds"
    assert drawn["prompt-lookup"]["lossless"]["drafted"] > 0
    assert 0.001 <= drawn["prompt-lookup"]["lossless"]["p_value"] <= 1


def test_logits_at_a_divergence_are_those_that_plain_decoding_met(system):
    made = system.generate(TEXTS[0], temperature=0, max_new_tokens=24)
    ids = system.tokenizer.encode(TEXTS[0])
    for at in (0, 7, 23):
        row = plain_row(system, Prompt(tuple(ids), ""), at, 24)
        torch.testing.assert_close(row, system.logits(torch.tensor([ids + made.ids[:at]]))[0, -1])
        assert int(row.argmax()) == made.ids[at]


def test_built_in_prompts_that_are_too_long_lose_their_beginning(system):
    told = bench(system, ["ancestral"], count=4, new_tokens=8, runs=1)
    assert told["prompts"]["longest"] == 96 - 8 and told["prompts"]["count"] == 4
    assert any("lost their beginning: 4" in note for note in told["notes"])


class Templated(ByteTokenizer):
    def encode_templated(self, text):
        return self.encode(text)


def test_later_turns_follow_the_answers_to_earlier_ones(tmp_path):
    system = model(length=200)
    source = "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}"
    system.chat, system.__dict__["tokenizer"] = ChatTemplate(source, {}), Templated()
    path = tmp_path / "questions.jsonl"
    path.write_text(json.dumps({"category": "writing", "turns": ["Write.", "Again."]}), encoding="utf-8")
    told = bench(system, ["ancestral"], path, new_tokens=8, runs=1)
    first = "<user>Write."
    answer = system.generate(first, temperature=0, max_new_tokens=8).text
    second = f"{first}<assistant>{answer}<user>Again."
    assert [p["tokens"] for p in told["by_prompt"]] == [len(first), len(system.tokenizer.encode(second))]
    system.chat = None
    told = bench(system, ["ancestral"], path, new_tokens=8, runs=1)
    assert [p["tokens"] for p in told["by_prompt"]] == [len("Write.")]
    assert any("first turns" in note for note in told["notes"])


# ---- the command -----------------------------------------------------------------------------------------------------


def test_the_command_prints_one_object_and_leaves_files(run, prompts, tmp_path, capsys):
    out = tmp_path / "bench"
    arguments = ["bench", str(run), "--prompts", str(prompts), "--new-tokens", "8", "--runs", "1", "--no-memory"]
    assert main([*arguments, "--dtype", "bfloat16", "--json", "--out", str(out)]) == 0
    said = json.loads(capsys.readouterr().out)
    assert said == json.loads((out / "bench.json").read_text(encoding="utf-8"))
    assert said["dtype"] == "bfloat16" and said["decoders"]["ancestral"]["peak_memory"] is None
    assert Image.open(out / "bench.png").size[0] > 500
    assert main([*arguments, "--decoders", "jacobi"]) == 0
    shown = capsys.readouterr().out
    assert "jacobi" in shown and "ancestral was added" in shown and "disturbed: " in shown


@pytest.mark.slow
def test_a_narrow_terminal_cuts_no_figures(system, prompts):
    told = bench(system, ["prompt-lookup"], prompts, new_tokens=8, runs=1, memory=False)
    own = told["decoders"]
    own["hydra:models/of-mine/heads/with-a-long-name/hydra+nodes=24"] = own.pop("prompt-lookup")
    said = StringIO()
    Console(width=80, file=said).print(figures_table(told), groups_table(told))
    assert "…" not in said.getvalue()
    figures = own.popitem()[1]
    for key, form in (("tokens_per_second", ".1f"), ("ratio", ".2f"), ("forwards", ",")):
        assert f" {figures[key]:{form}} " in said.getvalue()


def test_memory_is_that_of_a_fresh_process(run, prompts):
    told = bench(run, ["ancestral"], prompts, new_tokens=8, runs=1)
    assert 50e6 < told["decoders"]["ancestral"]["peak_memory"] < 5e9


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--decoders", "promt-lookup"], "did you mean prompt-lookup?"),
        (["--decoders", ","], "at least one decoder"),
        (["--prompts", "nowhere.txt"], "there is no file of prompts nowhere.txt"),
        (["--new-tokens", "64"], "64 new tokens are asked for, and this model takes 64"),
        (["--prompts", "PROMPTS", "--new-tokens", "40"], "too long, the first is number 2 with 26 tokens"),
        (["--draws", "100"], "at temperature 0 nothing is drawn"),
        (["--temperature", "-1"], "the temperature is 0"),
        (["--out", "PROMPTS"], "is a file; name a folder"),
    ],
)
def test_mistakes_are_answered_with_what_to_do(run, prompts, arguments, said, capsys):
    arguments = [str(prompts) if a == "PROMPTS" else a for a in arguments]
    assert main(["bench", str(run), *arguments]) == 2
    assert said in capsys.readouterr().err


def test_a_model_of_another_kind_is_refused(capsys):
    assert main(["bench", "zoo:image-vq"]) == 2
    assert "no next-token language model" in capsys.readouterr().err


def test_weights_of_a_model_in_memory_are_its_own(system, prompts):
    with pytest.raises(ValueError, match="loaded here"):
        bench(system, ["ancestral"], prompts, weights="int8")
