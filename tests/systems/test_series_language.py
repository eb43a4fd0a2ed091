"""Language models that read series: what is frozen, what prompts say, which anchors are chosen."""

import numpy as np
import pytest
import torch

from seriatim.cli.main import main
from seriatim.systems.frozen_text import TINY, FrozenText
from seriatim.systems.series.autotimes import AutoTimes, in_words
from seriatim.systems.series.autotimes import Config as SegmentConfig
from seriatim.systems.series.s2ip_llm import S2IP
from seriatim.systems.series.s2ip_llm import Config as AnchorConfig
from seriatim.systems.series.time_llm import Config as WordConfig
from seriatim.systems.series.time_llm import TimeLLM, strongest
from seriatim.tokenizers.series import overlapping, parted
from seriatim.verbs.load import load
from seriatim.verbs.train import train

SMALL = {"lookback": 24, "horizon": 6, "patch": 4, "stride": 2, "model": TINY, "layers": 1}
WORDS = {**SMALL, "width": 8, "prototypes": 4, "heads": 2, "inner": 4}
ANCHORS = {**SMALL, "mean": 5, "period": 4, "anchors": 8, "prompt": 3}
SEGMENTS = {"lookback": 24, "horizon": 6, "segment": 6, "model": TINY}


@pytest.fixture(scope="module")
def published(tmp_path_factory):
    """Tiny models of two shapes as `transformers` writes them: folder, and what reads vectors."""
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    made = {}
    gpt2 = transformers.GPT2Config(n_embd=32, n_layer=3, n_head=4, n_positions=40, vocab_size=64)
    llama = transformers.LlamaConfig(
        hidden_size=32, intermediate_size=48, num_hidden_layers=3, num_attention_heads=4, num_key_value_heads=2,
        vocab_size=64,
    )  # fmt: skip
    for name, config, kind in (
        ("gpt2", gpt2, transformers.GPT2LMHeadModel), ("llama", llama, transformers.LlamaForCausalLM)
    ):  # fmt: skip
        folder = tmp_path_factory.mktemp(name)
        theirs = kind(config).eval()
        theirs.save_pretrained(folder)
        made[name] = folder, theirs.transformer if name == "gpt2" else theirs.model
    return made


@pytest.mark.parametrize("name", ["gpt2", "llama"])
def test_vectors_are_read_as_other_programs_read_them(published, name):
    folder, theirs = published[name]
    ours, x = FrozenText(str(folder)), torch.randn(3, 11, 32)
    with torch.no_grad():
        assert (ours(x) - theirs(inputs_embeds=x).last_hidden_state).abs().max() < 1e-4
        first = FrozenText(str(folder), layers=2)(x)
        theirs_cut = theirs(inputs_embeds=x, output_hidden_states=True).hidden_states[2]
        norm = theirs.ln_f if name == "gpt2" else theirs.norm
        assert (first - norm(theirs_cut)).abs().max() < 1e-4
    assert not list(ours.parameters())


@pytest.mark.parametrize("name", ["gpt2", "llama"])
def test_empty_slots_in_front_are_not_seen(published, name):
    model, x = FrozenText(str(published[name][0])), torch.randn(2, 7, 32)
    with torch.no_grad():
        filled = torch.cat([torch.randn(2, 3, 32), x], 1)
        assert (model(filled, torch.tensor([3, 3]))[:, 3:] - model(x)).abs().max() < 1e-5
        ragged = model(torch.cat([torch.randn(2, 3, 32), x], 1), torch.tensor([3, 0]))
        assert (ragged[0, 3:] - model(x)[0]).abs().max() < 1e-5


def test_more_places_than_a_model_has_are_refused(published):
    with pytest.raises(ValueError, match="40 places, and 41 are needed"):
        FrozenText(str(published["gpt2"][0]))(torch.randn(1, 41, 32))


def test_random_matrices_are_as_large_as_those_they_replace(published):
    folder, _ = published["llama"]
    as_it_was, random = (
        dict(FrozenText(str(folder), w).system.model.named_parameters()) for w in ("pretrained", "random")
    )
    for name, p in as_it_was.items():
        if p.dim() > 1:
            assert not torch.equal(p, random[name]) and float(p.std() / random[name].std()) == pytest.approx(1, abs=0.1)
        else:
            assert torch.equal(p, random[name])
    again = dict(FrozenText(str(folder), "random").system.model.named_parameters())
    assert all(torch.equal(p, again[name]) for name, p in random.items()), "a run is loaded with the same numbers"


