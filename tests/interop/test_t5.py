"""T5 beside `transformers`, on tiny random weights: logits with padded prompts and answers, greedy text, decoders,
export, both dialects. Each trap, switched off, must fail the same check."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from seriatim.cli.main import main
from seriatim.decoding.beam import Beam
from seriatim.decoding.loop import generate
from seriatim.decoding.sample import SampleAll
from seriatim.decoding.target import Target
from seriatim.random import Generator
from seriatim.systems.decoders import Decoding
from seriatim.systems.encoder_decoder import EncoderDecoder
from seriatim.systems.published import load_published
from seriatim.systems.system import Sampling
from seriatim.verbs.export import export
from tokenizers import Tokenizer, models, pre_tokenizers, processors

transformers = pytest.importorskip("transformers")

VOCAB, TEXT, ANSWER, NEW = 97, 40, 24, 64
BASE = {
    "vocab_size": VOCAB, "d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 3, "num_heads": 4,
    "relative_attention_num_buckets": 8, "relative_attention_max_distance": 20, "decoder_start_token_id": 0,
}  # fmt: skip
CONFIGS: list[dict[str, Any]] = [
    {},
    {"feed_forward_proj": "gated-gelu", "tie_word_embeddings": False, "num_decoder_layers": 2},
    {"feed_forward_proj": "gated-silu", "d_kv": 12, "num_heads": 3, "relative_attention_max_distance": 9},
    {"layer_norm_epsilon": 0.05, "relative_attention_num_buckets": 32, "relative_attention_max_distance": 128,
     "num_layers": 2, "num_decoder_layers": 3, "decoder_start_token_id": 5},
]  # fmt: skip
NAMED = range(len(CONFIGS))
_made: dict[int, tuple[Any, EncoderDecoder, Path]] = {}


@pytest.fixture(scope="module")
def pair(tmp_path_factory) -> Callable[[int], tuple[Any, EncoderDecoder, Path]]:
    """A model of `transformers` with telling weights, ours from the folder that it wrote, and the folder."""

    def made(n: int) -> tuple[Any, EncoderDecoder, Path]:
        if n not in _made:
            theirs = transformers.T5ForConditionalGeneration(transformers.T5Config(**BASE | CONFIGS[n])).eval()
            if n == 1:  # T5 1.1 has a table of outputs of its own, which these configs make no more
                theirs.lm_head.weight = torch.nn.Parameter(torch.empty(VOCAB, 32))
            telling(theirs)
            folder = tmp_path_factory.mktemp("model")
            theirs.save_pretrained(folder)
            ours = load_published(folder, torch.float32)
            assert isinstance(ours, EncoderDecoder)
            _made[n] = theirs, ours, folder
        return _made[n]

    return made


@torch.no_grad()
def telling(model: Any) -> None:
    """Logits with a standard deviation of 2 to 5, scores that reach 5, no norm at 1."""
    generator, scaled = torch.Generator().manual_seed(1), model.config.scale_decoder_outputs
    for name, p in model.named_parameters():
        noise = torch.randn(p.shape, generator=generator)
        if p.dim() == 1:
            p.copy_(1 + 0.3 * noise)
        elif "relative" in name:
            p.copy_(2 * noise)
        elif "shared" in name or "lm_head" in name:
            p.copy_(noise * (3.0 if scaled else 0.6))
        else:
            sharp = any(part in name for part in (".q.", ".k."))
            p.copy_(noise * (0.7 if sharp else 1.0) / p.shape[-1] ** 0.5)


def texts() -> dict[str, torch.Tensor]:
    """Prompts of different lengths padded on the right, answers padded on the left."""
    generator = torch.Generator().manual_seed(2)
    prompts = torch.randint(3, VOCAB, (3, TEXT), generator=generator)
    answers = torch.randint(3, VOCAB, (3, ANSWER), generator=generator)
    seen, mask = torch.ones_like(prompts), torch.ones_like(answers)
    seen[0, 25:] = seen[2, 1:] = 0
    mask[1, :7] = 0
    return {"ids": answers, "attention_mask": mask, "encoder_ids": prompts, "encoder_mask": seen}


def prompts() -> list[list[int]]:
    t = texts()
    return [row[seen.bool()].tolist() for row, seen in zip(t["encoder_ids"], t["encoder_mask"], strict=True)]


@torch.no_grad()
def worst(theirs: Any, ours: EncoderDecoder) -> float:
    """The largest difference of logits where no padding stands, as a share of what is tolerated; `transformers` gets
    prompts and answers one by one."""
    t, gaps = texts(), []
    got = ours.logits(**t)
    for i, row in enumerate(prompts()):
        live = t["attention_mask"][i].bool()
        want = theirs(input_ids=torch.tensor([row]), decoder_input_ids=t["ids"][i, live][None]).logits[0]
        gaps.append(float((got[i, live] - want).abs().max() / (1e-4 * want.abs().max())))
    return max(gaps)


@pytest.mark.parametrize("n", NAMED)
def test_logits_of_padded_batches_equal_transformers(pair, n):
    theirs, ours, _ = pair(n)
    assert 1.5 <= float(ours.logits(**texts())[:, -8:].std()) <= 6
    assert worst(theirs, ours) <= 1


@pytest.mark.parametrize("n", NAMED)
@pytest.mark.parametrize("side", ["left", "right"])
@torch.no_grad()
def test_prompts_padded_by_transformers_equal_ours(pair, n, side):
    """Distances are relative, so that padding on the left moves nothing."""
    theirs, ours, _ = pair(n)
    t = texts()
    ids, seen = t["encoder_ids"], t["encoder_mask"]
    if side == "left":
        ids, seen = ids.flip(1), seen.flip(1)
    want = theirs(input_ids=ids, attention_mask=seen, decoder_input_ids=t["ids"]).logits
    got = ours.logits(t["ids"], encoder_ids=ids, encoder_mask=seen)
    assert float((got - want).abs().max()) <= 1e-4 * float(want.abs().max())


@pytest.mark.parametrize("n", NAMED)
def test_greedy_answers_of_a_ragged_batch_equal_transformers(pair, n):
    """64 tokens for each of three prompts: in one batch, alone, and with drafts."""
    theirs, ours, _ = pair(n)
    t = texts()
    cached = theirs.config.num_decoder_layers <= theirs.config.num_layers  # their cache is made for no more
    want = theirs.generate(
        t["encoder_ids"], attention_mask=t["encoder_mask"], max_new_tokens=NEW, do_sample=False, eos_token_id=None,
        pad_token_id=0, use_cache=cached,
    )[:, 1:].tolist()  # fmt: skip
    settings = {"max_new_tokens": NEW, "temperature": 0.0, "stop": ()}
    assert [g.ids for g in ours.generate(prompts(), **settings)] == want
    assert ours.generate(prompts()[0], **settings).ids == want[0]
    for decoder in ("prompt-lookup", "jacobi"):
        assert [g.ids for g in ours.generate(prompts(), decoder, **settings)] == want


@pytest.mark.parametrize("n", NAMED)
def test_log_probabilities_are_those_of_transformers(pair, n):
    theirs, ours, _ = pair(n)
    t = texts()
    with torch.no_grad():
        out = theirs(input_ids=t["encoder_ids"], attention_mask=t["encoder_mask"], decoder_input_ids=t["ids"]).logits
    said = torch.log_softmax(out[:, :-1].double(), -1).gather(2, t["ids"][:, 1:, None])[..., 0]
    got = ours.log_prob(t["ids"], t["encoder_ids"], t["encoder_mask"])
    assert torch.allclose(got.double(), said.sum(1), rtol=1e-4)
    made = ours.generate(prompts(), max_new_tokens=9, temperature=0.0, stop=(), logprobs=True)
    for row, g in zip(prompts(), made, strict=True):
        scored = ours.log_prob(torch.tensor([[ours.start, *g.ids]]), torch.tensor([row]))
        assert sum(g.logprobs) == pytest.approx(float(scored), rel=1e-4)


@pytest.mark.parametrize("n", NAMED)
def test_what_is_exported_is_what_was_read(pair, tmp_path, n):
    theirs, ours, folder = pair(n)
    out, t = export(ours, tmp_path / "out"), texts()
    want, got = (load_file(place / "model.safetensors") for place in (folder, out))
    assert got.keys() == want.keys() and all(torch.allclose(got[k], want[k], rtol=1e-6) for k in want)
    again = transformers.T5ForConditionalGeneration.from_pretrained(out).eval()
    with torch.no_grad():
        a, b = (m(input_ids=t["encoder_ids"], decoder_input_ids=t["ids"]).logits for m in (again, theirs))
    assert float((a - b).abs().max()) < 1e-3


# ---- what only an encoder-decoder has --------------------------------------------------------------------------------


def test_a_row_does_not_depend_on_the_company_of_its_prompt(pair):
    _, ours, _ = pair(0)
    t = texts()
    together = ours.logits(**t)
    alone = ours.logits(t["ids"][:1], encoder_ids=t["encoder_ids"][:1, :25])
    assert torch.allclose(together[:1], alone, atol=1e-5)


def test_the_prompt_is_seen_and_its_padding_is_not(pair):
    _, ours, _ = pair(0)
    t = texts()
    said = ours.logits(**t)
    ids = t["encoder_ids"].clone()
    ids[0, 30], ids[1, 30] = 3, 4  # padding of the first row, the prompt of the second
    other = ours.logits(**{**t, "encoder_ids": ids})
    assert torch.equal(other[0], said[0])
    assert float((other[1] - said[1])[7:].abs().amax(-1).min()) > 1e-3


def test_beams_with_a_cache_are_those_without(pair):
    """Rows are copied and reordered, and their prompts with them."""
    _, ours, _ = pair(1)
    raw = {"text": torch.tensor([prompts()[0]])}
    found = []
    for cached in (True, False):
        canvas = ours._begun([[ours.start]], 10)
        found.append(generate(Target(ours.model, raw, cached=cached), canvas, Beam(3)).value["token"])
    assert torch.equal(*found)


def test_samples_do_not_depend_on_the_batch(pair):
    """The same keyed noise: a row's answer is that of its prompt, whatever prompts stand beside it."""
    _, ours, _ = pair(1)
    settings = {"max_new_tokens": 12, "temperature": 0.8, "stop": (), "seed": 3}
    together = ours.generate(prompts(), **settings)
    assert together[0].ids == ours.generate(prompts()[:1], **settings)[0].ids
    assert len({tuple(g.ids) for g in together}) == 3


