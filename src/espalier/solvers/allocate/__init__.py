"""Allocation: harm and costs as sums of factors, and the exact program over them.

`Program(space, harm, costs, limits).solve()` gives the candidate of least harm under every limit.
"""

from espalier.solvers.allocate.factor import Factor as Factor
from espalier.solvers.allocate.factor import totals as totals
from espalier.solvers.allocate.pricing import cost_factors as cost_factors
from espalier.solvers.allocate.profile import Profile as Profile
from espalier.solvers.allocate.profile import profile as profile
from espalier.solvers.allocate.program import Program as Program
from espalier.solvers.allocate.program import Solution as Solution
