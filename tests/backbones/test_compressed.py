"""Compressed keys and values: how near they are, what they take, and that what is exact stays exact."""

from __future__ import annotations

import inspect
import textwrap
from typing import Any

import pytest
import torch
from torch import Tensor

from seriatim.backbones.cache import KVCache
from seriatim.backbones.compressed import Codec, CompressedCache, pack, power_iteration, unpack
from seriatim.decoding.target import Target
from seriatim.factorization.line import LinePlan, LineShape
from seriatim.plan import OrderError
from seriatim.verbs.load import load

torch.set_num_threads(1)
KEYS, VALUES = -2, -1
PLAIN, S, L, BOTH = ({"outliers": s, "rank": r} for s, r in ((0.0, 0), (0.02, 0), (0.0, 4), (0.02, 4)))


def noise(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def error(codec: Codec, x: Tensor, along: int) -> float:
    """Relative, of what comes back."""
    return float((codec.decode(codec.encode(x, along), along, x.dtype) - x).norm() / x.norm())


@pytest.fixture(scope="module")
def planted() -> Tensor:
    """Rank 8 and noise, with a few numbers twenty times as large, in each of 6 heads."""
    x = noise(6, 64, 8) @ noise(6, 8, 64, seed=1) / 8**0.5 + 0.3 * noise(6, 64, 64, seed=2)
    where = torch.rand(x.shape, generator=torch.Generator().manual_seed(3)) < 0.01
    return torch.where(where, 20 * noise(*x.shape, seed=4), x)


@pytest.fixture(scope="module")
def real() -> tuple[Tensor, Tensor]:
    """Keys and values (layers, heads, blocks, 64 tokens, channels) of a text in a trained model."""
    system = load("zoo:text-base")
    ids = system.tokenizer.encode(inspect.getsource(textwrap)[:2000])[:256]
    canvas = system._begun([ids], 1)
    target = Target(system.model)
    with torch.inference_mode():
        target.prefill(canvas, shared=True)
        keys, values = target.cache.buffer[:, :, 0, :, :192].float().unflatten(3, (3, 64)).clone().unbind(1)
    return keys, values


# ---- the codec -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("along", [KEYS, VALUES])
@pytest.mark.parametrize("codec", [Codec(16, rank=0, outliers=0), Codec(16), Codec(2, rank=64), Codec(2, 16, 0, 64)])
def test_all_bits_or_full_rank_lose_nothing_to_speak_of(codec: Codec, along: int, planted: Tensor) -> None:
    assert error(codec, planted, along) < 1e-3


def in_order(bits: int, x: Tensor, along: int) -> list[float]:
    plain, s, low, both = (error(Codec(bits, **what), x, along) for what in (PLAIN, S, L, BOTH))
    assert both < low < plain and both < s < plain, f"{plain:.3f} plain, {s:.3f} S, {low:.3f} L, {both:.3f} both"
    return [plain, s, low, both]


@pytest.mark.parametrize("along", [KEYS, VALUES])
@pytest.mark.parametrize("bits", [2, 3, 4])
def test_outliers_and_rank_each_make_it_nearer_on_planted_structure(bits: int, along: int, planted: Tensor) -> None:
    plain, s, low, both = in_order(bits, planted, along)
    assert both < 0.6 * plain


@pytest.mark.parametrize("bits", [2, 4])
def test_outliers_and_rank_each_make_it_nearer_on_a_trained_models_cache(bits: int, real: tuple) -> None:
    in_order(bits, real[0], KEYS)
    in_order(bits, real[1], VALUES)


def test_fewer_numbers_share_bounds_more_closely(planted: Tensor) -> None:
    for along in (KEYS, VALUES):
        wide, narrow = (error(Codec(2, group, 0, 0), planted, along) for group in (None, 16))
        assert narrow < 0.8 * wide


def test_keys_are_rounded_along_tokens_and_values_along_channels() -> None:
    """A channel of large keys spoils only itself; a token of large values too."""
    x = noise(64, 64)
    x[:, 5] += 100
    codec = Codec(2, **PLAIN)
    keys, values = codec.encode(x, KEYS), codec.encode(x.T.contiguous(), VALUES)
    for got in (codec.decode(keys, KEYS, x.dtype), codec.decode(values, VALUES, x.dtype).T):
        rest = torch.arange(64) != 5
        assert (got - x)[:, rest].norm() / x[:, rest].norm() < 0.6
    across = codec.decode(codec.encode(x, VALUES), VALUES, x.dtype)
    assert (across - x)[:, rest].norm() / x[:, rest].norm() > 0.9


@pytest.mark.parametrize("along", [KEYS, VALUES])
def test_outliers_come_back_as_they_were(along: int, planted: Tensor) -> None:
    x = planted.half().float()
    block = Codec(2, outliers=0.1).encode(x, along)
    places, got = block.places.long(), Codec(2, outliers=0.1).decode(block, along, x.dtype)
    kept = x.gather(along, places)
    assert places.shape[along] == 6 and torch.equal(got.gather(along, places), kept)
    assert torch.equal(kept.sort(along)[0], x.sort(along)[0].index_select(along, torch.tensor([0, 1, 2, 61, 62, 63])))


@pytest.mark.parametrize("value", [0.0, 1.0, -0.37, 1e-9, 6e4])
@pytest.mark.parametrize("codec", [Codec(2), Codec(4, **PLAIN), Codec(3, 16), Codec(16, **BOTH)])
def test_constant_vectors_come_back(codec: Codec, value: float) -> None:
    x = torch.full((2, 64, 32), value)
    for along in (KEYS, VALUES):
        got = codec.decode(codec.encode(x, along), along, x.dtype)
        torch.testing.assert_close(got, x, rtol=1e-3, atol=1e-7)


def test_numbers_beyond_half_precision_stay_finite() -> None:
    x = noise(2, 64, 32)
    x[0, 3, 4], x[1, 5] = 1e6, -1e7
    for along in (KEYS, VALUES):
        assert torch.isfinite(Codec(4).decode(Codec(4).encode(x, along), along, x.dtype)).all()


@pytest.mark.parametrize("rank", [1, 2, 4])
def test_power_iteration_is_within_5_percent_of_the_best(rank: int, planted: Tensor, real: tuple) -> None:
    codec = Codec(2, outliers=0.02, rank=0)
    cases = ((planted, KEYS), (planted, VALUES), (real[0], KEYS), (real[1], VALUES))
    for x, along in cases:
        lost = x - codec.decode(codec.encode(x, along), along, x.dtype)
        left, right = power_iteration(lost, rank)
        best = torch.linalg.svdvals(lost)[..., rank:].square().sum(-1).sqrt()
        ours = (lost - left @ right.mT).flatten(-2).norm(dim=-1)
        assert bool((ours >= best * (1 - 1e-5)).all())
        assert float(ours.norm() / best.norm()) < 1.05


@pytest.mark.parametrize("bits", range(1, 17))
def test_packing_takes_so_many_bits_and_loses_none(bits: int) -> None:
    for count in (1, 7, 64, 193):
        codes = torch.randint(2**bits, (3, count), generator=torch.Generator().manual_seed(bits))
        packed = pack(codes.float(), bits)
        assert packed.dtype == torch.uint8
        assert packed.shape[1] <= count * bits / 8 + 3
        assert torch.equal(unpack(packed, bits, count, torch.float64).long(), codes)


def test_ranks_beyond_a_matrix_are_zeros() -> None:
    x = noise(3, 4, 9)
    left, right = power_iteration(x, 6)
    assert left.shape == (3, 4, 6) and right.shape == (3, 9, 6)
    torch.testing.assert_close(left @ right.mT, x)


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"bits": 0}, "bits is a whole number from 1"), ({"bits": 17}, "1 to 16 bits"), ({"bits": 2.5}, "whole number"),
        ({"rank": -1}, "rank is a whole number from 0"), ({"buffer": 0}, "buffer is a whole number from 1"),
        ({"group": 0}, "group is a whole number from 1"), ({"group": "all"}, "group is a whole number"),
        ({"outliers": 1.0}, "a share from 0 to below 1"), ({"outliers": float("nan")}, "a share"),
        ({"outliers": "2%"}, "a share"),
    ],
)  # fmt: skip
def test_mistaken_settings_are_refused(settings: dict[str, Any], says: str) -> None:
    with pytest.raises(ValueError, match=says):
        Codec(**settings)


