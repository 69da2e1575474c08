"""A network taken apart into the modules that it runs one after the other."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from espalier.export import deployed


def chain(network: nn.Module, x: Tensor) -> list[tuple[nn.Module, Tensor]]:
    """Modules with their inputs, in order, whose composition is the network on `x`.

    The top-level children, Sequentials opened, where each is called once, with the output of the
    one before and nothing else; the network itself as the only link where that is not so.
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
        return [(module, taken.detach()) for module, taken, _ in calls]
    return [(network, x)]


def _links(network: nn.Module) -> list[nn.Module]:
    found: list[nn.Module] = []
    for child in network.children():
        found += _links(child) if type(child) is nn.Sequential else [child]
    return found
