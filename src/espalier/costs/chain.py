"""A network taken apart into the pieces that it runs one after the other."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from espalier.costs.layers import kind_of
from espalier.export import deployed


def chain(network: nn.Module, x: Tensor) -> list[tuple[nn.Module, Tensor]]:
    """Modules with their inputs, in order, whose composition is the network on `x`.

    The top-level children, Sequentials opened, where each is called once, with the output of the
    one before and nothing else; the network itself as the only piece where that is not so. Norms,
    activations, pooling and what is idle stay with what comes before: runtimes fuse them with it.
    """
    links = _links(network)
    calls: list[tuple[nn.Module, Tensor, Any]] = []
    broken: list[bool] = []

    def note(module: nn.Module, args: Any, output: Any) -> None:
        single = len(args) == 1 and isinstance(args[0], Tensor) and isinstance(output, Tensor)
        if single:
            calls.append((module, args[0], output))
        else:
            broken.append(True)

    handles = [module.register_forward_hook(note) for module in links]
    try:
        with deployed(network):
            output = network(x)
    finally:
        for handle in handles:
            handle.remove()
    starts = [x, *(made for _, _, made in calls)]
    ends = [*(taken for _, taken, _ in calls), output]
    whole = len(calls) == len({id(module) for module, _, _ in calls}) and not broken
    # the very same tensor must go from each to the next: nothing is computed in between
    if calls and whole and all(a is b for a, b in zip(starts, ends, strict=True)):
        return _grouped([(module, taken.detach()) for module, taken, _ in calls])
    return [(network, x)]


_FOLLOWS = {"norm", "activation", "pool"}
_IDLE = (nn.Identity, nn.Flatten, nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Dropout3d)


def _grouped(calls: list[tuple[nn.Module, Tensor]]) -> list[tuple[nn.Module, Tensor]]:
    groups: list[tuple[list[nn.Module], Tensor]] = []
    for module, taken in calls:
        if groups and (kind_of(module) in _FOLLOWS or isinstance(module, _IDLE)):
            groups[-1][0].append(module)
        else:
            groups.append(([module], taken))
    return [
        (modules[0] if len(modules) == 1 else nn.Sequential(*modules), taken)
        for modules, taken in groups
    ]


def _links(network: nn.Module) -> list[nn.Module]:
    found: list[nn.Module] = []
    for child in network.children():
        found += _links(child) if type(child) is nn.Sequential else [child]
    return found
