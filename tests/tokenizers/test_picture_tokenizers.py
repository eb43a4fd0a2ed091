"""What every tokenizer of pictures promises, whatever its kind."""

from __future__ import annotations

import copy
import json
import math
from pathlib import Path

import pytest
import torch

from seriatim.tokenizers import KLConfig, KLTokenizer, MultiScaleConfig, VQConfig, load_tokenizer, save_tokenizer
from seriatim.tokenizers.codebook import draw
from seriatim.tokenizers.vq import make_quantizer


# ---- encode and decode -----------------------------------------------------------------------------------------------
def test_codes_have_the_promised_shape_and_decode_to_pictures(make, pictures, any_name: str) -> None:
    tokenizer = make(any_name).eval()
    images = pictures(tokenizer, 3)
    codes = tokenizer.encode(images)
    rows, columns = tokenizer.grid
    scales = getattr(tokenizer.config, "scales", None)
    elements = rows * columns if scales is None else sum(side * side for side in scales)
    depth = getattr(tokenizer, "depth", 1)
    if tokenizer.vocab is None:
        assert codes.shape == (3, elements, tokenizer.dim) and codes.is_floating_point()
    else:
        assert codes.shape == (3, elements, depth)[: 3 if depth > 1 else 2]
        assert codes.dtype == torch.int64 and codes.min() >= 0 and codes.max() < tokenizer.vocab
    drawn = tokenizer.decode(codes)
    assert drawn.shape == images.shape and drawn.abs().max() <= 1 and drawn.dtype == torch.float32


def test_a_picture_is_encoded_the_same_in_any_company(make, pictures, any_name: str) -> None:
    tokenizer = make(any_name).eval()
    images = pictures(tokenizer, 5)
    codes = tokenizer.encode(images)
    torch.testing.assert_close(tokenizer.encode(images[2:3]), codes[2:3])
    torch.testing.assert_close(tokenizer.decode(codes[2:3]), tokenizer.decode(codes)[2:3])


def test_the_training_path_draws_what_the_ids_decode_to(make, pictures, trained_name: str) -> None:
    if trained_name.startswith("kl"):
        pytest.skip("latents are samples in training")
    tokenizer = make(trained_name).eval()
    images = pictures(tokenizer)
    drawn, quantized = tokenizer(images)
    assert torch.equal(quantized.ids, tokenizer.encode(images))
    torch.testing.assert_close(drawn.clamp(-1, 1), tokenizer.decode(quantized.ids))


@pytest.mark.parametrize("shape", [(1, 16, 12), (1, 20, 20), (2, 16, 16), (16, 16)], ids=str)
def test_pictures_of_another_shape_are_refused(make, shape: tuple[int, ...]) -> None:
    for name in ("multi-scale", "vq-l2", "kl", "pixels"):
        tokenizer = make(name)
        for act in (tokenizer.encode, lambda x, t=tokenizer: t.loss(x, 0, 10, torch.Generator())):
            if name == "pixels" and act is not tokenizer.encode:
                continue
            with pytest.raises(ValueError, match=r"square pictures of shape \(1, 16, 16\).*resize them to 16x16"):
                act(torch.zeros(2, *shape))
    with pytest.raises(ValueError, match="floating point"):
        make("vq-l2").encode(torch.zeros(2, 1, 16, 16, dtype=torch.uint8))


def test_codes_of_another_shape_or_range_are_refused(make, pictures, any_name: str) -> None:
    tokenizer = make(any_name).eval()
    codes = tokenizer.encode(pictures(tokenizer, 2))
    with pytest.raises(ValueError, match="have shape"):
        tokenizer.decode(codes[:, :-1])
    if tokenizer.vocab is not None:
        for wrong in (-1, tokenizer.vocab):
            with pytest.raises(ValueError, match=f"ids lie in 0..{tokenizer.vocab - 1}"):
                tokenizer.decode(torch.full_like(codes, wrong))


# ---- training --------------------------------------------------------------------------------------------------------
def adam(tokenizer: torch.nn.Module, rate: float = 3e-3) -> torch.optim.Optimizer:
    return torch.optim.AdamW(tokenizer.parameters(), rate)


