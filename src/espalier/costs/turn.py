"""A change of kind between two layers, as a piece: it computes nothing, and takes time."""

from __future__ import annotations

from espalier.export.quantisers import Quantiser


class Turn(Quantiser):
    """A tensor on its way from a layer of floats to one of integers, or back.

    Each layer is timed among its like, so that no layer's time holds what a change of kind costs:
    out of the runtime's blocks and into whole numbers, or the other way round. Both ways count as
    the mean of the two.
    """
