"""Weights as safetensors: every tensor once, in torch's default layout."""

from __future__ import annotations

from safetensors.torch import save
from torch import Tensor, nn


def to_safetensors(network: nn.Module) -> bytes:
    """The network's parameters and buffers under their names in `state_dict`.

    A tensor that has several names (tied weights) is stored under the first; the others are named
    in the file's metadata, as `safetensors.torch.load_model` expects.
    """
    tensors: dict[str, Tensor] = {}
    first: dict[tuple[int, tuple[int, ...]], str] = {}
    tied: dict[str, str] = {}
    for name, tensor in network.state_dict().items():
        place = (tensor.data_ptr() if tensor.numel() else id(tensor), tuple(tensor.shape))
        kept = first.setdefault(place, name)
        if kept != name:
            tied[name] = kept
        else:
            # a clone, because two views of one storage may still overlap
            tensors[name] = tensor.detach().cpu().contiguous().clone()
    return save(tensors, metadata=tied or None)