@pytest.fixture
def speaking(pair, tmp_path) -> EncoderDecoder:
    """A folder with a tokenizer that ends every text with </s>, as T5's do."""
    _, _, folder = pair(0)
    shutil.copytree(folder, tmp_path / "model")
    words = {"<pad>": 0, "</s>": 1, "<unk>": 2} | {f"w{i}": i for i in range(3, VOCAB)}
    inner = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    inner.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    inner.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    inner.add_special_tokens(["<pad>", "</s>"])
    inner.save(str(tmp_path / "model" / "tokenizer.json"))
    ours = load_published(tmp_path / "model", torch.float32)
    assert isinstance(ours, EncoderDecoder)
    return ours


def test_texts_are_answered_streamed_and_stopped(speaking):
    settings = {"max_new_tokens": 9, "temperature": 0.0, "stop": ()}
    want = speaking.generate([5, 9, 77, 1], **settings)
    pieces: list[str] = []
    made = speaking.generate("w5 w9 w77", stream=pieces.append, **settings)
    assert made.ids == want.ids and "".join(pieces) == made.text == want.text
    assert speaking.generate(["w5 w9 w77", "w8"], **settings)[0].ids == want.ids
    greedy = Sampling(temperature=0.0)
    assert "".join(speaking.stream("w5 w9 w77", 9, greedy, decoding=Decoding(SampleAll()))) == made.text
    cut = speaking.generate("w5 w9 w77", **{**settings, "stop": (want.ids[4],)}).ids
    assert cut == want.ids[: want.ids.index(want.ids[4]) + 1]


