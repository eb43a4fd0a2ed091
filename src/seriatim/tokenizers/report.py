"""How good a tokenizer of pictures is: what it loses, and how much of its vocabulary it uses."""

from __future__ import annotations

import math

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional as F

from seriatim.tokenizers.base import PictureTokenizer
from seriatim.tokenizers.losses import FeatureMaps, feature_distance
from seriatim.tokenizers.quantizers import usage


@torch.no_grad()
def report(
    tokenizer: PictureTokenizer,
    images: Float[Tensor, "n c h w"],
    features: FeatureMaps | None = None,
    batch: int = 64,
) -> dict[str, float]:
    """Figures of a tokenizer on held-out pictures in [-1, 1].

    Always: `pictures`, `elements` a picture, `psnr` (dB, from the squared error over all pictures; inf where nothing is
    lost), `ssim` (mean over pictures). With a vocabulary: `vocab`, `codes_used`, `codebook_usage` (their share of the
    vocabulary, at most ids / vocab), `perplexity` (exp of the entropy of their shares), `bits_per_pixel` (ids written
    plainly). Without: `deviation` of the latents. With `features`, a network's maps: `feature_distance`, as
    `losses.feature_distance`. Raises ValueError for no pictures, or pictures of another shape.
    """
    if len(images) == 0:
        raise ValueError("a report needs at least one picture")
    codes, errors, likeness, distances = [], [], [], []
    for part in images.split(batch):
        code = tokenizer.encode(part)
        drawn = tokenizer.decode(code)
        codes.append(code)
        errors.append((drawn - part).double().square().flatten(1).mean(1))
        likeness.append(ssim(drawn, part))
        if features is not None:
            distances.append(feature_distance(features, drawn, part))
    code = torch.cat(codes)
    error = torch.cat(errors).mean().item()
    figures = {"pictures": float(len(images)), "elements": float(code.shape[1])}
    figures["psnr"] = math.inf if error == 0 else 10 * math.log10(4 / error)
    figures["ssim"] = torch.cat(likeness).mean().item()
    if tokenizer.vocab is not None:
        said = usage(code)
        bits = math.log2(tokenizer.vocab) * code[0].numel() / (images.shape[2] * images.shape[3])
        figures |= {"vocab": float(tokenizer.vocab), "codes_used": float(said["used"])}
        figures |= {"codebook_usage": float(said["used"]) / tokenizer.vocab, "perplexity": float(said["perplexity"])}
        figures["bits_per_pixel"] = bits
    else:
        figures["deviation"] = code.double().std().item()
    if distances:
        figures["feature_distance"] = torch.cat(distances).mean().item()
    return figures


def ssim(images: Float[Tensor, "n c h w"], originals: Float[Tensor, "n c h w"]) -> Float[Tensor, " n"]:
    """Structural similarity of pictures in [-1, 1], averaged over channels and places: 1 for equal ones.

    Source: Wang et al. 2004, "Image Quality Assessment: From Error Visibility to Structural Similarity": Gaussian
    window of 11 pixels (the largest odd number that fits, in smaller pictures) and deviation 1.5, K = (0.01, 0.03),
    only windows that lie inside the picture. Raises ValueError for pictures of different shapes.
    """
    if images.shape != originals.shape:
        raise ValueError(f"pictures and originals differ in shape: {tuple(images.shape)}, {tuple(originals.shape)}")
    size = min(11, *(s - 1 + s % 2 for s in images.shape[2:]))
    place = torch.arange(size, dtype=torch.float64, device=images.device) - (size - 1) / 2
    window = torch.exp(-place.square() / (2 * 1.5**2))
    window = window / window.sum()

    def blurred(x: Tensor) -> Tensor:
        rows = F.conv2d(x.flatten(0, 1)[:, None], window.view(1, 1, size, 1))
        return F.conv2d(rows, window.view(1, 1, 1, size)).unflatten(0, x.shape[:2])[:, :, 0]

    x, y = (images.double() + 1) / 2, (originals.double() + 1) / 2
    mean_x, mean_y = blurred(x), blurred(y)
    var_x, var_y = blurred(x * x) - mean_x**2, blurred(y * y) - mean_y**2
    both = blurred(x * y) - mean_x * mean_y
    light, contrast = 0.01**2, 0.03**2
    score = (2 * mean_x * mean_y + light) * (2 * both + contrast)
    score = score / ((mean_x**2 + mean_y**2 + light) * (var_x + var_y + contrast))
    return score.flatten(1).mean(1)
