"""Bits and sparsity of models that do not fit in memory: the places of one layer after another."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial

import torch
from torch import nn

from espalier.compress.language.anatomy import anatomy
from espalier.compress.language.layer_by_layer.layerwise import Inputs, Visit
from espalier.compress.language.weights.bits import WeightBits
from espalier.compress.language.weights.places import collected
from espalier.compress.language.weights.sparse import SparseWeights
from espalier.space.options import Option


def in_layers(cut: WeightBits | SparseWeights, choices: Mapping[str, Option] | Option) -> Visit:
    """What `Layerwise.run` visits layers with, to change their weights as the cut would.

    `choices`: one option for all places, or by decision, "bits:model.layers.3.qkv"; those that are
    not named stay. Each place sees what the places before it give now; a layer is run once for each
    of its places. Memory: the Gram matrices of a place (`room` of `Layerwise.run`).
    """

    def visit(number: int, layer: nn.Module, inputs: Inputs) -> None:
        model: nn.Module = inputs.model
        bound = cut.bind(model, torch.empty(0))
        first = anatomy(model).layers[0].path  # of a model that has this layer alone
        own = f"{first.rpartition('.')[0]}.{number}"
        for decision in bound.decisions:
            place = bound.places[decision.name.partition(":")[2]]
            name = f"{cut.kind}:{own}{place.name.removeprefix(first)}"
            option = choices.get(name) if isinstance(choices, Mapping) else choices
            if option is None or option == decision.options[-1]:
                continue
            for part in place.read(model):
                gram = None
                if bound.needs_inputs(option):
                    gram = collected(model, [place], partial(_run, inputs, layer))[place.name][part]
                weight = place.read(model)[part].detach()
                place.write(model, part, bound.treat(weight, gram, option))

    return visit


def _run(inputs: Inputs, layer: nn.Module) -> None:
    for _ in inputs.through(layer):
        pass