def test_the_command_line_prints_the_answer_alone(speaking, tmp_path, capsys):
    call = ["generate", str(tmp_path / "model"), "--prompt", "w5 w9 w77", "--temperature", "0", "--max-new-tokens", "6"]
    assert main([*call, "--json"]) == 0
    said = json.loads(capsys.readouterr().out)
    assert main(call) == 0
    assert capsys.readouterr().out.strip() == said["text"].strip()
    assert said["ids"] == speaking.generate("w5 w9 w77", max_new_tokens=6, temperature=0.0).ids


def test_mistakes_are_named(pair):
    _, ours, _ = pair(0)
    t = texts()
    with pytest.raises(ValueError, match="give them as encoder_ids"):
        ours.logits(t["ids"])
    with pytest.raises(ValueError, match="prompt of at least one token"):
        ours.generate([[3, 4], []])
    with pytest.raises(ValueError, match="at least one token, in every row"):
        ours.logits(t["ids"], encoder_ids=t["encoder_ids"], encoder_mask=torch.zeros_like(t["encoder_ids"]))
    with pytest.raises(ValueError, match="an encoder mask of"):
        ours.logits(t["ids"], encoder_ids=t["encoder_ids"], encoder_mask=torch.ones(3, 2))
    with pytest.raises(ValueError, match=r"for 3 rows, got \(2, 40\)"):
        ours.logits(t["ids"], encoder_ids=t["encoder_ids"][:2])
    with pytest.raises(ValueError, match="of another vocabulary"):
        ours.generate([VOCAB])
    with pytest.raises(ValueError, match="cannot be trained on, or scored by, a text alone"):
        ours.losses({"token": t["ids"]}, Generator(0), 0.0)


