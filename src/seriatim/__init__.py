"""Seriatim: autoregressive generation in all its forms, from a few shared parts.

Names are loaded on first use, so that `import seriatim` costs nothing.
"""

from __future__ import annotations

import importlib
from typing import Any

__version__ = "0.1.0"

_WHERE = {
    "layout": ("Layout", "Segment", "line", "grid", "pyramid"),
    "canvas": ("Canvas", "Set", "Unset", "Revise", "Remember", "Insert", "Delete", "Truncate", "Grow"),
    "view": ("View", "inclusive", "own_rank", "earlier", "two_stream", "full", "local", "tree", "timed", "join"),
    "plan": ("Plan", "Slots", "Reads", "Cost", "OrderError"),
    "random": ("Generator", "Keyed", "Enumerator", "Forced", "enumerate_law"),
    "model": ("Model", "Rows"),
    "embed": ("TokenEmbed", "CodesEmbed", "VectorEmbed"),
    "embed_kinds": ("ByKind",),
    "factorization.base": ("Factorization",),
    "factorization.line": ("Line",),
    "factorization.static": ("Scales", "Blocks", "AnyOrder"),
    "factorization.insertion": ("Insertion",),
    "backbones.layer": ("TransformerConfig", "Experts"),
    "backbones.transformer": ("Transformer",),
    "backbones.mamba": ("Mamba", "MambaConfig"),
    "backbones.hybrid": ("Hybrid", "HybridConfig"),
    "backbones.compressed": ("Codec",),
    "backbones.relative": ("Relative",),
    "backbones.rope": ("RoPE", "Stretch"),
    "heads.dist": ("Categorical",),
    "heads.categorical": ("CategoricalHead",),
    "heads.depthwise": ("DepthwiseHead",),
    "heads.diffusion": ("DiffusionHead", "DiffusionConfig"),
    "heads.flow": ("FlowHead", "FlowConfig"),
    "heads.group": ("GroupHead",),
    "heads.insertion": ("InsertionHead",),
    "heads.in_place": ("InPlaceHead", "noised", "pure_noise"),
    "conditions.condition": ("Condition", "ClassCondition", "MemoryCondition", "PerElementCondition"),
    "conditions.prefix": ("PrefixCondition",),
    "conditions.text": ("TextEncoder",),
    "decoding.target": ("Target", "Branch"),
    "decoding.policy": ("FreeCache",),
    "decoding.guess": ("Guess",),
    "decoding.guidance": ("Guidance",),
    "decoding.filters": ("Warper",),
    "decoding.loop": ("Step", "decode", "generate"),
    "decoding.sample": ("SampleAll", "Select", "Remask"),
    "decoding.verify": ("GreedyMatch", "Walk", "Chain", "Recursive", "KSeq"),
    "decoding.draft": ("DraftModel", "DraftTree", "NGram"),
    "decoding.growth": ("Dynamic",),
    "decoding.jacobi": ("Window",),
    "decoding.beam": ("Beam",),
    "decoding.grow": ("Growing",),
    "decoding.insert": ("Inserting",),
    "decoding.kinds": ("PerKind",),
    "decoding.solver": ("SolverStep",),
    "training.recipe": ("Recipe",),
    "training.loop": ("fit",),
    "systems.system": ("System", "Sampling"),
    "systems.language_model": ("LanguageModel", "Generation"),
    "systems.published": ("Published",),
    "systems.encoder_decoder": ("EncoderDecoder",),
    "data.base": ("load_data",),
    "verbs.load": ("load",),
    "verbs.train": ("train",),
    "verbs.compare": ("compare",),
    "verbs.evaluate": ("evaluate",),
    "verbs.forecast": ("forecast",),
    "verbs.export": ("export",),
    "verbs.bench": ("bench",),
}
_HOME = {name: module for module, names in _WHERE.items() for name in names}
__all__ = ["__version__", *_HOME]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'seriatim' has no attribute {name!r}")
    return getattr(importlib.import_module(f"seriatim.{_HOME[name]}"), name)


def __dir__() -> list[str]:
    return sorted(__all__)
