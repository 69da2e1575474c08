"""All zero-cost proxies of one network, with as few passes as they can share."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from espalier.errors import EspalierError, unknown
from espalier.estimators.zero_cost import complexity, entropy, saliency, similarity
from espalier.estimators.zero_cost import sweep as sweeps
from espalier.estimators.zero_cost.borrow import weighted
from espalier.estimators.zero_cost.sweep import Loss, Sweep
from espalier.estimators.zero_cost.synflow import synflow
from espalier.estimators.zero_cost.w_pca import w_pca
from espalier.estimators.zero_cost.zen import zen
from espalier.train.running import device_of


@dataclass(frozen=True)
class Batch:
    """What a proxy may look at."""

    network: nn.Module
    inputs: Tensor
    labels: Tensor
    loss: Loss
    seed: int


# from one sweep: what it must hold, and the number
_SWEPT: dict[str, tuple[str, Callable[[Sweep, Batch], float]]] = {
    "grad_norm": (sweeps.GRADIENTS, lambda s, b: saliency.grad_norm(s)),
    "snip": (sweeps.GRADIENTS, lambda s, b: saliency.snip(s)),
    "grasp": (sweeps.CURVATURE, lambda s, b: saliency.grasp(s)),
    "fisher": (sweeps.FISHER, lambda s, b: saliency.fisher(s)),
    "jacob_cov": (sweeps.JACOBIAN, lambda s, b: similarity.jacob_cov(s.jacobian)),
    "plain": (sweeps.GRADIENTS, lambda s, b: saliency.plain(s)),
    "naswot": (sweeps.CODES, lambda s, b: similarity.naswot(s.codes)),
    "epe_nas": (
        sweeps.JACOBIAN,
        lambda s, b: similarity.epe_nas(s.jacobian, b.labels, s.classes),
    ),
}
# with a pass of their own, or none
_ALONE: dict[str, Callable[[Batch], float]] = {
    "synflow": lambda b: synflow(b.network, b.inputs.shape[1:]),
    "l2": lambda b: saliency.l2([layer.weight.detach() for layer in weighted(b.network)]),  # type: ignore[operator]
    "zen": lambda b: zen(b.network, b.inputs.shape[1:], b.seed),
    "zico": lambda b: saliency.zico(b.network, b.inputs, b.labels, b.loss),
    "depth_entropy": lambda b: entropy.depth_entropy(entropy.shapes(b.network, b.inputs)),
    "w_pca": lambda b: w_pca(b.network, b.inputs),
    "ntk_condition": lambda b: complexity.ntk_condition(b.network, b.inputs),
    "length_distortion": lambda b: complexity.length_distortion(
        b.network, b.inputs.shape[1:], b.seed
    ),
}
_COUNTED = ("params", "macs")

ALL: tuple[str, ...] = (
    "grad_norm",
    "snip",
    "grasp",
    "fisher",
    "jacob_cov",
    "synflow",
    "plain",
    "l2",
    "naswot",
    "epe_nas",
    "zen",
    "zico",
    "params",
    "macs",
    "depth_entropy",
)
MEASURES = (*ALL, "w_pca", "ntk_condition", "length_distortion")


def scores(
    network: nn.Module,
    inputs: Tensor,
    labels: Tensor,
    measures: Sequence[str] = ALL,
    loss: Loss = cross_entropy,
    seed: int = 0,
) -> dict[str, float]:
    """The named proxies of a network on one batch, `inputs` `(b, ...)` and `labels`; each in the
    sign of its paper, in which more is better.

    One forward pass serves all that look at the batch; the network is not copied, and leaves as it
    came. `seed` draws what zen and length_distortion feed. It computes on the device that the network
    is on. A result hangs, up to rounding, on the network, the batch and the seed alone, not on
    which other measures are asked for.
    Errors: `EspalierError` for an unknown measure, one that the network can't give (which, and
    why), or a result that is not finite.
    """
    for name in measures:
        if name not in MEASURES:
            raise EspalierError(unknown("zero-cost measure", name, MEASURES))
    device = device_of(network)
    inputs, labels = inputs.to(device), labels.to(device)
    batch = Batch(network, inputs, labels, loss, seed)
    out: dict[str, float] = {}
    needs = frozenset(_SWEPT[name][0] for name in measures if name in _SWEPT)
    if needs:
        found = sweeps.sweep(network, inputs, labels, loss, needs)
        out |= {name: _SWEPT[name][1](found, batch) for name in measures if name in _SWEPT}
    out |= {name: _ALONE[name](batch) for name in measures if name in _ALONE}
    if any(name in _COUNTED for name in measures):
        counted = dict(zip(_COUNTED, entropy.counts(network, inputs), strict=True))
        out |= {name: counted[name] for name in measures if name in _COUNTED}
    for name, value in out.items():
        if value - value != 0:
            raise EspalierError(
                f"{name} of {type(network).__name__} is {value}: its activations or gradients are "
                f"not finite on this batch; scale the inputs to about 1, or leave {name} out"
            )
    return {name: out[name] for name in measures}