@pytest.mark.parametrize(
    ("codec", "says"),
    [
        (Codec(group=48), "the buffer has 64 numbers, which do not divide into groups of 48"),
        (Codec(group=32), "a head has 8 numbers, which do not divide into groups of 32"),
        (Codec(buffer=2), "the buffer has 2 numbers: .* all be outliers"),
        (Codec(outliers=0.99), "all be outliers"),
    ],
)
def test_codecs_that_do_not_fit_a_model_are_refused(codec: Codec, says: str) -> None:
    with pytest.raises(ValueError, match=says):
        codec.over(KVCache(LAYERS, 1, HEADS, DIM, torch.float64), 1)


# ---- the cache by itself ---------------------------------------------------------------------------------------------

LAYERS, HEADS, DIM = 2, 2, 8


def empty(codec: Codec, batch: int = 1, capacity: int = 4) -> CompressedCache:
    return codec.over(KVCache(LAYERS, batch, HEADS, DIM, torch.float64, capacity=4), capacity)


def fed(cache: CompressedCache, kv: Tensor, sizes: list[int]) -> CompressedCache:
    """Takes in (layers, 2, batch, heads, tokens, dim), so many tokens a forward."""
    start = int(cache.length)  # type: ignore[arg-type]
    for part in kv.split(sizes, 4):
        plan = LinePlan(LineShape(part.shape[4], 0, None), start, 0, 1000)
        cache.begin(plan)
        for layer, (k, v) in enumerate(part):
            cache.append(layer, k, v)
        cache.commit(part.shape[4], plan)
        start += part.shape[4]
    return cache


