"""Measuring and showing what was generated."""

from seriatim.evaluation.cost import Fresh, Spent, Timing, drain, fresh_process, parameters, time_interleaved
from seriatim.evaluation.features import (
    Card,
    FeatureModel,
    features_for,
    load_features,
    photo_features,
    save_features,
)
from seriatim.evaluation.judge import Judge, JudgeRecipe, train_judge
from seriatim.evaluation.metrics import (
    Bits,
    Support,
    TextStatistics,
    bits_per_byte,
    bits_per_dimension,
    frechet_distance,
    nearest_distances,
    nearest_examples,
    psnr,
    spread,
    support,
    text_statistics,
)
from seriatim.evaluation.pictures import draw_mask, save_curve, save_film, save_grid
from seriatim.evaluation.quality import picture_quality
from seriatim.evaluation.report import Result, write_report

__all__ = [
    "Bits",
    "Card",
    "FeatureModel",
    "Fresh",
    "Judge",
    "JudgeRecipe",
    "Result",
    "Spent",
    "Support",
    "TextStatistics",
    "Timing",
    "bits_per_byte",
    "bits_per_dimension",
    "drain",
    "draw_mask",
    "features_for",
    "frechet_distance",
    "fresh_process",
    "load_features",
    "nearest_distances",
    "nearest_examples",
    "parameters",
    "photo_features",
    "picture_quality",
    "psnr",
    "save_curve",
    "save_features",
    "save_film",
    "save_grid",
    "spread",
    "support",
    "text_statistics",
    "time_interleaved",
    "train_judge",
    "write_report",
]
