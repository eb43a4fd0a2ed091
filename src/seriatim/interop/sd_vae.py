"""The autoencoder of Stable Diffusion (Rombach et al. 2022; Hub stabilityai/sd-vae-ft-ema, -mse; facebook/DiT-XL-2-256)
by our names, as the library diffusers stores it.

Facts: the body is that of latent diffusion, of widths 1, 2, 4, 4; only its middles attend; a linear map of attention
stands where others have a convolution. Latents are multiplied by 0.18215.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from seriatim.interop.vqgan import body_of
from seriatim.tokenizers.kl import KLConfig

SCALE = 0.18215  # of latents
MIDDLE = {
    "resnets.0": "block_1", "resnets.1": "block_2", "attentions.0.group_norm": "attn_1.norm",
    "attentions.0.to_q": "attn_1.q", "attentions.0.to_k": "attn_1.k", "attentions.0.to_v": "attn_1.v",
    "attentions.0.to_out.0": "attn_1.proj_out", "attentions.0.query": "attn_1.q", "attentions.0.key": "attn_1.k",
    "attentions.0.value": "attn_1.v", "attentions.0.proj_attn": "attn_1.proj_out",
}  # fmt: skip


def is_sd_vae(weights: Mapping[str, Tensor]) -> bool:
    return {"encoder.down_blocks.0.resnets.0.conv1.weight", "post_quant_conv.weight"} <= weights.keys()


def sd_vae_of(weights: Mapping[str, Tensor], side: int, patch: int) -> tuple[KLConfig, dict[str, Tensor]]:
    """Config and weights of the autoencoder, for pictures of so many pixels a side, whose vectors are patches of so
    many latents a side."""
    levels = 1 + max(int(name.split(".")[2]) for name in weights if name.startswith("encoder.down_blocks."))
    widths = [len(weights[f"encoder.down_blocks.{i}.resnets.1.conv2.weight"]) for i in range(levels)]
    config = KLConfig(
        side=side, channels=weights["encoder.conv_in.weight"].shape[1],
        dim=weights["post_quant_conv.weight"].shape[1], body="residual", width=widths[0], halvings=levels - 1,
        attends="middle", multipliers=tuple(w // widths[0] for w in widths), patch=patch,
    )  # fmt: skip
    named = {_published(name, levels): _map(name, x) for name, x in weights.items()}
    return config, body_of(named) | {"scale": torch.tensor(SCALE)}


def _map(name: str, x: Tensor) -> Tensor:
    """Matrices of attention as convolutions of one pixel."""
    return x[..., None, None] if "attentions" in name and x.dim() == 2 else x


def _published(name: str, levels: int) -> str:
    """The name that latent diffusion published a tensor under."""
    side, _, rest = name.partition(".")
    if rest.startswith("mid_block."):
        inner = rest.removeprefix("mid_block.")
        part = next((p for p in MIDDLE if inner.startswith(p + ".")), "")
        return f"{side}.mid.{MIDDLE.get(part, part)}{inner[len(part) :]}"
    words = rest.split(".")
    if words[0] in ("down_blocks", "up_blocks"):
        up = words[0] == "up_blocks"
        level = levels - 1 - int(words[1]) if up else int(words[1])
        kind = "up" if up else "down"
        if words[2] == "resnets":
            inner = ".".join(words[4:]).replace("conv_shortcut", "nin_shortcut")
            return f"{side}.{kind}.{level}.block.{words[3]}.{inner}"
        return f"{side}.{kind}.{level}.{kind}sample.{'.'.join(words[4:])}"
    return f"{side}.{rest}".replace("conv_norm_out", "norm_out")
