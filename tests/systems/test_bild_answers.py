"""The big little decoder on tiny pairs of T5: the text of plain loops over the models of `transformers`, the ends of
its settings, caches beside an encoder's states, and what is refused."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from seriatim.cli.main import main
from seriatim.decoding.draft import DraftModel
from seriatim.decoding.loop import decode
from seriatim.decoding.verify import GreedyMatch
from seriatim.layout import line
from seriatim.random import Generator
from seriatim.systems.decoder.bild import Options, between
from seriatim.systems.decoders import Ask
from seriatim.systems.encoder_decoder import EncoderDecoder
from seriatim.systems.published import load_published
from seriatim.verbs.generate import stream
from support.bild import GREEDY, Says, as_corrected, as_released, near, remembering, run
from tokenizers import Tokenizer, models, pre_tokenizers, processors

transformers = pytest.importorskip("transformers")
torch.set_num_threads(1)
VOCAB, PROMPT, SURE = 61, [5, 9, 33, 17, 2, 40, 1], 0.4
PROMPTS = [[5, 9, 33, 1], [17, 2, 40, 8, 8, 1]]
PADDED = torch.tensor([[5, 9, 33, 1, -1, -1], PROMPTS[1]])
SETTINGS = [(0.0, 4.0), (SURE, 0.5), (SURE, 2.0)]


def telling(kind: str = "T5", tied: bool = False, **changes: Any) -> Any:
    """A T5 of `transformers` whose weights say something."""
    config = getattr(transformers, f"{kind}Config")(**{
        "vocab_size": VOCAB, "d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 2, "num_heads": 4,
        "relative_attention_num_buckets": 8, "relative_attention_max_distance": 20, "decoder_start_token_id": 0,
        "tie_word_embeddings": False, "feed_forward_proj": "gated-gelu",
    } | changes)  # fmt: skip
    torch.manual_seed(3)
    model = getattr(transformers, f"{kind}ForConditionalGeneration")(config).eval()
    if not tied:
        model.lm_head.weight = torch.nn.Parameter(torch.empty(config.vocab_size, 32))
    stds = {"shared": 2.0, "relative": 2.0, "lm_head": 0.6}
    with torch.no_grad():
        for name, p in model.named_parameters():
            std = next((std for part, std in stds.items() if part in name), 0.35)
            p.copy_(1 + 0.3 * torch.randn_like(p) if p.dim() == 1 else std * torch.randn_like(p))
    return model


def speaking(folder: Path, size: int = VOCAB) -> None:
    """A tokenizer of words that ends every text with </s>, beside a model."""
    words = {"<pad>": 0, "</s>": 1, "<unk>": 2} | {f"w{i}": i for i in range(3, size)}
    inner = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    inner.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    inner.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    inner.add_special_tokens(["<pad>", "</s>"])
    inner.save(str(folder / "tokenizer.json"))


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> dict[str, Path]:
    """Models that can draft for each other, and some that cannot."""
    large = telling()
    made = {
        "large": large, "small": near(large, 0.03), "other start": telling(decoder_start_token_id=5),
        "other ids": telling(vocab_size=50),
    }  # fmt: skip
    out = {}
    for name, model in made.items():
        out[name] = tmp_path_factory.mktemp("model")
        model.save_pretrained(out[name])
        speaking(out[name], model.config.vocab_size)
    return out


@pytest.fixture(scope="module")
def theirs(folders) -> tuple[Says, Says]:
    """What `transformers` says of an answer to the prompt."""

    def answers(folder: Path) -> Says:
        model, prompt = transformers.T5ForConditionalGeneration.from_pretrained(folder).eval(), torch.tensor([PROMPT])
        states = model.encoder(prompt)
        return remembering(lambda ids: model(encoder_outputs=states, decoder_input_ids=torch.tensor([ids])).logits[0])

    with torch.no_grad():
        return answers(folders["large"]), answers(folders["small"])


@pytest.fixture(scope="module")
def pair(folders) -> tuple[EncoderDecoder, EncoderDecoder]:
    """Ours from the same folders, in float64, with the prompt to answer."""
    large, small = (load_published(folders[name], torch.float64) for name in ("large", "small"))
    return large.answering(torch.tensor([PROMPT])), small.answering(torch.tensor([PROMPT]))


def greedy(model: EncoderDecoder, said: list[int], new: int) -> list[int]:
    """What a model writes behind the start and these ids, with nothing remembered."""
    ids = [model.start, *said]
    for _ in range(new):
        ids.append(int(model.logits(torch.tensor([ids]), encoder_ids=torch.tensor([PROMPT]))[0, -1].argmax()))
    return ids[1 + len(said) :]


# ---- beside plain loops ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("confidence, most", SETTINGS)
@torch.no_grad()
def test_answers_are_those_of_the_rule_as_a_plain_loop(theirs, pair, confidence, most):
    want, told = as_corrected(*theirs, [0], 60, confidence, most)
    (text,), _, _, _ = run(pair, Options(fallback=confidence, rollback=most), 59, [[0]])
    assert text == want[1:]
    assert told["back"] and (told["stood"] or most < 1) and len(set(want)) > 8, told


@pytest.mark.parametrize("confidence, most", SETTINGS)
@torch.no_grad()
def test_answers_are_those_of_the_released_loop(theirs, pair, confidence, most):
    want, told = as_released(*theirs, [0], 60, confidence, most)
    (text,), _, _, _ = run(pair, Options(fallback=confidence, rollback=most, released=True), 59, [[0]])
    assert text[:45] == want[1:46]  # near the end ours leaves room for a token of the large model
    assert told["back"] and len(set(want)) > 8


@torch.no_grad()
def test_as_released_the_small_model_ends_an_answer_unread_and_by_the_rule_it_does_not(theirs, pair):
    ended, differ = 0, 0
    for end in dict.fromkeys(greedy(pair[1], [], 12)):
        want, told = as_released(*theirs, [0], 60, 0.0, 1.0, stop=(end,))
        if not told["ended"]:
            continue
        options = Options(fallback=0.0, rollback=1.0)
        (text,), _, _, _ = run(pair, Options(fallback=0.0, rollback=1.0, released=True), 59, [[0]], stop=(end,))
        assert text == want[1:]
        (text,), _, _, _ = run(pair, options, 59, [[0]], stop=(end,))
        said = as_corrected(*theirs, [0], 60, 0.0, 1.0)[0][1:]
        assert text == said[: said.index(end) + 1] if end in said else text == said
        ended, differ = ended + 1, differ + (text != want[1:])
    assert ended >= 2 and differ


# ---- the ends of the settings ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("confidence", [0.0, SURE])
def test_where_no_loss_is_tolerated_answers_are_the_large_models(pair, confidence):
    large, small = (model.answering(PADDED) for model in pair)
    options = Options(fallback=confidence, rollback=0.0)
    texts, steps, _, _ = run((large, small), options, 40, [[0], [0]])
    want = large.generate(PROMPTS, max_new_tokens=40, temperature=0.0, stop=())
    assert texts == [g.ids for g in want]
    assert sum(int(s.accepted.sum()) for s in steps) > 0


def test_a_small_model_that_is_always_sure_and_never_wrong_is_interrupted_every_ten_tokens(pair):
    large, small = pair
    (text,), steps, _, _ = run(pair, Options(fallback=0.0, rollback=math.inf), 33, [[0]])
    assert [(s.drafted, s.accepted) for s in steps] == [(10, 10)] * 3
    for start in range(0, 33, 11):
        assert text[start : start + 10] == greedy(small, text[:start], 10)
        assert text[start + 10 : start + 11] == greedy(large, text[: start + 10], 1)
    assert text != greedy(large, [], 33)


def test_a_small_model_that_is_never_sure_writes_nothing(pair):
    (text,), steps, _, _ = run(pair, Options(fallback=1.01, rollback=math.inf), 20, [[0]])
    assert text == greedy(pair[0], [], 20)
    assert [(s.drafted, s.accepted, s.forwards) for s in steps] == [(0, 0, 1)] * 20


def test_always_sure_and_nothing_tolerated_is_greedy_verification_of_a_chain(pair):
    large, small = pair
    (text,), steps, _, _ = run(pair, Options(fallback=0.0, rollback=0.0), 40, [[0]])
    canvas, chain = large._begun([[0]], 40), DraftModel(small.target(None, GREEDY), 10, "top")
    with torch.inference_mode():
        want = list(decode(large.target(None, GREEDY), canvas, GreedyMatch(), chain))
    assert text == canvas.value["token"][0, 1:].tolist()
    assert [(s.slots, s.drafted, s.accepted) for s in steps] == [(s.slots, s.drafted, s.accepted) for s in want]


# ---- encoders, caches, company ---------------------------------------------------------------------------------------


def test_both_encoders_read_the_prompt_once(pair, monkeypatch):
    reads = [0, 0]
    for i, model in enumerate(pair):
        encoder = model.model.conditions["text"]

        def counted(*raw: Any, i: int = i, forward: Callable = encoder.forward) -> Any:
            reads[i] += 1
            return forward(*raw)

        monkeypatch.setattr(encoder, "forward", counted)
    _, steps, _, _ = run(pair, Options(fallback=SURE, rollback=2.0), 59, [[0]])
    assert reads == [1, 1] and len(steps) > 10


def test_caches_after_going_back_are_those_of_a_fresh_reading(pair):
    """Of both models, in the middle of an answer, after a draft of which a part was taken back."""
    large, small = pair
    way = between(Ask(large, GREEDY, (), None, Options(fallback=SURE, rollback=2.0)), small)
    target, canvas, seen = large.target(None, GREEDY), large._begun([[0]], 59), 0
    for step in decode(target, canvas, way.decider, way.proposer):
        if 0 < step.accepted < step.drafted and not seen:
            seen = canvas.length
            for ours, model in ((target, large), (way.proposer.draft, small)):
                held = ours.cache.columns
                fresh = model.model.new_cache(1)
                again = model.model.canvas({"token": canvas.value["token"][:, :seen]}, seen, layout=line(seen))
                plan = model.model.factorization.fill(again, 0, held)
                model.model.hidden(plan, again, fresh, model.model.encode({"text": torch.tensor([PROMPT])}))
                assert held > 1
                assert torch.allclose(ours.cache.buffer[..., :held, :], fresh.buffer[..., :held, :], atol=1e-12)
    assert seen


@pytest.mark.parametrize("released", [False, True])
def test_answers_of_a_batch_are_as_they_are_alone(pair, released):
    options = Options(fallback=SURE, rollback=2.0, released=released)
    together = run(tuple(m.answering(PADDED) for m in pair), options, 40, [[0], [0]])[0]
    for prompt, text in zip(PROMPTS, together, strict=True):
        alone = run(tuple(m.answering(torch.tensor([prompt])) for m in pair), options, 40, [[0]])[0]
        assert text == alone[0]


# ---- as a user does it -----------------------------------------------------------------------------------------------


def test_the_command_line_answers_with_a_small_model_beside_a_large_one(folders, theirs, capsys):
    asked = ["generate", str(folders["large"]), "--ids", ",".join(map(str, PROMPT)), "--temperature", "0", "--length"]
    asked += ["59", "--json", "--decoder", f"bild:{folders['small']}+fallback={SURE}+rollback=2.0"]
    assert main(asked) == 0
    made = json.loads(capsys.readouterr().out)
    with torch.no_grad():
        want, _ = as_corrected(*theirs, [0], 60, SURE, 2.0)
    end = want.index(1) if 1 in want else 60
    assert made["ids"] == want[1 : end + 1] and made["forwards"] < len(made["ids"])
    prompt = " ".join(f"w{i}" for i in PROMPT[:-1]).replace("w2 ", "what ")  # unknown words are read as 2
    assert main([*asked[:2], "--prompt", prompt, *asked[4:]]) == 0
    assert json.loads(capsys.readouterr().out)["text"] == made["text"]


@pytest.mark.parametrize("tied", [False, True])
@torch.no_grad()
def test_a_pair_of_mt5_answers_as_the_plain_loop_does(tied, tmp_path):
    """The published pairs for translation; their outputs are never scaled, one table or two."""
    large = telling("MT5", tied, d_kv=12)
    with torch.no_grad():
        large.shared.weight.mul_(0.3 if tied else 1.0)
    voices, ours, prompt = [], [], torch.tensor([PROMPT])
    for n, model in enumerate((large, near(large, 0.03))):
        model.save_pretrained(tmp_path / str(n))
        ours.append(load_published(tmp_path / str(n), torch.float64).answering(prompt))
        said = remembering(lambda ids, m=model: m(input_ids=prompt, decoder_input_ids=torch.tensor([ids])).logits[0])
        ids = [0, 7, 30, 4, 19]
        assert torch.allclose(
            ours[n].logits(torch.tensor([ids]))[0].float(), said(ids), atol=1e-4 * said(ids).abs().max()
        )
        voices.append(said)
    want, told = as_corrected(*voices, [0], 40, SURE, 1.0)
    (text,), _, _, _ = run((ours[0], ours[1]), Options(fallback=SURE, rollback=1.0), 39, [[0]])
    assert text == want[1:]
    assert tied or (told["back"] and len(set(want)) > 5)  # tied, tiny models repeat themselves


def test_pieces_of_an_answer_come_from_a_small_model_beside_a_large_one_too(folders):
    system = load_published(folders["large"], torch.float32)
    decoder = f"bild:{folders['small']}+rollback=2.0"
    want = system.generate(PROMPT, decoder, max_new_tokens=30, temperature=0.0)
    assert "".join(stream(system, PROMPT, 30, decoder, temperature=0.0)) == want.text


def test_drafts_that_do_not_fit_are_refused_with_a_reason(folders, tmp_path, capsys):
    config = transformers.LlamaConfig(
        vocab_size=VOCAB, hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2
    )
    transformers.LlamaForCausalLM(config).save_pretrained(tmp_path)
    speaking(tmp_path)
    for large, small, reason in (
        ("large", tmp_path, "continues a text, and this model (t5) answers one that an encoder reads"),
        (tmp_path, "large", "(t5) answers one that an encoder reads, and this model (llama) continues a text"),
        ("large", folders["other start"], "begin at id 5 and those of this model (t5) at 0"),
        ("large", folders["other ids"], "has 50 ids and t5 61: a draft model has those of its target"),
    ):
        asked = ["generate", str(folders.get(large, large)), "--prompt", "w5 w9", "--length", "5"]
        assert main([*asked, "--decoder", f"bild:{folders.get(small, small)}"]) == 2
        assert reason in capsys.readouterr().err


def test_training_further_is_refused_and_says_why(pair):
    with pytest.raises(ValueError, match="cannot be trained on"):
        pair[1].losses({"token": torch.tensor([[0, 3, 4]])}, Generator(0), 0.0)
