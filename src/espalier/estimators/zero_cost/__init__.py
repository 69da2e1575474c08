"""Zero-cost proxies: how good a network is, from a batch or less and without training.

`scores(network, inputs, labels)` gives them for one network, `ZeroCost(family, task)` for
candidates. `ALL` are those of any classifier of images; `MEASURES` has those of transformers too.
"""

from espalier.estimators.zero_cost.estimator import ZeroCost
from espalier.estimators.zero_cost.scores import ALL, MEASURES, scores

__all__ = ["ALL", "MEASURES", "ZeroCost", "scores"]
