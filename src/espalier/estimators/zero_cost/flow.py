"""Numbers too large for any float: a tensor near 1, and an exponent of two beside it.

Made for networks whose weights and inputs are all positive, as SynFlow runs them: there ReLU does
nothing, and every layer is proportional to its input but for biases.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from espalier.errors import EspalierError


class Flow(Tensor):
    """A tensor that stands for its numbers times two to the power of `exponent`.

    Norms are left out and activations pass what is positive; sums are brought to one exponent;
    products, convolutions and linear layers move their size into the exponent; sigmoid, tanh and
    softmax see the true numbers, up to 1e15. Everything else must be proportional to the one flow
    that it takes: views, pooling, means. Errors: `EspalierError` where it takes several.
    """

    exponent: int = 0

    @classmethod
    def __torch_function__(
        cls,
        func: Callable[..., Any],
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        name = getattr(func, "__name__", "").strip("_")
        with torch._C.DisableTorchFunctionSubclass():
            return _RULES.get(name, _proportional)(func, args, kwargs or {})


def flow(value: Tensor, exponent: int = 0) -> Flow:
    """A tensor as a flow; gradients pass."""
    made = value.as_subclass(Flow)
    made.exponent = exponent
    return made


def near_one(value: Tensor, exponent: int) -> Flow:
    """The same flow, with its size in the exponent."""
    most = float(value.detach().abs().max()) if value.numel() else 0.0
    shift = math.frexp(most)[1] if math.isfinite(most) else 0
    return flow(value * 2.0**-shift, exponent + shift) if shift else flow(value, exponent)


Rule = Callable[[Callable[..., Any], tuple[Any, ...], dict[str, Any]], Any]
_MOST = 1e15  # products of two such numbers still fit a float


def _raw(x: Any) -> Any:
    if isinstance(x, Flow):
        return x.as_subclass(Tensor)
    return [_raw(i) for i in x] if isinstance(x, (list, tuple)) and _flows(x) else x


def _true(x: Any) -> Any:
    """The numbers themselves, cut at what a float can multiply."""
    if not isinstance(x, Flow):
        return x
    power = max(min(x.exponent, 126), -126)
    return (_raw(x) * 2.0**power).clamp(-_MOST, _MOST)


def _flows(values: Sequence[Any]) -> list[Flow]:
    found = []
    for value in values:
        if isinstance(value, Flow):
            found.append(value)
        elif isinstance(value, (list, tuple)):
            found += _flows(value)
    return found


def _proportional(func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    flows = _flows((*args, *kwargs.values()))
    out = func(*map(_raw, args), **{k: _raw(v) for k, v in kwargs.items()})
    if not isinstance(out, (Tensor, tuple, list)):
        return out
    if len(flows) > 1:
        raise EspalierError(
            f"synflow can't follow the flow through {getattr(func, '__name__', func)}, which takes "
            f"several: leave synflow out of the measures"
        )
    return _marked(out, flows[0].exponent)


def _marked(out: Any, exponent: int) -> Any:
    if isinstance(out, Tensor):
        return flow(out, exponent)
    if isinstance(out, (tuple, list)) and any(isinstance(o, Tensor) for o in out):
        return type(out)(_marked(o, exponent) for o in out)
    return out


def _first(func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    return args[0] if args else kwargs["input"]


def _bounded(func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    return flow(func(*map(_true, args), **{k: _true(v) for k, v in kwargs.items()}), 0)


def _layer(func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """A convolution or linear layer: the bias joins at the exponent of the product."""
    names = ("input", "weight", "bias")
    given = {**dict(zip(names, args, strict=False)), **kwargs}
    x, bias = given["input"], given.pop("bias", None)
    out = func(_raw(x), _raw(given["weight"]), None, *args[3:], **_rest(kwargs, names))
    made = near_one(out, _exponent(x) + _exponent(given["weight"]))
    if bias is None:
        return made
    places = out.ndim - 2 if func is not torch._C._nn.linear else 0
    return _sum(torch.add, (made, flow(bias.reshape(-1, *[1] * places))), {})


def _rest(kwargs: dict[str, Any], names: Sequence[str]) -> dict[str, Any]:
    return {k: v for k, v in kwargs.items() if k not in names}


def _exponent(x: Any) -> int:
    return x.exponent if isinstance(x, Flow) else 0


def _sum(func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Both sides at the larger exponent; what is more than 2^126 times smaller is lost."""
    a, b = args[:2]
    top = max(_exponent(x) for x in (a, b) if isinstance(x, Flow))
    if any(not isinstance(x, Flow) and x is not None for x in (a, b)):
        top = max(top, 0)  # a plain number keeps its place
    return near_one(func(_at(a, top), _at(b, top), *args[2:], **kwargs), top)


def _at(x: Any, exponent: int) -> Any:
    """Numbers that stand for the same at another exponent."""
    shift = _exponent(x) - exponent
    return _raw(x) * 2.0 ** max(shift, -126) if shift else _raw(x)


def _joined(func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    parts = args[0] if args else kwargs["tensors"]
    top = max(_exponent(x) for x in parts)
    rest = {k: v for k, v in kwargs.items() if k != "tensors"}
    return near_one(func([_at(x, top) for x in parts], *args[1:], **rest), top)


def _product(func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    total = sum(f.exponent for f in _flows((*args, *kwargs.values())))
    return near_one(func(*map(_raw, args), **{k: _raw(v) for k, v in kwargs.items()}), total)


def _quotient(func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    return near_one(func(*map(_raw, args[:2])), _exponent(args[0]) - _exponent(args[1]))


def _attention(func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """A mean of the values, weighted by what true queries and keys make of it."""
    names = ("query", "key", "value")
    given = {**dict(zip(names, args, strict=False)), **kwargs}
    query, key, value = (given[n] for n in names)
    rest = _rest(kwargs, names)
    return flow(func(_true(query), _true(key), _raw(value), *args[3:], **rest), _exponent(value))


def _table() -> dict[str, Rule]:
    rules: dict[str, Rule] = {"scaled_dot_product_attention": _attention}
    for rule, text in (
        (_first, "batch_norm layer_norm group_norm instance_norm rms_norm"),
        (_first, "relu relu6 leaky_relu elu selu celu gelu silu mish hardswish hardtanh softplus"),
        (_first, "prelu dropout dropout1d dropout2d dropout3d alpha_dropout contiguous"),
        (_bounded, "sigmoid hardsigmoid tanh softmax"),
        (_layer, "conv1d conv2d conv3d conv_transpose1d conv_transpose2d conv_transpose3d linear"),
        (_sum, "add radd iadd"),
        (_joined, "cat concat stack"),
        (_product, "mul rmul imul matmul bmm mm"),
        (_quotient, "div truediv itruediv"),
    ):
        rules |= dict.fromkeys(text.split(), rule)
    return rules


_RULES = _table()