def test_every_parameter_gets_a_gradient_in_every_step(make, pictures, trained_name: str) -> None:
    tokenizer = make(trained_name).train()
    reached = dict.fromkeys((name for name, _ in tokenizer.named_parameters()), False)
    for step in range(0, 12):
        tokenizer.zero_grad(set_to_none=True)
        loss, figures = tokenizer.loss(pictures(tokenizer), step, 12, torch.Generator().manual_seed(step))
        loss.backward()
        assert figures["loss"] == pytest.approx(loss.item()) and "psnr" in figures
        for name, p in tokenizer.named_parameters():
            assert p.grad is not None, f"{name} has none in step {step}: its optimizer state would come and go"
            reached[name] |= bool(p.grad.any())
    # A fresh grid holds no code but 0, which drives no weight yet; a fresh critic's offset is pushed both ways equally.
    never = {"vq-fsq": {"decoder.layers.0.weight"}, "vq, critic": {"picture_loss.critic.layers.11.bias"}}
    assert {name for name, got in reached.items() if not got} == never.get(trained_name, set())


def test_training_that_stops_and_goes_on_elsewhere_is_the_same_bit_for_bit(make, steps_of, light_name: str) -> None:
    """The state is parameters, buffers and moments; steps 3 to 7 fill and revive codebooks, the last sets the scale."""
    changes = {} if light_name.startswith("kl") else {"revive_every": 2, "revive_below": 0.5}
    whole = make(light_name, **changes).train()
    optimizer = adam(whole)
    steps_of(whole, optimizer, 0, 9, 9)
    for stop in (3, 6):
        first = make(light_name, **changes).train()
        before = adam(first)
        steps_of(first, before, 0, stop, 9)
        again = make(light_name, seed=9, **changes).train()
        again.load_state_dict(first.state_dict())
        after = adam(again)
        after.load_state_dict(copy.deepcopy(before.state_dict()))
        steps_of(again, after, stop, 9, 9)
        for name, x in whole.state_dict().items():
            assert torch.equal(x, again.state_dict()[name]), f"{name} differs after a stop at {stop}"


@pytest.mark.slow
def test_reconstruction_improves(make, steps_of, light_name: str) -> None:
    tokenizer = make(light_name).train()
    said = steps_of(tokenizer, adam(tokenizer, 1e-2), 0, 120, 120)
    assert said[-1]["psnr"] > said[0]["psnr"] + 1.5
    assert all(math.isfinite(x) for figures in said for x in figures.values())
    if tokenizer.vocab is not None:
        assert said[-1]["codes_used"] >= 4


def test_training_runs_in_bf16_with_codes_in_full_precision(make, pictures, light_name: str) -> None:
    tokenizer = make(light_name).train()
    images = pictures(tokenizer)
    for step in (0, 4, 5, 8, 11):
        tokenizer.zero_grad()
        with torch.autocast("cpu", dtype=torch.bfloat16):
            loss, figures = tokenizer.loss(images, step, 12, torch.Generator().manual_seed(step))
        loss.backward()
        assert loss.dtype == torch.float32 and math.isfinite(figures["loss"])
        assert all(p.dtype == torch.float32 and p.grad.isfinite().all() for p in tokenizer.parameters())
    with torch.autocast("cpu", dtype=torch.bfloat16):
        codes = tokenizer.eval().encode(images)
        assert codes.dtype in (torch.int64, torch.float32)
        assert tokenizer.decode(codes).isfinite().all()


def test_looking_does_not_touch(make, pictures, trained_name: str) -> None:
    """In evaluation mode the loss of any step changes nothing, not even where a codebook would be filled."""
    tokenizer = make(trained_name).eval()
    before = copy.deepcopy(tokenizer.state_dict())
    state = torch.get_rng_state()
    with torch.no_grad():
        for step in (0, 4, 8, 11):
            tokenizer.loss(pictures(tokenizer), step, 12, torch.Generator().manual_seed(0))
    assert all(torch.equal(x, before[name]) for name, x in tokenizer.state_dict().items())
    assert torch.equal(state, torch.get_rng_state()), "the global random state was touched"


