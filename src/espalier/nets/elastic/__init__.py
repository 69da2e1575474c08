"""Elastic layers: torch modules whose sizes are decisions, declared where they act.

A size is an int, a decision, or a product of such (`product(width, expansion)`). Each module holds
the weights of its largest form; a `Supernet` made of them gives the space, runs any candidate and
extracts it as a plain network.
"""

from espalier.nets.elastic.attention import Attention, Parameter
from espalier.nets.elastic.containers import OneOf, Repeat, Skippable
from espalier.nets.elastic.convolution import Conv2d, DepthwiseConv2d
from espalier.nets.elastic.core import Elastic
from espalier.nets.elastic.dims import Dim, Product, product
from espalier.nets.elastic.layers import BatchNorm2d, LayerNorm, Linear
from espalier.nets.elastic.mixing import Gates, Mixture
from espalier.nets.elastic.resize import Resize
from espalier.nets.elastic.sorting import sort_channels

__all__ = [
    "Attention",
    "BatchNorm2d",
    "Conv2d",
    "DepthwiseConv2d",
    "Dim",
    "Elastic",
    "Gates",
    "LayerNorm",
    "Linear",
    "Mixture",
    "OneOf",
    "Parameter",
    "Product",
    "Repeat",
    "Resize",
    "Skippable",
    "product",
    "sort_channels",
]
