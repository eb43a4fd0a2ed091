"""Generators of pictures that researchers publish, from their files: which they are is told by the names in them."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from seriatim.interop import acdit as acdit_files
from seriatim.interop import arflow as arflow_files
from seriatim.interop import d_ar as dar_files
from seriatim.interop import detailflow as detail_files
from seriatim.interop import elm as elm_files
from seriatim.interop import flexvar as flex_files
from seriatim.interop import hi_mar as himar_files
from seriatim.interop import hmar as hmar_files
from seriatim.interop import llamagen, sd_vae
from seriatim.interop import m_var as mvar_files
from seriatim.interop import mar as mar_files
from seriatim.interop import nar as nar_files
from seriatim.interop import var as var_files
from seriatim.interop import xar as xar_files
from seriatim.interop.pickled import read_pickled, read_safe
from seriatim.systems.image import (
    acdit,
    arflow,
    d_ar,
    detailflow,
    elm,
    flexvar,
    hi_mar,
    hmar,
    m_var,
    mar,
    nar,
    raster_ar,
    sar,
    xar,
)
from seriatim.systems.image.var import VAR, Config
from seriatim.systems.system import Sampling, System
from seriatim.tokenizers.detail import DetailTokenizer
from seriatim.tokenizers.flexible import FlexTokenizer
from seriatim.tokenizers.kl import KLTokenizer
from seriatim.tokenizers.multiscale import MultiScaleTokenizer
from seriatim.tokenizers.vq import VQTokenizer

SUFFIXES = (".pth", ".pt", ".bin", ".ckpt", ".th")


def load_published_images(path: Path) -> System:
    """The system of a released file, its tokenizer from another file beside it, sampled as published. Raises
    FileNotFoundError where the tokenizer is missing, ValueError for files of something else."""
    weights = read_pickled(path)
    for known, read in READERS:
        if known(weights):
            return read(weights, path).eval().requires_grad_(False)
    if var_files.is_var_tokenizer(weights):
        raise ValueError(f"{path} is the tokenizer of VAR: load the generator beside it, such as var_d16.pth")
    if llamagen.is_llamagen_tokenizer(weights):
        raise ValueError(f"{path} is a tokenizer of LlamaGen: load the generator beside it, such as c2i_B_256.pt")
    if dar_files.is_d_ar_tokenizer(weights) or detail_files.is_detail_tokenizer(weights):
        raise ValueError(f"{path} is a tokenizer of D-AR or DetailFlow: load the generator beside it")
    if elm_files.is_bae(weights) or mar_files.is_kl(weights) or sd_vae.is_sd_vae(weights):
        raise ValueError(f"{path} is an autoencoder: load the generator beside it, such as checkpoint-last.pth of MAR")
    names = ", ".join(sorted(weights)[:3])
    raise ValueError(f"{path} holds weights of something that is not read here ({names}, ...)")


def _var(weights: Mapping[str, Tensor], path: Path) -> System:
    """VAR d16 to d36."""
    tokenizer = _var_tokenizer(weights, path)
    system = VAR(Config(tokenizer.config, dropout=0.0, **var_files.sizes_of(weights)), tokenizer)
    return _pyramid(system, var_files.named_var(weights), path)


def _mvar(weights: Mapping[str, Tensor], path: Path) -> System:
    """M-VAR d16 to d32."""
    tokenizer, sizes = _var_tokenizer(weights, path), mvar_files.sizes_of(weights)
    system = m_var.MVAR(m_var.Config(tokenizer.config, dropout=0.0, **sizes), tokenizer)  # type: ignore[arg-type]
    return _pyramid(system, mvar_files.named_mvar(weights), path)


def _hmar(weights: Mapping[str, Tensor], path: Path) -> System:
    """HMAR d16 to d30, with its mask passes."""
    tokenizer, sizes = _var_tokenizer(weights, path), hmar_files.sizes_of(weights)
    shape = hmar.Config(tokenizer.config, dropout=0.0, reaching=True, **sizes)  # type: ignore[arg-type]
    system = hmar.HMAR(shape, tokenizer)
    _fill(system.model, hmar_files.named_hmar(weights), path, ("embed.quantizer",))
    top_k, guidance = hmar_files.SETTINGS.get(sizes["depth"], hmar_files.SETTINGS[16])
    system.sampling = Sampling(top_k=top_k, top_p=0.99, guidance=guidance)  # type: ignore[misc]
    return system


def _var_tokenizer(weights: Mapping[str, Tensor], path: Path) -> MultiScaleTokenizer:
    """The tokenizer beside the file of a generator, for the scales of that."""
    found = _beside(path, var_files.is_var_tokenizer, "vae_ch160v4096z32.pth")
    config, named = var_files.multiscale_of(found, var_files.scales_of(weights))
    tokenizer = MultiScaleTokenizer(config)
    _fill(tokenizer, named | {"uses": tokenizer.uses}, path, ("picture_loss",))
    return tokenizer.eval()


def _pyramid(system: System, named: Mapping[str, Tensor], path: Path) -> System:
    """A generator with its weights; top-k 900 and top-p 0.96 are those of the released figures."""
    _fill(system.model, named, path, ("embed.quantizer",))
    system.sampling = Sampling(top_k=900, top_p=0.96, guidance=1.5)  # type: ignore[misc]
    return system


def _flexvar(weights: Mapping[str, Tensor], path: Path) -> System:
    """FlexVAR d16 to d24, or SAR where the file is named so: weights tell no difference."""
    config, named = flex_files.flexible_of(_beside(path, llamagen.is_llamagen_tokenizer, "FlexVAE.pth"))
    tokenizer = FlexTokenizer(config)
    _fill(tokenizer, named, path, ("picture_loss", "uses"))
    sizes, further = flex_files.sizes_of(weights), path.stem.lower().startswith("sar")
    cls: Any = sar.SAR if further else flexvar.FlexVAR
    system: System = cls(cls.Config(scales=config.scales, dropout=0.0, **sizes), tokenizer.eval())
    _fill(system.model, flex_files.named_flexvar(weights), path, ("embed.quantizer",))
    guidance = flex_files.GUIDANCE.get(sizes["depth"], 2.5) if further else 2.5
    system.sampling = Sampling(top_k=900, top_p=0.95, guidance=guidance)  # type: ignore[misc]
    return system


def _llamagen(weights: Mapping[str, Tensor], path: Path) -> System:
    """LlamaGen B to 3B by class, for 24 ids a side where the name of the file says 384, else 16; all ids may be drawn,
    as for the released figures. D-AR's where the file is named so: weights tell no difference."""
    if path.stem.lower().startswith("d-ar"):
        return _d_ar(weights, path)
    sizes, grid = llamagen.sizes_of(weights), 24 if "384" in path.stem else 16
    shape = raster_ar.Config(side=grid, form="llama", dropout=0.0, **sizes)  # type: ignore[arg-type]
    system = raster_ar.RasterAR(shape, _vq(path, grid))
    _fill(system.model, llamagen.named_llamagen(weights), path)
    guidance = llamagen.GUIDANCE.get(sizes["width"], 1.75) - 1
    system.sampling = Sampling(top_p=None, guidance=guidance)  # type: ignore[misc]
    return system