def test_norms_and_places_alone_are_trained_and_saved(published):
    model = FrozenText(str(published["gpt2"][0]), trained=("norm", "place"))
    names = set(dict(model.named_parameters()))
    assert any("norm1" in n for n in names) and any("place" in n for n in names) and len(names) == 3 * 4 + 2 + 1
    model.double()
    assert all(p.dtype == torch.float64 for p in model.system.model.parameters())
    shared = {id(p) for p in model.system.model.parameters()}
    assert all(id(p) in shared for p in model.parameters())


def test_what_is_no_language_model_is_refused():
    with pytest.raises(ValueError, match="decoder-only transformer"):
        FrozenText("zoo:text-mdlm")
    with pytest.raises(ValueError, match="pretrained, random, none"):
        FrozenText(TINY, "trained")
    with pytest.raises(ValueError, match="has 1 layers, and 2"):
        FrozenText(TINY, layers=2)


def test_texts_are_read_once_and_kept(tmp_path, monkeypatch):
    monkeypatch.setattr("seriatim.systems.frozen_text.HOME", tmp_path)
    model, texts = FrozenText(TINY), ["a b c", "a b", "d e f", "a b"]
    model.learn(texts)
    (file,) = (tmp_path / "series").iterdir()
    other = FrozenText(TINY)
    monkeypatch.setattr(other.system, "states", None)  # nothing is read again
    other.learn(texts)
    assert torch.equal(other.states(texts), model.states(texts)) and file.is_file()
    assert other.double().states(["a b"]).dtype == torch.float64, "what was read stays read, wherever the model goes"
    ids = torch.tensor([model.ids("d e f")])
    assert torch.allclose(model.states(["d e f"])[0], model.system.states(ids)[0, -1])


# ---- AutoTimes -------------------------------------------------------------------------------------------------------
def test_times_are_told_in_words():
    begin = int(np.datetime64("2016-07-01", "ms").astype(np.int64))
    assert (
        in_words(begin, begin + 95 * 3_600_000) == "This is Time Series from 2016-07-01 00:00:00 to 2016-07-04 23:00:00"
    )


def test_stamps_are_those_of_each_segment():
    system = AutoTimes(SegmentConfig(**SEGMENTS))
    time = 3_600_000 * torch.arange(24).expand(2, 24)[..., None] + torch.tensor([0, 3_600_000])[:, None, None]
    stamps = system.model.stamps(time)
    assert stamps.shape == (2, 4, 16)
    want = system.model.text.states([in_words(7 * 3_600_000, 12 * 3_600_000)])[0]
    assert torch.equal(stamps[1, 1], want)
    past = torch.randn(2, 24, 3)
    with torch.no_grad():
        moved = (system.behind(past, time) - system.behind(past, time + 3_600_000)).abs().max()
    assert moved > 1e-6, "times count"


# ---- Time-LLM --------------------------------------------------------------------------------------------------------
def test_a_prompt_says_what_the_window_is():
    system = TimeLLM(WordConfig(**WORDS, about="loads."))
    t = torch.arange(24.0)
    (said,) = system.model.prompts((torch.sin(2 * torch.pi * t / 6) + 0.001 * t)[None])
    assert said.startswith(
        "Dataset description: loads. Task description: forecast the next 6 steps given the previous 24 "
    )
    assert (
        "min value -0.86" in said and "max value 0.88" in said and "is downward" in said and "lags are: 6, 12," in said
    )


def test_lags_are_those_of_the_season():
    x = torch.sin(2 * torch.pi * torch.arange(240) / 24)[None] + 0.01 * torch.randn(1, 240)
    assert strongest(x)[0, :5].sort().values.tolist() == [24, 48, 72, 96, 120]