# ---- dialects --------------------------------------------------------------------------------------------------------


def test_the_older_dialect_says_the_same(pair, tmp_path):
    """T5 1.1 as published: tables that are not tied, and no word of a scale."""
    for n, tied in ((0, None), (1, False)):
        theirs, ours, folder = pair(n)
        config = json.loads((folder / "config.json").read_text())
        for key in (
            "scale_decoder_outputs",
            "tie_word_embeddings",
            "dense_act_fn",
            "is_gated_act",
            "num_decoder_layers",
        ):
            config.pop(key)
        config |= {} if tied is None else {"tie_word_embeddings": tied, "num_decoder_layers": 2}
        config |= {"torch_dtype": config.pop("dtype"), "n_positions": 512, "output_past": True}
        old = tmp_path / str(n)
        old.mkdir()
        tensors = load_file(folder / "model.safetensors")
        copies = {f"{half}.embed_tokens.weight": tensors["shared.weight"].clone() for half in ("encoder", "decoder")}
        save_file(tensors | copies, old / "model.safetensors", {"format": "pt"})
        (old / "config.json").write_text(json.dumps(config))
        assert torch.equal(load_published(old, torch.float32).logits(**texts()), ours.logits(**texts()))


def test_half_precision_is_near(pair):
    theirs, ours, folder = pair(0)
    t, half = texts(), load_published(folder, torch.bfloat16)
    other = transformers.T5ForConditionalGeneration.from_pretrained(folder, dtype=torch.bfloat16).eval()
    want = ours.logits(t["ids"], encoder_ids=t["encoder_ids"])
    with torch.no_grad():
        their = other(input_ids=t["encoder_ids"], decoder_input_ids=t["ids"]).logits
    errors = [
        float((x.float() - want).pow(2).mean()) for x in (half.logits(t["ids"], encoder_ids=t["encoder_ids"]), their)
    ]
    assert errors[0] < 1.2 * errors[1]
    assert len(half.generate(prompts()[0], max_new_tokens=5, temperature=0.0, stop=()).ids) == 5


# ---- traps -----------------------------------------------------------------------------------------------------------

Trap = Callable[[EncoderDecoder], None]


