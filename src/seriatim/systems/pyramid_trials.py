"""Trials of pyramid systems, as claims state them: what comes of skipped or refined scales, or of fewer layers."""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch

from seriatim.systems.system import Sampling

SAMPLES = 620  # ten of each of 62 glyphs


def fd_s(system: Any, data: Any, sampling: Sampling, seed: int = 0, samples: int = SAMPLES) -> dict[str, Any]:
    """Quality of so many pictures, evenly of all classes (`evaluation.quality`)."""
    from seriatim.evaluation.quality import picture_quality
    from seriatim.verbs.evaluate import features_of

    labels = torch.arange(samples) % max(len(data.classes), 1)
    pictures = system.draw(labels, sampling=sampling, seed=seed)
    return dict(picture_quality(pictures.images, labels if data.classes else None, data, features_of(data)))


def skipping(trained: Any, samples: int = SAMPLES) -> Mapping[str, Any]:
    """FD-s of a pyramid system with all its scales and with each inner one left out, and the geometric mean of what
    that costs (`skip_ratio`)."""
    system, data = trained.system, trained.data
    scales = system.config.scales if hasattr(system.config, "scales") else system.config.tokenizer.scales
    seed = trained_seed(trained)
    whole = fd_s(system, data, system.sampling, seed, samples)["fd_s"]
    figures: dict[str, Any] = {"fd_s": whole}
    for k in range(1, len(scales) - 1):
        rest = scales[:k] + scales[k + 1 :]
        if hasattr(system.config, "scales"):
            said = fd_s(system, data, replace(system.sampling, scales=rest), seed, samples)
        else:
            said = fd_s(without_scale(system, k), data, system.sampling, seed, samples)
        figures[f"fd_s_without_{scales[k]}"] = said["fd_s"]
    ratios = [math.log(x / whole) for name, x in figures.items() if name.startswith("fd_s_without")]
    return {**figures, "skip_ratio": math.exp(sum(ratios) / len(ratios))}


def trained_seed(trained: Any) -> int:
    """The seed of a training, for sampling with another one in each arm."""
    from seriatim.training.run import RunFolder

    return int(RunFolder(trained.folder).read_card()["recipe"]["seed"])


def without_scale(system: Any, k: int) -> Any:
    """A system over the residual pyramid that skips its scale k: neither drawn, nor told, nor added to the picture."""
    tokenizer = copy.deepcopy(system.tokenizer)
    q = tokenizer.quantizer
    begin = sum(q.sizes[:k])
    rows = torch.cat([torch.arange(begin), torch.arange(begin + q.sizes[k], q.total)])
    weights = dict(system.model.state_dict())
    weights["embed.position"] = weights["embed.position"][rows]
    weights["embed.scale"] = torch.cat([weights["embed.scale"][:k], weights["embed.scale"][k + 1 :]])
    q.skip(k)
    made = type(system)(system.config, tokenizer)
    made.model.load_state_dict(weights)
    return made.eval().requires_grad_(False)


PASSES = (0, 1, 2, 4)  # mask passes of each scale behind the first


def refined(trained: Any, samples: int = SAMPLES) -> Mapping[str, Any]:
    """FD-s and accuracy by the number of mask passes; `fd_s` is that of the most."""
    system, seed = trained.system, trained_seed(trained)
    figures: dict[str, Any] = {}
    for passes in PASSES:
        said = fd_s(system, trained.data, replace(system.sampling, steps=1 + passes), seed, samples)
        figures |= {f"fd_s_{passes}": said["fd_s"], f"accuracy_{passes}": said.get("accuracy")}
    return {**figures, "fd_s": figures[f"fd_s_{PASSES[-1]}"]}


def both_depths(trained: Any) -> Mapping[str, Any]:
    """Losses of a supernet on held-out pictures, nats an id: at its first depth, with all layers, and their mean."""
    system = trained.system.eval()
    figures = {}
    for name, depth in (("loss_fewer", system.config.depths[0]), ("loss_full", system.config.depth)):
        with torch.inference_mode():
            nats, ids = system.at(depth).score(trained.data.test)
        figures[name] = nats / ids
    return {**figures, "loss_both": sum(figures.values()) / 2}


def exposure_gap(trained: Any, samples: int = 512) -> Mapping[str, Any]:
    """Losses of a SAR on held-out pictures, nats an id behind the first scale: in view of the truth, in view of its own
    predictions (the likeliest ids of one forward), and the gap between them."""
    from seriatim.systems.image.sar import predicted, student_losses
    from seriatim.systems.system import evenly

    system, data = trained.system.eval(), trained.data.test
    model, sums, ids = system.model, {"loss_true": 0.0, "loss_own": 0.0}, 0
    for part in evenly(len(data), samples).split(64):
        canvas, condition = system.canvas(data.take(part))
        plan = model.factorization.packed(canvas)
        with torch.inference_mode():
            encoded = model.encode(condition)
            h = model.hidden(plan, canvas, None, encoded)
            own = model.canvas({"token": predicted(model, plan, canvas, h)}, layout=canvas.layout)
            for name, context in (("loss_true", canvas), ("loss_own", own)):
                sums[name] += float(student_losses(model, plan, context, encoded, canvas).sum())
        ids += int((canvas.layout.coord[:, 0] > 0).sum()) * canvas.batch
    figures = {name: nats / ids for name, nats in sums.items()}
    return {**figures, "gap": figures["loss_own"] - figures["loss_true"]}


def one_pass(system: Any, seed: int, samples: int = SAMPLES) -> Mapping[str, Any]:
    """FD-s and accuracy of glyphs that a pyramid system draws in one forward a scale."""
    from seriatim.data.base import load_data

    said = fd_s(system, load_data("glyphs", "image"), replace(system.sampling, steps=1), seed, samples)
    return {"fd_s": said["fd_s"], "accuracy": said.get("accuracy")}


def costs(system: Any, seed: int) -> Mapping[str, Any]:
    """Counted, at the width of d16 (`evaluation.scale_costs.counted`): by how much keys and values outgrow the state of
    a mixer, and which share of VAR's pairs of attention lies within scales, for pictures of 256 to 1,024 pixels."""
    from seriatim.backbones.mamba import MambaConfig
    from seriatim.evaluation.scale_costs import SCHEDULES, counted

    figures: dict[str, Any] = {}
    for pixels, scales in SCHEDULES.items():
        c = counted(scales, 1024, MambaConfig(1024, 1, state=64))
        figures |= {f"keys_to_state_{pixels}": c.keys / c.state, f"own_pairs_{pixels}": c.own / c.every}
    return figures
