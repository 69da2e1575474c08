"""How weights are learned: one network, or a supernet whose candidates share them."""

from espalier.train.evaluate import evaluate, recalibrate, set_statistics
from espalier.train.fit import fit
from espalier.train.loop import Diverged, Progress
from espalier.train.recipe import Recipe
from espalier.train.supernet import train_supernet

__all__ = [
    "Diverged",
    "Progress",
    "Recipe",
    "evaluate",
    "fit",
    "recalibrate",
    "set_statistics",
    "train_supernet",
]
