"""Proxies that ask how differently a network treats the images of a batch."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from espalier.errors import EspalierError

_SMALL = 1e-5  # as published, for both scores of Jacobians


def correlations(rows: Tensor) -> Tensor:
    """Correlation matrix `(n, n)` of rows `(n, d)`, float64.

    Rows that don't vary can't be told apart: they count as one and the same.
    """
    centred = rows.double() - rows.double().mean(1, keepdim=True)
    norm = centred.norm(dim=1, keepdim=True)
    still = norm[:, 0] == 0
    unit = centred / norm.clamp_min(torch.finfo(torch.float64).tiny)
    out = unit @ unit.T
    out[still[:, None] & still] = 1.0
    limited: Tensor = out.clamp(-1.0, 1.0)
    return limited


def jacob_cov(jacobian: Tensor) -> float:
    """Minus the sum of log(v + k) + 1 / (v + k) over the eigenvalues v of the correlations of the
    outputs' gradients, image by image; k is 1e-5 (Mellor et al., "Neural Architecture Search
    without Training", first version, 2020; named so by Abdelfattah et al., 2021)."""
    values = torch.linalg.eigvalsh(correlations(jacobian)).clamp_min(0.0)
    return -float((torch.log(values + _SMALL) + 1 / (values + _SMALL)).sum())


def epe_nas(jacobian: Tensor, labels: Tensor, classes: int) -> float:
    """Sum over classes of the magnitude of the sum of log correlations of the outputs' gradients
    within the class (Lopes, Alirezazadeh & Alexandre, EPE-NAS, ICANN 2021).

    Beyond 100 classes, as published: the mean distance between the classes' mean logs.
    """
    if labels.ndim != 1 or labels.is_floating_point():
        raise EspalierError(
            f"epe_nas compares the images of a class, the targets are {labels.dtype} of shape "
            f"{tuple(labels.shape)}: leave it out of the measures"
        )
    sums = []
    for label in torch.unique(labels):
        logs = (correlations(jacobian[labels == label]).abs() + _SMALL).log().sum()
        sums.append(logs if classes <= 100 else logs / int((labels == label).sum()))
    within = torch.stack(sums)
    if classes <= 100:
        return float(within.abs().sum())
    return float((within[:, None] - within).abs().sum() / len(within))


def naswot(codes: Sequence[Tensor]) -> float:
    """Log determinant of how many ReLUs agree on each pair of images (Mellor, Turner, Storkey &
    Crowley, "Neural Architecture Search without Training", ICML 2021).

    One agreement more of each image with itself keeps it finite where two images have one code.
    Errors: `EspalierError` for a network without ReLUs.
    """
    if not codes:
        raise EspalierError(
            "naswot reads which ReLUs are on, the network has none that reach its output: leave "
            "it out of the measures"
        )
    agree = torch.zeros(len(codes[0]), len(codes[0]), dtype=torch.float64)
    for on in codes:
        x = on.float()
        both = (x @ x.T).double()  # whole numbers: exact in single precision below 16.7 million
        lit = both.diagonal()
        agree += on.shape[1] - lit[:, None] - lit + 2 * both
    return float(torch.linalg.slogdet(agree + torch.eye(len(agree)))[1])
