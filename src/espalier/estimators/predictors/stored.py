"""Networks as named arrays and back, for files that hold arrays only."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from espalier.errors import DataError

Network = TypeVar("Network", bound=nn.Module)


def to_arrays(network: nn.Module, prefix: str = "net.") -> dict[str, NDArray[Any]]:
    """Parameters and buffers as arrays, their names under `prefix`."""
    return {f"{prefix}{k}": v.detach().numpy().copy() for k, v in network.state_dict().items()}


def from_arrays(
    network: Network, arrays: Mapping[str, NDArray[Any]], prefix: str = "net."
) -> Network:
    """The network with the arrays under `prefix`, in evaluation mode.

    Errors: `DataError` when they are not of this network.
    """
    own = {
        k.removeprefix(prefix): torch.from_numpy(np.array(v))
        for k, v in arrays.items()
        if k.startswith(prefix)
    }
    try:
        network.load_state_dict(own)
    except RuntimeError as error:
        raise DataError(
            "the stored predictor has other sizes than this one: build it with the settings that "
            f"lie beside it ({str(error).splitlines()[-1].strip()})"
        ) from error
    return network.eval()