def read(cache: CompressedCache, layer: int) -> Tensor:
    """Keys and values of a layer, (2, batch, heads, columns, dim)."""
    plan = LinePlan(LineShape(1, 0, None), int(cache.columns), 0, 1000)
    cache.begin(plan)
    new = torch.zeros(cache.batch, HEADS, 1, DIM, dtype=torch.float64)
    return torch.stack(cache.append(layer, new, new))[..., :-1, :]


def entries(tokens: int, batch: int = 1, seed: int = 0) -> Tensor:
    return noise(LAYERS, 2, batch, HEADS, tokens, DIM, seed=seed).double()


def test_what_is_in_the_buffer_is_exact_to_the_bit_until_it_is_full() -> None:
    kv, cache = entries(9), empty(Codec(2, buffer=8))
    fed(cache, kv[..., :7, :], [1] * 7)
    assert not cache.behind and all(torch.equal(read(cache, i), kv[i, ..., :7, :]) for i in range(LAYERS))
    fed(cache, kv[..., 7:8, :], [1])
    assert cache.behind == 8 and cache.latest.columns == 0
    assert not torch.allclose(read(cache, 0), kv[0, ..., :8, :], atol=0.1)
    fed(cache, kv[..., 8:, :], [1])
    assert torch.equal(read(cache, 1)[..., 8:, :], kv[1, ..., 8:, :])


def test_token_by_token_is_in_parts_is_at_once() -> None:
    kv = entries(37)
    ways = [[1] * 37, [3, 7, 20, 7], [37], [8, 8, 8, 8, 5], [9, 28]]
    caches = [fed(empty(Codec(3, rank=1, buffer=8)), kv, sizes) for sizes in ways]
    for cache in caches:
        assert cache.columns == cache.length == 37 and cache.behind == 32
        for layer in range(LAYERS):
            assert torch.equal(read(cache, layer), read(caches[0], layer))


def test_a_block_is_what_the_codec_makes_of_it() -> None:
    kv, codec = entries(16), Codec(4, buffer=8)
    got = read(fed(empty(codec), kv, [16]), 1)
    for i, along in enumerate((KEYS, VALUES)):
        blocks = kv[1, i].unflatten(2, (2, 8))
        assert torch.equal(got[i], codec.decode(codec.encode(blocks, along), along, torch.float64).flatten(2, 3))


def test_rows_of_a_batch_do_not_meet() -> None:
    kv = entries(20, batch=3)
    together = fed(empty(Codec(2, buffer=8), 3), kv, [5, 15])
    for row in range(3):
        alone = fed(empty(Codec(2, buffer=8)), kv[:, :, row : row + 1], [20])
        for layer in range(LAYERS):
            torch.testing.assert_close(
                read(together, layer)[:, row : row + 1], read(alone, layer), rtol=1e-9, atol=1e-9
            )


