"""Measuring and showing what was generated."""

from seriatim.evaluation.judge import Judge, JudgeRecipe, nearest_distances, psnr, spread, train_judge
from seriatim.evaluation.pictures import draw_mask, save_curve, save_film, save_grid

__all__ = [
    "Judge",
    "JudgeRecipe",
    "draw_mask",
    "nearest_distances",
    "psnr",
    "save_curve",
    "save_film",
    "save_grid",
    "spread",
    "train_judge",
]
