"""Heads that look ahead: at first they are the base's own, Hydra without its tokens is Medusa, and published heads say
what the released modules say."""

from __future__ import annotations

import json
import pickle
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from seriatim.backbones.rope import RoPE
from seriatim.backbones.transformer import Transformer, TransformerConfig
from seriatim.embed import TokenEmbed
from seriatim.factorization.line import Line
from seriatim.heads.categorical import CategoricalHead
from seriatim.interop.draft_heads import load_published_heads, published_heads
from seriatim.laws.case import randomise
from seriatim.layout import line
from seriatim.model import Model
from seriatim.posttraining.drafting import Base, DraftLearner
from seriatim.posttraining.heads import Hydra, HydraConfig, Medusa, MedusaConfig, chances
from seriatim.random import Generator
from seriatim.systems.meta import load

torch.set_num_threads(1)
VOCAB, WIDTH, HEADS = 24, 32, 3


def base_of(backbone: nn.Module, width: int = WIDTH, vocab: int = VOCAB, std: float = 0.3) -> Base:
    model = Model(line(64), Line(prefix=1), TokenEmbed(vocab, width), backbone, CategoricalHead(width, vocab))
    randomise(model, 3, std).requires_grad_(False)
    return Base(SimpleNamespace(model=model, meta=SimpleNamespace(key="tiny")))


@pytest.fixture(scope="module")
def base() -> Base:
    return base_of(Transformer(TransformerConfig(WIDTH, 2, 4, kv_heads=2, hidden=40, rope=RoPE())))


def inputs(base: Base, rows: int = 2, n: int = 10) -> tuple[torch.Tensor, torch.Tensor]:
    g = torch.Generator().manual_seed(4)
    return torch.randint(VOCAB, (rows, n), generator=g), torch.randn(rows, n, WIDTH, generator=g, dtype=torch.float64)


def drawn(part: nn.Module, seed: int = 1) -> nn.Module:
    return randomise(part, seed, std=0.2)  # type: ignore[arg-type]


# ---- what they are ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("own", [False, True])
@pytest.mark.parametrize("vocab", [None, 8])
def test_at_first_every_head_says_what_the_base_says(base, own, vocab):
    ids, h = inputs(base)
    want = base.logits(h)[:, :, None].expand(-1, -1, HEADS, -1)
    for kind in (Medusa, Hydra):
        part = kind(kind.Config(heads=HEADS, layers=2, own_output=own, draft_vocab=vocab), base).double()
        if vocab:
            part.output.draft_only(base, torch.arange(5, 13))
        said = part.output(part.reads(base, h, ids))
        assert torch.allclose(said, want if vocab is None else want[..., 5:13], atol=1e-6 if own else 1e-12)
        assert float(want.abs().max()) > 1


def test_at_first_the_prefix_layer_hands_on_which_way_a_state_points(base):
    ids, h = inputs(base)
    part = Hydra(HydraConfig(heads=1, prefix=True), base).double()
    read = part.reads(base, h, ids)[:, :, 0]
    assert torch.allclose(nn.functional.cosine_similarity(read, h, dim=-1), torch.ones(2, 10).double(), atol=1e-4)
    of_base = base.model.backbone.norm
    assert torch.allclose(read.square().mean(-1).sqrt(), of_base.square().mean().sqrt(), rtol=1e-3)


