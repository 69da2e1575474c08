"""Pruning by gradient: gates on the units of a trained model learn with its weights, within limits.

It is `solvers.relax` on a model whose channels carry masks; its slots are the gates, the rule, terms of
the loss and the budget. `dsa`, `pas` and `bip` are choices of them.
"""

from espalier.solvers.prune.binary import BinaryUnits as BinaryUnits
from espalier.solvers.prune.budget import Budget as Budget
from espalier.solvers.prune.budget import Capped as Capped
from espalier.solvers.prune.gates import UnitGates as UnitGates
from espalier.solvers.prune.methods import bip as bip
from espalier.solvers.prune.methods import dsa as dsa
from espalier.solvers.prune.methods import pas as pas
from espalier.solvers.prune.pricing import budgeted as budgeted
from espalier.solvers.prune.pricing import sparse_budget as sparse_budget
from espalier.solvers.prune.rules import Descent as Descent
from espalier.solvers.prune.selection import Settled as Settled
from espalier.solvers.prune.soft import SoftThreshold as SoftThreshold
from espalier.solvers.prune.solve import Pruned as Pruned
from espalier.solvers.prune.solve import prune as prune
from espalier.solvers.prune.terms import Consensus as Consensus
from espalier.solvers.prune.terms import Narrowing as Narrowing
from espalier.solvers.prune.terms import Original as Original
from espalier.solvers.prune.topk import TopUnits as TopUnits
