"""Llama: the same logits and the same text as Hugging Face's, number for number, at tiny random weights.

Weights are scaled so that attention and logits are far from uniform (asserted below): at the usual initialisation a
wrong rotary base, epsilon or head grouping would pass. Each trap of the family has a mutant that must fail the check.
"""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from seriatim.backbones import transformer as ours
from seriatim.backbones.rope import RoPE
from seriatim.backbones.transformer import Transformer, TransformerConfig
from seriatim.canvas import Set
from seriatim.decoding.filters import Warper
from seriatim.decoding.loop import Step, decode, generate
from seriatim.decoding.sample import SampleAll
from seriatim.decoding.target import Target
from seriatim.embed import TokenEmbed
from seriatim.factorization.line import Line
from seriatim.heads.categorical import CategoricalHead
from seriatim.layout import line
from seriatim.model import Model

transformers = pytest.importorskip("transformers")

VOCAB, WIDTH, HIDDEN, DEPTH, HEADS, GROUPS, DIM = 97, 32, 48, 3, 4, 2, 8
THETA, EPS, PROMPT, TEXT = 300.0, 0.02, 44, 72


@pytest.fixture(scope="module", params=[True, False], ids=["tied", "untied"])
def llama(request):
    """A Hugging Face Llama in float32 with weights that matter, prompts, and its logits on them."""
    config = transformers.LlamaConfig(
        vocab_size=VOCAB,
        hidden_size=WIDTH,
        intermediate_size=HIDDEN,
        num_hidden_layers=DEPTH,
        num_attention_heads=HEADS,
        num_key_value_heads=GROUPS,
        head_dim=DIM,
        rms_norm_eps=EPS,
        max_position_embeddings=256,
        rope_parameters={"rope_type": "default", "rope_theta": THETA},
        tie_word_embeddings=request.param,
        bos_token_id=None,
        eos_token_id=None,
        pad_token_id=None,
    )
    model = transformers.LlamaForCausalLM(config).eval()
    g = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for name, p in model.named_parameters():
            noise = torch.randn(p.shape, generator=g)
            if "norm" in name:
                p.copy_(1 + 0.4 * noise)
            elif "embed" in name or "lm_head" in name:
                p.copy_(0.45 * noise)
            else:
                p.copy_(noise * (2.0 if "q_proj" in name or "k_proj" in name else 1.0) / p.shape[1] ** 0.5)
    return model


@pytest.fixture(scope="module")
def ids():
    return torch.randint(VOCAB, (2, TEXT), generator=torch.Generator().manual_seed(4))