def _d_ar(weights: Mapping[str, Tensor], path: Path) -> System:
    """D-AR-L and XL, for pictures of 16 patches a side; guidance grows along the line."""
    found = _beside(path, dar_files.is_d_ar_tokenizer, "D-AR-tokenizer_v1.pt")
    tokenizer = dar_files.d_ar_of(found, 16 * found["patchify.weight"].shape[-1])
    (groups, size), (begin, guidance) = tokenizer.grid, dar_files.GUIDANCE
    shape = d_ar.Config(
        groups, size, dropout=0.0, form="llama", guided_from=begin, **llamagen.sizes_of(weights)  # type: ignore[arg-type]
    )  # fmt: skip
    system = d_ar.DAR(shape, tokenizer)
    _fill(system.model, llamagen.named_llamagen(weights), path)
    system.sampling = Sampling(guidance=guidance)  # type: ignore[misc]
    return system


def _detailflow(weights: Mapping[str, Tensor], path: Path) -> System:
    """DetailFlow's GPT-L, for as many ids as its tokenizer makes."""
    group = detail_files.group_of(weights)
    config, named = detail_files.detail_of(_beside(path, detail_files.is_detail_tokenizer, "tokenizer.pt"), group)
    tokenizer = DetailTokenizer(config)
    _fill(tokenizer, named, path, ("picture_loss", "uses"))
    shape = detailflow.Config(
        config.queries // group, group, dropout=0.0, form="llama", **llamagen.sizes_of(weights)  # type: ignore[arg-type]
    )  # fmt: skip
    system = detailflow.DetailFlow(shape, tokenizer.eval())
    _fill(system.model, detail_files.named_detailflow(weights), path)
    system.sampling = Sampling(guidance=detail_files.GUIDANCE.get(config.queries, 0.5))  # type: ignore[misc]
    return system