@pytest.mark.parametrize("name", ["pixels", "patches"])
def test_what_needs_no_training_says_so(make, pictures, name: str) -> None:
    tokenizer = make(name)
    with pytest.raises(TypeError, match="no training"):
        tokenizer.loss(pictures(tokenizer), 0, 10, torch.Generator())


# ---- the life of a codebook ------------------------------------------------------------------------------------------
@pytest.mark.parametrize("name", ["vq", "vq-l2"])
def test_a_codebook_is_filled_with_latents_and_unused_codes_are_revived(make, pictures, name: str) -> None:
    tokenizer = make(name, warm_up=0.25, revive_every=3, revive_below=0.5).train()
    images = pictures(tokenizer)
    fresh = tokenizer.quantizer.codebook.detach().clone()

    def run(step: int) -> dict[str, float]:
        return tokenizer.loss(images, step, 40, torch.Generator().manual_seed(step))[1]

    def met(codes: torch.Tensor) -> torch.Tensor:
        """Which codes are latents of these pictures."""
        with torch.no_grad():
            rows = tokenizer.latents(images).flatten(0, 1)
        return torch.cdist(codes, rows, compute_mode="donot_use_mm_for_euclid_dist").min(1).values < 1e-5

    assert "codes_used" not in run(9)
    assert torch.equal(tokenizer.quantizer.codebook, fresh)
    assert run(10)["codes_used"] > 1
    filled = tokenizer.quantizer.codebook.detach().clone()
    assert met(filled).all() and filled.unique(dim=0).shape == filled.shape
    with torch.no_grad():
        tokenizer.quantizer.codebook[3:6] = 1e3 * torch.tensor([1.0, -1, 1, -1])  # far from everything
        tokenizer.uses[:] = 10.0
        tokenizer.uses[3:6] = 0
    assert run(12)["codes_revived"] == 0, "not yet"
    figures = run(13)
    revived = (tokenizer.quantizer.codebook != filled).any(1)
    assert revived[3:6].all() and met(tokenizer.quantizer.codebook.detach()).all()
    assert figures["codes_revived"] == revived.sum()
    assert tokenizer.uses.sum() == 8 * 16, "counting starts anew"
    with torch.no_grad():
        tokenizer.uses.zero_()
        tokenizer.uses[0] = 100
    left = tokenizer.quantizer.codebook.detach().clone()
    assert run(34)["codes_revived"] == 0 and torch.equal(tokenizer.quantizer.codebook, left), "left alone at the end"


def test_a_pyramids_codebook_is_filled_scale_by_scale(make, pictures) -> None:
    tokenizer = make("multi-scale", warm_up=0.25).train()
    images, vq = pictures(tokenizer), tokenizer.quantizer
    for k in range(4):
        with torch.no_grad():
            rests = list(vq.analyse(tokenizer.latents(images)))[k].pooled.transpose(0, 1).flatten(1).T
        if k == 0:
            before = vq.codebook.detach()[:0].clone()
        tokenizer.loss(images, 10 + k, 40, torch.Generator().manual_seed(k))
        codes = vq.codebook.detach()
        assert torch.equal(codes[: 4 * k], before), "what coarser scales got stays"
        assert torch.equal(draw(rests, 4, torch.Generator().manual_seed(k)), codes[4 * k : 4 * k + 4]), (
            f"not rests of scale {k}"
        )
        before = codes[: 4 * k + 4].clone()


def test_more_codes_than_latents_are_filled_evenly(make, pictures) -> None:
    tokenizer = make("vq", vocab=300, warm_up=0.0).train()
    tokenizer.loss(pictures(tokenizer), 0, 10, torch.Generator().manual_seed(0))
    _, counts = tokenizer.quantizer.codebook.detach().unique(dim=0, return_counts=True)
    assert len(counts) == 8 * 16 and counts.min() == 2 and counts.max() == 3


