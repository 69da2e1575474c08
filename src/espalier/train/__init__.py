"""How weights are learned: one network, or a supernet whose candidates share them."""

from espalier.train.evaluate import evaluate, recalibrate, set_statistics
from espalier.train.fit import fit
from espalier.train.loop import Diverged, Progress
from espalier.train.paths import Fair, Pass, Path, Paths, Sandwich, Uniform
from espalier.train.recipe import Recipe
from espalier.train.shrinking import Shrinking, Stage, Within
from espalier.train.supernet import train_supernet

__all__ = [
    "Diverged",
    "Fair",
    "Pass",
    "Path",
    "Paths",
    "Progress",
    "Recipe",
    "Sandwich",
    "Shrinking",
    "Stage",
    "Uniform",
    "Within",
    "evaluate",
    "fit",
    "recalibrate",
    "set_statistics",
    "train_supernet",
]