def _elm(weights: Mapping[str, Tensor], path: Path) -> System:
    """ELM's L to 2B that write row by row, for 16 ids a side."""
    found, sizes = _beside(path, elm_files.is_bae, "binaryae_ema.th"), elm_files.sizes_of(weights)
    tokenizer = elm_files.bae_of(found)
    shape = elm.Config(side=elm_files.SIDE, dropout=0.0, form="llama", **sizes)  # type: ignore[arg-type]
    if 2**shape.bits != tokenizer.vocab:
        raise ValueError(
            f"{path} writes ids of {shape.bits} bits, and the autoencoder beside it has {tokenizer.vocab:,} ids"
        )
    system = elm.ELM(shape, tokenizer)
    _fill(system.model, elm_files.named_elm(weights), path)
    top_k = min(elm_files.TOP_K, shape.vocab)
    system.sampling = Sampling(top_k=top_k, guidance=elm_files.GUIDANCE)  # type: ignore[misc]
    return system


def _nar(weights: Mapping[str, Tensor], path: Path) -> System:
    """NAR by class, 16 ids a side; all ids may be drawn, as for the released figures."""
    shape = nar.Config(side=16, form="llama", dropout=0.0, **nar_files.sizes_of(weights))  # type: ignore[arg-type]
    system = nar.NAR(shape, _vq(path, 16))
    _fill(system.model, nar_files.named_nar(weights), path)
    system.sampling = Sampling(guidance=1.0)  # type: ignore[misc]
    return system


def _vq(path: Path, grid: int) -> VQTokenizer:
    """LlamaGen's tokenizer beside the file of a generator, for so many ids a side."""
    config, named = llamagen.vq_of(_beside(path, llamagen.is_llamagen_tokenizer, "vq_ds16_c2i.pt"), grid)
    tokenizer = VQTokenizer(config)
    _fill(tokenizer, named, path, ("picture_loss", "uses"))
    return tokenizer.eval()


def _mar(weights: Mapping[str, Tensor], path: Path) -> System:
    """MAR-B, L and H: an element a step, 100 steps of diffusion each, as for the released figures."""
    sizes = mar_files.sizes_of(weights)
    tokenizer = _kl16(path, sizes["side"])
    system = mar.MAR(mar.Config(dropout=0.0, head_steps=100, head_clip=None, **sizes), tokenizer)  # type: ignore[arg-type]
    _fill(system.model, mar_files.named_mar(weights), path)
    guidance = mar_files.GUIDANCE.get(sizes["width"], 3.0) - 1
    system.sampling = Sampling(guidance=guidance, steps=sizes["side"] ** 2)  # type: ignore[misc]
    return system


def _himar(weights: Mapping[str, Tensor], path: Path) -> System:
    """Hi-MAR-B, L and H: 32 steps of pivots, 100 steps of diffusion each, then 4 or 12 of the map, 250 each."""
    sizes = himar_files.sizes_of(weights)
    first, then, steps = himar_files.SAMPLED.get(sizes["width"], himar_files.SAMPLED[768])
    config = hi_mar.Config(
        dropout=0.0, head_steps=100, map_steps=250, head_clip=None, form="released",
        pivot_guidance=(first - 1) / (then - 1), **sizes,  # type: ignore[arg-type]
    )  # fmt: skip
    system = hi_mar.HiMAR(config, _kl16(path, sizes["side"]))
    _fill(system.model, himar_files.named_himar(weights), path)
    system.sampling = Sampling(guidance=then - 1, steps=steps)  # type: ignore[misc]
    return system