# ---- KL --------------------------------------------------------------------------------------------------------------
def test_latents_have_unit_variance_after_training(make, steps_of, pictures) -> None:
    tokenizer = make("kl", kl_weight=0.0).train()
    with torch.no_grad():  # latents five times as large to begin with
        tokenizer.encoder.layers[-1].weight.mul_(5)
    optimizer = adam(tokenizer)
    steps_of(tokenizer, optimizer, 0, 95, 100)
    assert tokenizer.scale == 1, "measured at the end only"
    steps_of(tokenizer, optimizer, 95, 100, 100)
    tokenizer.eval()
    fresh = torch.cat([pictures(tokenizer, seed=s) for s in (0, 1)])
    assert tokenizer.encode(fresh, torch.Generator().manual_seed(0)).std() == pytest.approx(1.0, abs=0.1)
    raw = tokenizer.posterior(fresh).sample(torch.Generator().manual_seed(0))
    assert abs(raw.std().item() - 1) > 0.2, "the raw latents would have passed as well"


def test_decoding_undoes_the_scale(make, pictures) -> None:
    tokenizer = make("kl").eval()
    images = pictures(tokenizer)
    drawn = tokenizer.decode(tokenizer.encode(images))
    tokenizer.scale.fill_(3.0)
    latents = tokenizer.encode(images)
    torch.testing.assert_close(tokenizer.decode(latents), drawn)
    torch.testing.assert_close(latents, 3 * tokenizer.posterior(images).mean.flatten(2).transpose(1, 2))


def test_kl_divergence_is_that_of_the_library_and_log_variance_is_clamped() -> None:
    tokenizer = KLTokenizer(KLConfig(side=8, dim=2, width=8))
    moments = torch.randn(3, 4, 2, 2, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        for p in tokenizer.encoder.parameters():
            p.zero_()
    posterior = type(tokenizer.posterior(torch.zeros(1, 1, 8, 8)))(moments)
    mean, log_variance = moments.chunk(2, 1)
    normal = torch.distributions.Normal(mean, (0.5 * log_variance).exp())
    standard = torch.distributions.Normal(torch.zeros(()), torch.ones(()))
    want = torch.distributions.kl_divergence(normal, standard).flatten(1).sum(1)
    torch.testing.assert_close(posterior.kl(), want)
    wild = type(posterior)(torch.tensor([0.0, 0, 1e4, -1e4]).view(1, 4, 1, 1))
    assert wild.log_variance.flatten().tolist() == [20, -30]
    assert wild.sample(torch.Generator().manual_seed(0)).isfinite().all()


def test_samples_of_the_posterior_follow_the_generator(make, pictures) -> None:
    tokenizer = make("kl").eval()
    images = pictures(tokenizer, 2)
    first, again, other = (tokenizer.encode(images, torch.Generator().manual_seed(s)) for s in (1, 1, 2))
    assert torch.equal(first, again) and not torch.equal(first, other)
    many = torch.stack([tokenizer.encode(images, torch.Generator().manual_seed(s)) for s in range(400)])
    deviation = (0.5 * tokenizer.posterior(images).log_variance).exp().flatten(2).transpose(1, 2)
    torch.testing.assert_close(many.mean(0), tokenizer.encode(images), atol=0.3, rtol=0)  # 5 deviations of the mean
    torch.testing.assert_close(many.std(0) / deviation, torch.ones_like(deviation), atol=0.2, rtol=0)


# ---- files -----------------------------------------------------------------------------------------------------------
def test_a_saved_tokenizer_is_the_same_elsewhere(make, pictures, steps_of, any_name: str, tmp_path: Path) -> None:
    tokenizer = make(any_name)
    if list(tokenizer.parameters()):
        steps_of(tokenizer.train(), adam(tokenizer), 0, 10, 10)
    tokenizer.eval()
    assert save_tokenizer(tokenizer, tmp_path / "run") == tmp_path / "run"
    images = pictures(tokenizer)
    for path in (tmp_path / "run", tmp_path / "run" / "tokenizer.json", tmp_path / "run" / "tokenizer.safetensors"):
        again = load_tokenizer(path)
        assert type(again) is type(tokenizer) and again.config == tokenizer.config and not again.training
        assert torch.equal(again.encode(images), tokenizer.encode(images))
        assert torch.equal(again.decode(again.encode(images)), tokenizer.decode(tokenizer.encode(images)))
    assert json.loads((tmp_path / "run" / "tokenizer.json").read_text())["kind"] == tokenizer.kind


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "may have been cut short"),
        ("[1]", "names no kind"),
        ('{"kind": "gpt"}', "no tokenizer of pictures is called 'gpt'"),
        ('{"kind": "vq", "wide": 3}', "no setting 'wide'"),
        ('{"kind": "vq", "width": "64"}', "width is int, got '64'"),
        ('{"kind": "vq", "width": 1000000000000}', "width is int"),
        ('{"kind": "vq", "vocab": true}', "vocab is int"),
        ('{"kind": "vq", "side": 30}', "multiple of 4"),
        ('{"kind": "multi-scale", "scales": [1, "2"]}', "list of int"),
        ('{"kind": "multi-scale", "scales": []}', "coarse to fine"),
        ('{"kind": "vq", "quantizer": "magic"}', "quantizer is one of"),
    ],
)
def test_wrong_settings_are_refused(text: str, message: str, tmp_path: Path) -> None:
    (tmp_path / "tokenizer.json").write_text(text)
    with pytest.raises(ValueError, match=message):
        load_tokenizer(tmp_path)