@pytest.mark.parametrize("codec", [Codec(2), Codec(4, 4, 0.0, 0), Codec(3, **L), Codec(16, **S), Codec(4, rank=3)])
def test_bytes_that_are_counted_are_bytes_that_are_stored(codec: Codec) -> None:
    """The tensors' own bytes, where no room is left over; and the formula: bits, two bounds a group, two factors, and
    outliers with places of a byte (GEAR, section 4)."""
    cache = fed(empty(codec, 2, 128), entries(130, 2), [130])
    stored = sum(x.untyped_storage().nbytes() for x in cache._kept)
    exact = 2 * LAYERS * 2 * HEADS * DIM * 2 * 8
    assert cache.nbytes() == stored + exact
    assert sum(cache.sizes().values()) == cache.nbytes() and cache.sizes()["exact"] == exact
    bits = 0.0
    for vector, across in ((64, DIM), (DIM, 64)):  # of keys, of values: along tokens, along channels
        group = codec.group or vector
        bits += codec.bits + 2 * 16 / group + 16 * codec.rank * (vector + across) / (vector * across)
        bits += 2 * codec.extremes(vector) / vector * (16 + 8)
    numbers = LAYERS * 2 * 128 * HEADS * DIM  # of keys, and as many values
    assert stored == round(numbers * bits / 8)


def test_shorter_rows_count_what_they_hold() -> None:
    cache = fed(empty(Codec(2, buffer=8)), entries(24), [24])
    longer = cache.nbytes()
    other = fed(empty(Codec(2, buffer=8)), entries(8, seed=1), [8])
    shorter = other.nbytes()
    cache.join([other])
    assert cache.nbytes() == longer + shorter == 4 * shorter
    cache.select(torch.tensor([1, 1, -1]))
    assert cache.nbytes() == 2 * shorter


def test_joined_rows_keep_their_places_where_buffers_hold_equally_many() -> None:
    """Of 9 and of 17 tokens in blocks of 8, one is exact: at place 8, and at place 16."""
    cache = fed(empty(Codec(2, buffer=8)), entries(9), [9])
    cache.join([fed(empty(Codec(2, buffer=8)), entries(17), [17])])
    assert cache.length.tolist() == [9, 17] and cache.columns == 17  # type: ignore[union-attr]
    view = cache.labels("all")
    assert view is not None and view.lane is not None
    for row, places in enumerate(([*range(8), 8], [*range(16), 16])):
        assert view.at.expand(2, -1)[row][view.lane[row] >= 0].tolist() == places


def test_the_buffer_gives_back_what_a_long_forward_took() -> None:
    cache = fed(empty(Codec(2, buffer=8), capacity=64), entries(67), [67])
    assert cache.length == 67 and cache.latest.columns == 3 and cache.latest.buffer.shape[4] == 4


def test_evicting_and_skipping_layers_are_refused() -> None:
    cache = fed(empty(Codec(2, buffer=8)), entries(9), [9])
    with pytest.raises(ValueError, match="cannot be forgotten entry by entry"):
        cache.evict(torch.tensor([[0, 1]]))
    plan = LinePlan(LineShape(1, 0, None), 9, 0, 100)
    plan.__dict__["layers"] = torch.ones(LAYERS, 1, dtype=torch.bool)
    with pytest.raises(OrderError, match="use the exact cache"):
        cache.begin(plan)
    with pytest.raises(ValueError, match=r"slot 1 cannot be kept"):
        read(cache, 0)
        cache.commit(2, LinePlan(LineShape(1, 0, None), 9, 0, 100))


def test_layers_that_are_let_go_and_come_back_are_empty() -> None:
    kv = entries(12)
    cache = fed(empty(Codec(2, buffer=8)), kv, [12])
    before = read(cache, 1)
    cache.hold((1,))
    assert (
        torch.equal(read(cache, 1), before) and cache.nbytes() * 2 == fed(empty(Codec(2, buffer=8)), kv, [12]).nbytes()
    )
    cache.hold((0, 1))
    assert torch.equal(read(cache, 1), before) and not read(cache, 0).any()


def test_a_compiled_step_knows_of_a_layer_what_the_cache_knows() -> None:
    kv, cache = entries(11), empty(Codec(2, buffer=8))
    fed(cache, kv[..., :10, :], [10])
    plan = LinePlan(LineShape(1, 0, None), 10, 0, 1000)
    cache.begin(plan)
    got = cache.entry(1).append(1, *kv[1, ..., 10:, :])
    want = cache.append(1, *kv[1, ..., 10:, :])
    assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))
    cache.commit(1, plan)
    assert torch.equal(read(cache, 1)[..., 8:, :], kv[1, ..., 8:, :])