def test_hydra_whose_tokens_weigh_nothing_is_medusa(base):
    ids, h = inputs(base)
    medusa = drawn(Medusa(MedusaConfig(heads=HEADS, layers=2), base))
    hydra = Hydra(HydraConfig(heads=HEADS, layers=2), base).double()
    with torch.no_grad():
        for i, w in enumerate(hydra.first):
            assert torch.equal(w[:WIDTH, :WIDTH], torch.eye(WIDTH).double()) and w.shape == (2 * WIDTH, (i + 2) * WIDTH)
            w[WIDTH:, :WIDTH] = medusa.blocks[0, i]
            hydra.first_bias[i, WIDTH:] = medusa.bias[0, i]
            hydra.blocks[i, 0], hydra.bias[i, 0] = medusa.blocks[1, i], medusa.bias[1, i]
    assert torch.allclose(hydra.reads(base, h, ids), medusa.reads(base, h, ids), atol=1e-12)
    with torch.no_grad():
        hydra.first[1][:, -1] += 1.0
    assert not torch.allclose(hydra.reads(base, h, ids), medusa.reads(base, h, ids), atol=1e-3)


def test_teacher_forcing_gives_each_head_the_state_and_the_tokens_behind_it(base):
    ids, h = inputs(base)
    part = drawn(Hydra(HydraConfig(heads=HEADS, layers=2), base))
    reads, e = part.reads(base, h, ids), base.embed(ids)
    for i in range(1, HEADS + 1):
        for t in range(10 - i):
            path = torch.cat([h[1, t], *(e[1, t + j] for j in range(1, i + 1))])
            assert torch.allclose(reads[1, t, i - 1], part(i, path), atol=1e-12)


def test_a_prefix_layer_sees_all_states_so_far_and_none_behind(base):
    ids, h = inputs(base)
    part = drawn(Hydra(HydraConfig(heads=1, prefix=True), base))
    before = part.reads(base, h, ids)
    changed = h.clone()
    changed[:, 4] += 1.0
    after = part.reads(base, changed, ids)
    assert torch.equal(before[:, :4], after[:, :4])
    assert bool(((before - after)[:, 4:].abs().amax((0, 2, 3)) > 1e-6).all())


def test_all_parameters_of_a_part_are_trained_and_none_of_the_base(base):
    ids, h = inputs(base)
    for config in (HydraConfig(heads=2, layers=2, prefix=True, distill=True), HydraConfig(), MedusaConfig(layers=2)):
        kind = Hydra if isinstance(config, HydraConfig) else Medusa
        learner = DraftLearner(drawn(kind(config, base)), base)
        total, _ = learner({"token": ids, "state": h}, Generator(0), 0, 1)
        total.backward()
        still = [n for n, p in learner.named_parameters() if p.grad is None or not bool((p.grad != 0).any())]
        assert not still
        assert all(p.grad is None for p in base.model.parameters())


def test_the_arms_of_hydras_claim_have_as_many_parameters(base):
    arms = load("hydra").CLAIM.arms
    counts = [
        sum(p.numel() for p in kind(kind.Config(**arms[name].settings), base).parameters())
        for kind, name in ((Hydra, "hydra"), (Medusa, "medusa"))
    ]
    assert abs(counts[0] / counts[1] - 1) < 0.1


def test_dropout_is_of_training_alone(base):
    ids, h = inputs(base)
    part = drawn(Hydra(HydraConfig(heads=2, dropout=0.5), base))
    a, b = part.train().reads(base, h, ids), part.reads(base, h, ids)
    assert not torch.equal(a, b)
    part.eval()
    assert torch.equal(part.reads(base, h, ids), part.reads(base, h, ids))


def test_chances_count_candidates_where_all_heads_before_have_the_text_among_theirs(base):
    part = drawn(Medusa(MedusaConfig(heads=2), base))
    ids, h = inputs(base, 5, 30)
    got = chances(part, base, _All(ids, h))
    best = part.output.best(part(h), 8)
    first, second, reached = [0.0] * 8, [0.0] * 8, 0
    for row in range(5):
        for t in range(30 - 3):
            one, two = best[row, t].tolist()
            if int(ids[row, t + 2]) in one:
                first[one.index(int(ids[row, t + 2]))] += 1
                reached += 1
                if int(ids[row, t + 3]) in two:
                    second[two.index(int(ids[row, t + 3]))] += 1
    assert torch.allclose(torch.tensor(got), torch.tensor([[x / 135 for x in first], [x / reached for x in second]]))
    assert reached > 20