def stacks(ours: EncoderDecoder) -> list[Any]:
    return [ours.model.backbone, ours.model.conditions["text"].backbone]


def changed(*which: int, **changes: Any) -> Trap:
    """Other choices of the decoder (0), the encoder (1), or both; same weights."""

    def change(ours: EncoderDecoder) -> None:
        for i in which or (0, 1):
            stacks(ours)[i].config = replace(stacks(ours)[i].config, **changes)

    return change


def distances(which: int, **changes: Any) -> Trap:
    def change(ours: EncoderDecoder) -> None:
        stack = stacks(ours)[which]
        stack.config = replace(stack.config, relative=replace(stack.config.relative, **changes))

    return change


def without(name: str, which: int, value: float = 0.0) -> Trap:
    """Parameters at the value that would say nothing."""

    def change(ours: EncoderDecoder) -> None:
        for key, p in stacks(ours)[which].named_parameters():
            if key.rpartition(".")[2] == name:
                p.fill_(value)

    return change


def unscaled(ours: EncoderDecoder) -> None:
    ours.model.backbone.norm.mul_(32**0.5)


def scaled(ours: EncoderDecoder) -> None:
    ours.model.backbone.norm.mul_(32**-0.5)


def tied(ours: EncoderDecoder) -> None:
    ours.model.heads["token"].weight = ours.model.embed.table


def padding_seen(ours: EncoderDecoder) -> None:
    text = ours.model.conditions["text"]
    forward = text.forward
    text.forward = lambda raw, drop=None: replace(forward(raw, drop), there=None)


def padding_read(ours: EncoderDecoder) -> None:
    """By the encoder's own layers."""
    text = ours.model.conditions["text"]
    forward = text.forward

    def reads(raw: torch.Tensor, drop: Any = None) -> Any:
        return replace(forward(raw.clamp(min=0), drop), there=raw >= 0)

    text.forward = reads


def crossing(ours: EncoderDecoder) -> None:
    """Keys and values of the memory exchanged."""
    for layer in ours.model.backbone.layers:
        layer.cross_kv.copy_(layer.cross_kv.roll(layer.cross_kv.shape[0] // 2, 0).clone())


def gate_last(ours: EncoderDecoder) -> None:
    for stack in stacks(ours):
        for layer in stack.layers:
            layer.up.copy_(layer.up.roll(layer.up.shape[0] // 2, 0).clone())


TRAPS: list[tuple[int, str, Trap]] = [
    (0, "scores are not scaled", changed(score_scale=None)),
    (0, "scores of the decoder are not scaled", changed(0, score_scale=None)),
    (0, "distances of the encoder", without("relative", 1)),
    (0, "distances of the decoder", without("relative", 0)),
    (0, "sides are told apart", distances(1, both=False)),
    (0, "sides are not told apart", distances(0, both=True)),
    (0, "farthest distance", distances(0, distance=200)),
    (0, "farthest distance of the encoder", distances(1, distance=200)),
    (2, "near farthest distance", distances(0, distance=20)),
    (0, "scaled outputs", unscaled),
    (1, "outputs not scaled", scaled),
    (1, "tables not tied", tied),
    (0, "padding of prompts is not attended to", padding_seen),
    (0, "padding of prompts is not read", padding_read),
    (0, "keys before values", crossing),
    (0, "relu", changed(activation="gelu")),
    (1, "gelu by tanh", changed(activation="swiglu")),
    (1, "gate first", gate_last),
    (2, "gate's activation", changed(activation="geglu_tanh")),
    (3, "eps", changed(eps=1e-6)),
    (0, "norm before the memory", without("norm3", 0, 1.0)),
    (0, "last norm of the encoder", without("norm", 1, 1.0)),
]


@pytest.mark.parametrize(("n", "name", "trap"), TRAPS, ids=[f"{t[0]}-{t[1]}" for t in TRAPS])
def test_each_trap_fails_the_same_check(pair, n, name, trap):
    theirs, _, folder = pair(n)
    ours = load_published(folder, torch.float32)
    with torch.no_grad():
        trap(ours)
    assert worst(theirs, ours) > 10