def _xar(weights: Mapping[str, Tensor], path: Path) -> System:
    """xAR-B, L and H: four cells."""
    sizes = xar_files.sizes_of(weights)
    tokenizer = _kl16(path, sizes["side"])
    system = xar.XAR(xar.Config(form="released", cell=sizes["side"] // 2, **sizes), tokenizer)  # type: ignore[arg-type]
    _fill(system.model, xar_files.named_xar(weights, system.model), path)  # type: ignore[arg-type]
    steps, guidance = xar_files.SAMPLED.get(sizes["width"], xar_files.SAMPLED[768])
    system.sampling = Sampling(guidance=guidance - 1, steps=steps)  # type: ignore[misc]
    return system


def _acdit(weights: Mapping[str, Tensor], path: Path) -> System:
    """ACDiT-XL and H of pictures: 25 steps of each block. Raises ValueError for those of videos."""
    shape = acdit_files.shape_of(asked := acdit_files.asked(path))
    if shape["frames"] > 1 or shape["split"] not in (None, (1, 1)):
        raise ValueError(f"{path} generates latents of videos: seriatim.interop.acdit.read_acdit reads its model")
    block = math.isqrt(shape["block"])
    config = acdit.Config(side=shape["side"], block=(block, block), form="released", **acdit_files.sizes_of(weights))
    system = acdit.ACDiT(config, _stable(path, asked["image_size"], asked["patch_size"]))
    _fill(system.model, acdit_files.named_acdit(weights), path)
    system.sampling = Sampling(guidance=0.5, steps=25)  # type: ignore[misc]
    return system


def _arflow(weights: Mapping[str, Tensor], path: Path) -> System:
    """ARFlow B to XL: 250 steps, guidance of three channels of four."""
    sizes = arflow_files.sizes_of(weights)
    patch = sizes.pop("patch")
    config = arflow.Config(dim=sizes["channels"] * patch**2, form="released", **sizes)  # type: ignore[arg-type]
    system = arflow.ARFlow(config, _stable(path, 8 * patch * sizes["side"], patch))
    _fill(system.model, arflow_files.named_arflow(weights), path)
    system.sampling = Sampling(guidance=3.5, steps=250)  # type: ignore[misc]
    return system


def _stable(path: Path, side: int, patch: int) -> KLTokenizer:
    """The autoencoder of Stable Diffusion beside the file of a generator."""
    found = _beside(path, sd_vae.is_sd_vae, "diffusion_pytorch_model.safetensors")
    config, named = sd_vae.sd_vae_of(found, side, patch)
    tokenizer = KLTokenizer(config)
    _fill(tokenizer, named, path, ("picture_loss", "sums"))
    return tokenizer.eval()


def _kl16(path: Path, grid: int) -> KLTokenizer:
    """The autoencoder of MAR beside the file of a generator."""
    config, named = mar_files.kl_of(_beside(path, mar_files.is_kl, "kl16.ckpt"), grid)
    tokenizer = KLTokenizer(config)
    _fill(tokenizer, named, path, ("picture_loss", "sums"))
    return tokenizer.eval()


Reader = tuple[Callable[[Mapping[str, Tensor]], bool], Callable[[Mapping[str, Tensor], Path], System]]
READERS: tuple[Reader, ...] = (
    (hmar_files.is_hmar, _hmar),
    (mvar_files.is_mvar, _mvar),
    (var_files.is_var, _var),
    (flex_files.is_flexvar, _flexvar),
    (nar_files.is_nar, _nar),
    (detail_files.is_detailflow, _detailflow),
    (llamagen.is_llamagen, _llamagen),
    (elm_files.is_elm, _elm),
    (himar_files.is_himar, _himar),
    (mar_files.is_mar, _mar),
    (xar_files.is_xar, _xar),
    (acdit_files.is_acdit, _acdit),
    (arflow_files.is_arflow, _arflow),
)


def _beside(path: Path, known: Callable[[Mapping[str, Tensor]], bool], usual: str) -> dict[str, Tensor]:
    """The weights of the tokenizer that stands in the folder of a file: under its usual name, or the only other one.
    Raises ValueError where there are several, of which none has that name."""
    kinds = (*SUFFIXES, ".safetensors")
    others = [p for p in sorted(path.parent.iterdir()) if p.suffix in kinds and p.name != path.name]
    named = [p for p in others if p.name == usual] or others
    found: dict[Path, dict[str, Tensor]] = {}
    for other in named if len(named) < 4 else ():
        weights = read_safe(other) if other.suffix == ".safetensors" else read_pickled(other)
        if known(weights):
            found[other] = weights
    if len(found) > 1:
        names = ", ".join(p.name for p in found)
        raise ValueError(f"beside {path} stand several tokenizers ({names}): call the one that is meant {usual}")
    if not found:
        raise FileNotFoundError(f"{path} needs its tokenizer beside it: put {usual} into {path.parent}")
    return next(iter(found.values()))


def _fill(module: nn.Module, named: Mapping[str, Tensor], path: Path, without: tuple[str, ...] = ()) -> None:
    """Weights by our names into a part, those that they do not hold left as they are (`without`). Raises ValueError for
    weights that are missing, left over or of other shapes."""
    own: dict[str, Any] = {n: x for n, x in module.state_dict().items() if not n.startswith(without or ("\0",))}
    wrong = sorted(set(named) ^ set(own)) or [n for n, x in own.items() if named[n].shape != x.shape]
    if wrong:
        raise ValueError(f"{path} does not hold the weights that its names promise: {', '.join(wrong[:3])}")
    with torch.no_grad():
        module.load_state_dict({n: x.to(own[n].dtype) for n, x in named.items()}, strict=False, assign=True)
