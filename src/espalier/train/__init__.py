"""How weights are learned: one network, or a supernet whose candidates share them."""

from espalier.train.evaluate import evaluate, recalibrate, set_statistics
from espalier.train.fit import fit
from espalier.train.loop import Diverged, Progress
from espalier.train.paths import Fair, Pass, Path, Paths, Sandwich, Uniform
from espalier.train.recipe import Recipe
from espalier.train.sharing import Curriculum
from espalier.train.shift import Shift, Shifting
from espalier.train.shrinking import Shrinking, Stage, Within
from espalier.train.splitting import FewShot, Splitting
from espalier.train.supernet import train_supernet
from espalier.train.together import Together

__all__ = [
    "Curriculum",
    "Diverged",
    "Fair",
    "FewShot",
    "Pass",
    "Path",
    "Paths",
    "Progress",
    "Recipe",
    "Sandwich",
    "Shift",
    "Shifting",
    "Shrinking",
    "Splitting",
    "Stage",
    "Together",
    "Uniform",
    "Within",
    "evaluate",
    "fit",
    "recalibrate",
    "set_statistics",
    "train_supernet",
]