class _All:
    """All windows."""

    def __init__(self, ids: torch.Tensor, h: torch.Tensor):
        self.ids, self.h = ids, h

    def __len__(self) -> int:
        return len(self.ids)

    def take(self, index: torch.Tensor) -> dict[str, torch.Tensor]:
        return {"token": self.ids[index], "state": self.h[index]}


@pytest.mark.parametrize(("settings", "message"), [
    ({"heads": 0}, "at least 1 head"), ({"layers": 0}, "at least 1 head"), ({"decay": 0.0}, "decay lies"),
    ({"dropout": 1.0}, "dropout is a share"),
])  # fmt: skip
def test_sizes_that_mean_nothing_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        HydraConfig(**settings)


# ---- published heads -------------------------------------------------------------------------------------------------
# The released modules, by their layout: names of tensors, what a block computes, where dropout stands.


class Block(nn.Module):
    def __init__(self, width: int, tokens: int = 0):
        super().__init__()
        self.linear = nn.Linear(width * (tokens + 1), width)
        if tokens:
            self.res_connection = nn.Linear(width * (tokens + 1), width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        kept = self.res_connection(x) if hasattr(self, "res_connection") else x
        return kept + nn.functional.silu(self.linear(x))


def released_medusa(heads: int, layers: int, own: bool) -> nn.ModuleList:
    """Blocks of a head are one module, repeated."""
    return nn.ModuleList(
        nn.Sequential(*([Block(WIDTH)] * layers), *([nn.Linear(WIDTH, VOCAB, bias=False)] if own else []))
        for _ in range(heads)
    )


class ReleasedHydra(nn.Module):
    def __init__(self, heads: int, layers: int, prefix: nn.Module | None):
        super().__init__()
        first = [Block(WIDTH, i + 1) for i in range(heads)]
        deep = [Block(WIDTH) for _ in range(heads)]
        dropped = prefix is not None
        gap = [nn.Dropout(0.0)] if dropped else []
        self.input_embed_fn = nn.Embedding(VOCAB, WIDTH)
        self.hydra_mlp = nn.ModuleList(
            nn.Sequential(*gap, a, *([*gap, b] * (layers - 1))) for a, b in zip(first, deep, strict=True)
        )
        ends = [nn.Linear(WIDTH, VOCAB) for _ in range(heads)]
        self.hydra_lm_head = nn.ModuleList(nn.Sequential(*gap, e) if dropped else e for e in ends)
        if prefix is not None:
            self.prefix_embeding_layer = prefix


def scaled(module: nn.Module, seed: int = 6) -> nn.Module:
    g = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in module.parameters():
            p.copy_(torch.randn(p.shape, generator=g) * 0.3 + (p.dim() == 1))
    return module.eval()


def write(folder: Path, name: str, module: nn.Module, config: dict) -> Path:
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps({"base_model_name_or_path": "owner/their-base", **config}))
    tensors = module.state_dict()
    if name.endswith(".safetensors"):
        save_file({k: v.clone() for k, v in tensors.items()}, folder / name)
    else:
        torch.save(tensors, folder / name)
    return folder / name


@pytest.fixture
def single(base) -> Base:
    base = base_of(Transformer(TransformerConfig(WIDTH, 2, 4, kv_heads=2, hidden=40, rope=RoPE())))
    base.model.float()
    return base