def test_prototypes_are_asked_by_attention():
    model = TimeLLM(WordConfig(**WORDS)).eval().model
    x = torch.randn(2, 24)
    with torch.no_grad():
        words = model.choose.weight @ model.text.words + model.choose.bias[:, None]
        assert (model.prototypes() - words).abs().max() < 1e-5
        p = overlapping(x, 4, 2)
        around = torch.cat([p[:, -1:], p, p[:, :1]], 1)  # the line of patches is a ring
        tokens = sum(around[:, i : i + p.shape[1]] @ model.embed.weight[..., i].T for i in range(3))
        q, k, v = model.query(tokens), model.key(words), model.value(words)
        heads = [((q[..., s] @ k[:, s].T) / 2).softmax(-1) @ v[:, s] for s in (slice(0, 4), slice(4, 8))]
        assert (model.reprogrammed(x) - model.out(torch.cat(heads, 2))).abs().max() < 1e-5


def test_a_constant_series_is_forecast_as_itself():
    for system in (TimeLLM(WordConfig(**WORDS)), S2IP(AnchorConfig(**ANCHORS)), AutoTimes(SegmentConfig(**SEGMENTS))):
        past, time = torch.full((1, 24, 2), 5.0), torch.arange(24)[None, :, None]
        made = system.eval().forecast(past, time, torch.arange(24, 30)[None, :, None])
        assert (made - 5).abs().max() < 0.05, system.meta.key


# ---- S2IP-LLM --------------------------------------------------------------------------------------------------------
def test_parts_are_means_and_phases():
    x = torch.randn(2, 40, dtype=torch.float64)
    trend, season, rest = parted(x, 6, 4)
    assert (trend + season + rest - x).abs().max() < 1e-12
    for i in (3, 20, 37):  # pandas' centred window of 6 is of 3 steps before and 2 behind
        assert torch.allclose(trend[:, i], x[:, i - 3 : i + 3].mean(1))
    assert torch.equal(trend[:, 0], trend[:, 3]) and torch.equal(trend[:, 39], trend[:, 37])
    assert torch.allclose(season[:, 5], (x - trend)[:, 1::4].mean(1))
    wave = torch.sin(2 * torch.pi * torch.arange(96.0) / 24)[None]
    assert parted(wave, 24, 24).rest[:, 12:-12].abs().max() < 0.2
    with pytest.raises(ValueError, match="do not fit into 40 steps"):
        parted(x, 41, 4)


def test_the_nearest_anchors_are_chosen_and_come_nearer():
    torch.manual_seed(0)
    system = S2IP(AnchorConfig(**ANCHORS))
    model, x = system.model, torch.randn(3, 24)
    tokens = model.tokens(x)
    anchors, chosen, alike = model.nearest(tokens)
    cosines = torch.nn.functional.cosine_similarity(tokens.mean(1)[:, None], anchors[None], dim=-1)
    assert torch.equal(chosen.sort().values, cosines.topk(3).indices.sort().values)
    assert torch.allclose(alike, cosines.gather(1, chosen), atol=1e-6)
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    (-alike.mean()).backward()
    optimizer.step()
    assert model.nearest(model.tokens(x))[2].mean() > alike.mean()


def test_states_that_make_no_three_stretches_are_refused_with_what_would():
    with pytest.raises(ValueError, match="take a prompt of 3"):
        S2IP(AnchorConfig(**{**ANCHORS, "prompt": 2}))


# ---- from end to end -------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(("key", "settings"), [("autotimes", SEGMENTS), ("time-llm", WORDS), ("s2ip-llm", ANCHORS)])
def test_trained_saved_without_the_language_model_and_loaded(tmp_path, monkeypatch, capsys, key, settings):
    monkeypatch.setattr("seriatim.systems.frozen_text.HOME", tmp_path)
    times = np.datetime64("2020-01-01", "s") + np.arange(300) * np.timedelta64(3600, "s")
    rows = [f"{t},{np.sin(i / 4):.3f},{np.cos(i / 4):.3f}" for i, t in enumerate(times)]
    table = tmp_path / "waves.csv"
    table.write_text("\n".join(["date,a,b", *rows]), encoding="utf-8")
    trained = train(key, table, out=tmp_path / "run", settings={**settings, "steps": 4, "batch": 4})
    saved = set(load(tmp_path / "run").weights_to_keep().state_dict())
    assert saved and not any("system" in name for name in saved)
    given = trained.system.given(trained.data.test.windows(24, 6).take(torch.arange(2)))
    assert torch.allclose(load(tmp_path / "run").forecast(*given), trained.system.forecast(*given), atol=1e-5)
    assert main(["forecast", str(tmp_path / "run"), "--data", str(table), "--horizon", "5"]) == 0
    assert "5 steps" in capsys.readouterr().out