def permuted(weight: Tensor, heads: int) -> Tensor:
    """Rows of each head as the interleaved convention orders them: pairs side by side."""
    return weight.view(heads, 2, DIM // 2, WIDTH).transpose(1, 2).reshape(heads * DIM, WIDTH)


def regrouped(weight: Tensor) -> Tensor:
    """Query heads as if head h shared the keys of group h modulo the groups."""
    return weight.view(HEADS // GROUPS, GROUPS, DIM, WIDTH).transpose(0, 1).reshape(HEADS * DIM, WIDTH)


def mapped(llama, trap: str | None = None) -> Model:
    """Our model with the same weights; `trap` makes one well-known mistake."""
    state = llama.state_dict()
    theta = 10_000.0 if trap == "theta" else THETA
    eps = 1e-5 if trap == "eps" else EPS
    config = TransformerConfig(WIDTH, DEPTH, HEADS, GROUPS, hidden=HIDDEN, rope=RoPE(theta), eps=eps)
    embed, backbone = TokenEmbed(VOCAB, WIDTH), Transformer(config)
    tied = llama.config.tie_word_embeddings != (trap == "tie")
    head = CategoricalHead(WIDTH, VOCAB, tied=embed.table if tied else None)
    with torch.no_grad():
        embed.table.copy_(state["model.embed_tokens.weight"])
        if not tied and not llama.config.tie_word_embeddings:
            head.weight.copy_(state["lm_head.weight"])
        for i, layer in enumerate(backbone.layers):
            name = f"model.layers.{i}."
            q, k, v = (state[f"{name}self_attn.{x}_proj.weight"] for x in "qkv")
            if trap == "convention":
                q, k = permuted(q, HEADS), permuted(k, GROUPS)
            if trap == "groups":
                q = regrouped(q)
            layer.qkv.copy_(torch.cat([q, k, v]))
            layer.out.copy_(state[name + "self_attn.o_proj.weight"])
            gate, up = state[name + "mlp.gate_proj.weight"], state[name + "mlp.up_proj.weight"]
            layer.up.copy_(torch.cat([up, gate] if trap == "gate" else [gate, up]))
            layer.down.copy_(state[name + "mlp.down_proj.weight"])
            if trap != "norms":
                layer.norm1.copy_(state[name + "input_layernorm.weight"])
                layer.norm2.copy_(state[name + "post_attention_layernorm.weight"])
        if trap != "last norm":
            backbone.norm.copy_(state["model.norm.weight"])
    return Model(line(TEXT), Line(), embed, backbone, head).eval()


@torch.no_grad()
def packed_logits(model: Model, ids: Tensor) -> Tensor:
    """Logits behind every element but the last, in one pass."""
    canvas = model.canvas({"token": ids}, 1)
    plan = model.factorization.packed(canvas)
    return model.heads["token"].logits(model.hidden(plan, canvas))


class Dictated:
    """Decides what it is told and keeps the logits that it met."""

    def __init__(self, ids: Tensor):
        self.ids, self.met = ids, []

    def decide(self, canvas, guess, rows, random) -> Step:
        self.met.append(rows.dist.logits)
        return Step((Set(self.ids[:, rows.element : rows.element + 1]),))


def cached_logits(model: Model, ids: Tensor) -> Tensor:
    """Logits behind the prompt and behind each later element, one step each over the cache."""
    start = torch.cat([ids[:, :PROMPT], torch.zeros_like(ids[:, PROMPT:])], 1)
    decider = Dictated(ids)
    generate(Target(model), model.canvas({"token": start}, PROMPT), decider)
    return torch.cat(decider.met, 1)


@torch.no_grad()
def worst(llama, model: Model, ids: Tensor) -> float:
    """The largest difference of logits, packed and cached, as a share of what is tolerated."""
    want = llama(ids[:, :-1]).logits
    gaps = [packed_logits(model, ids) - want, cached_logits(model, ids) - want[:, PROMPT - 1 :]]
    return max(float(gap.abs().max()) for gap in gaps) / (1e-4 * float(want.abs().max()))


def test_the_reference_is_far_from_uniform(llama, ids, monkeypatch):
    """Logits have a standard deviation of 2 to 5 and attention scores reach 5, or the rest would prove little."""
    scores = []

    def listening(c, q, k, v, mask, training):
        scores.append(float((q @ k.repeat_interleave(HEADS // GROUPS, 1).mT / DIM**0.5).abs().max()))
        return original(c, q, k, v, mask, training)

    original = ours.attend
    monkeypatch.setattr(ours, "attend", listening)
    logits = packed_logits(mapped(llama), ids)
    assert 2 <= float(logits.std()) <= 5
    assert len(scores) == DEPTH and min(scores) >= 5


def test_logits_packed_and_cached_equal_hugging_face(llama, ids):
    assert worst(llama, mapped(llama), ids) <= 1


@pytest.mark.parametrize("trap", ["theta", "convention", "eps", "groups", "gate", "norms", "last norm", "tie"])
def test_each_trap_of_the_family_fails_the_same_check(llama, ids, trap):
    assert worst(llama, mapped(llama, trap), ids) > 10


def test_greedy_text_equals_hugging_face(llama, ids):
    """28 tokens each behind prompts of 44, generated through the loop with its cache."""
    prompt = ids[:, :PROMPT]
    with torch.no_grad():
        want = llama.generate(prompt, max_new_tokens=TEXT - PROMPT, do_sample=False)
    model = mapped(llama)
    start = torch.cat([prompt, torch.zeros_like(ids[:, PROMPT:])], 1)
    canvas = generate(Target(model, warp=Warper(temperature=0)), model.canvas({"token": start}, PROMPT), SampleAll())
    assert torch.equal(canvas.value["token"], want)
    assert all(len(row.unique()) > 0.3 * len(row) for row in want[:, PROMPT:])  # no loop, which hides differences


def test_a_stream_gives_the_same_text_step_by_step(llama, ids):
    """One token a step, whether or not the caller holds inference mode."""
    model = mapped(llama)
    texts = []
    for hold in (True, False):
        canvas = model.canvas({"token": ids}, PROMPT)
        with torch.inference_mode(hold):
            stream = decode(Target(model, warp=Warper(temperature=0)), canvas, SampleAll())
            lengths = [canvas.length for _ in stream]
        assert lengths == list(range(PROMPT + 1, TEXT + 1))
        texts.append(canvas.value["token"])
    assert torch.equal(*texts)