@pytest.mark.parametrize("name", ["medusa_lm_head.safetensors", "medusa_lm_head.pt"])
@pytest.mark.parametrize("own", [False, True])
def test_published_medusa_heads_say_what_the_released_modules_say(single, tmp_path, name, own):
    theirs = scaled(released_medusa(3, 2, own))
    file = write(tmp_path, name, theirs, {"medusa_num_heads": 2, "medusa_num_layers": 2})  # configs are known to err
    assert published_heads(tmp_path, "medusa") == file and published_heads(tmp_path, "hydra") is None
    part = load_published_heads(file, single, "medusa", pickled=True)
    h = torch.randn(5, WIDTH, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        want = torch.stack([head(h) for head in theirs], 1)
        want = want if own else single.logits(want)
        got = part.output(part(h))
    assert part.ahead == 3 and torch.allclose(got, want, atol=1e-4 * float(want.abs().max()))
    assert float(want.std()) > 2


@pytest.mark.parametrize("layers", [1, 3])
@pytest.mark.parametrize("prefixed", [False, True])
def test_published_hydra_heads_say_what_the_released_modules_say(single, tmp_path, layers, prefixed):
    prefix = None
    if prefixed:
        transformers = pytest.importorskip("transformers")
        config = transformers.LlamaConfig(
            vocab_size=VOCAB, hidden_size=WIDTH, intermediate_size=40, num_hidden_layers=1, num_attention_heads=4,
            num_key_value_heads=2, rms_norm_eps=1e-5,
        )  # fmt: skip
        prefix = transformers.LlamaModel(config)
    theirs = scaled(ReleasedHydra(3, layers, prefix))
    arch = "prefix-mlp" if prefixed else "mlp"
    settings = {"hydra_head_arch": arch, "hydra_num_layers": layers, "grounded_heads": True}
    part = load_published_heads(write(tmp_path, "hydra_lm_head.pt", theirs, settings), single, "hydra", pickled=True)
    ids, h = inputs(single)
    h, e = h.float(), single.embed(ids)
    with torch.no_grad():
        seen = [h if prefix is None else prefix(inputs_embeds=h).last_hidden_state]
        got = part.output(part.reads(single, h, ids))
        for i in range(3):
            seen.append(torch.roll(e, -(i + 1), 1))
            want = theirs.hydra_lm_head[i](theirs.hydra_mlp[i](torch.cat(seen, -1)))[:, : -(i + 1)]
            assert torch.allclose(got[:, : -(i + 1), i], want, atol=1e-4 * float(want.abs().max()))
            assert float(want.std()) > 2


def test_a_pickle_is_read_only_on_demand_and_never_runs(single, tmp_path):
    file = write(tmp_path, "medusa_lm_head.pt", scaled(released_medusa(1, 1, True)), {})
    with pytest.raises(ValueError, match=r"is a pickle.*\+pickled=true"):
        load_published_heads(file, single, "medusa")

    class Evil:
        def __reduce__(self):
            return (Path.touch, (tmp_path / "ran",))

    file.write_bytes(pickle.dumps({"0.0.linear.weight": Evil()}, protocol=2))
    with pytest.raises(ValueError, match="does not hold tensors alone"):
        load_published_heads(file, single, "medusa", pickled=True)
    assert not (tmp_path / "ran").exists()


def test_heads_that_do_not_fit_are_refused_and_both_models_named(single, tmp_path):
    wide = base_of(Transformer(TransformerConfig(16, 1, 2)), width=16)
    file = write(tmp_path, "medusa_lm_head.safetensors", scaled(released_medusa(1, 1, False)), {})
    with pytest.raises(ValueError, match=r"owner/their-base.*does not fit tiny of width 16"):
        load_published_heads(file, wide, "medusa")
    other = write(tmp_path, "hydra_lm_head.pt", scaled(ReleasedHydra(1, 1, None)), {"hydra_head_arch": "eagle-attn"})
    with pytest.raises(ValueError, match="variant eagle-attn is not known"):
        load_published_heads(other, single, "hydra", pickled=True)
    (tmp_path / "config.json").unlink()
    with pytest.raises(FileNotFoundError, match=r"no config\.json"):
        load_published_heads(file, single, "medusa")
    file.write_bytes(file.read_bytes()[:50])
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(ValueError, match="cut short"):
        load_published_heads(file, single, "medusa")