def test_missing_and_foreign_files_are_said(make, tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"tokenizer\.json is missing"):
        load_tokenizer(tmp_path)
    save_tokenizer(make("vq"), tmp_path)
    weights = tmp_path / "tokenizer.safetensors"
    save_tokenizer(make("kl"), tmp_path, "other")
    whole = weights.read_bytes()
    weights.write_bytes((tmp_path / "other.safetensors").read_bytes())
    with pytest.raises(ValueError, match="another model"):
        load_tokenizer(tmp_path)
    weights.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(ValueError, match="cut short"):
        load_tokenizer(tmp_path)
    weights.unlink()
    with pytest.raises(FileNotFoundError, match="no weights"):
        load_tokenizer(tmp_path)


# ---- configs ---------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"side": 30}, "cannot be halved 2 times: take a multiple of 4"),
        ({"depth": 2}, "only residual-vq"),
        ({"vocab": 0}, "at least 1"),
        ({"warm_up": 1.0}, r"\[0, 1\)"),
        ({"revive_every": 0}, "at least 1 step"),
        ({"body": "residual", "width": 48}, "32 divides"),
        ({"perceptual": -1.0}, "not negative"),
    ],
)
def test_impossible_settings_are_refused(settings, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        VQConfig(**settings)


@pytest.mark.parametrize(
    ("quantizer", "vocab", "message"),
    [("fsq", 300, "power of two"), ("lfq", 1, "power of two"), ("fsq", 32, "levels for about"), ("lfq", 2**19, "BSQ")],
)
def test_vocabularies_that_a_quantizer_cannot_have_are_refused(quantizer, vocab: int, message: str) -> None:
    pytest.importorskip("vector_quantize_pytorch")
    with pytest.raises(ValueError, match=message):
        make_quantizer(VQConfig(quantizer=quantizer, vocab=vocab))


def test_configs_follow_the_size_of_pictures() -> None:
    assert MultiScaleConfig.for_pictures(8, 1) == MultiScaleConfig()
    glyphs = MultiScaleConfig.for_pictures(32, 1)
    assert (glyphs.side, glyphs.scales, glyphs.vocab) == (32, (1, 2, 3, 4, 6, 8), 256)
    photos = MultiScaleConfig.for_pictures(256, 3)
    assert photos.scales == (1, 2, 3, 4, 5, 6, 8, 10, 13, 16)
    assert (photos.side, photos.body, photos.width, photos.vocab, photos.dim) == (256, "residual", 160, 4096, 32)
    assert MultiScaleConfig.for_pictures(64, 3, vocab=99).vocab == 99
    for config in (VQConfig, KLConfig):
        assert config.for_pictures(32, 1) == config()
        assert config.for_pictures(256, 3).width == 128
        assert [config.for_pictures(side, 1).side >> config.for_pictures(side, 1).halvings for side in (8, 28, 64)] == [
            8,
            7,
            8,
        ]
    with pytest.raises(ValueError, match="near it there are 16, 32"):
        MultiScaleConfig.for_pictures(30, 1)
