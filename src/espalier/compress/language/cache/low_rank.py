"""Keys and values by few numbers: factors of what a layer's maps give, and how they are found."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from torch import Tensor, nn

from espalier.compress.language.anatomy import Attention, anatomy
from espalier.errors import EspalierError, unknown

Method = Literal["svd", "asvd", "data"]
METHODS = ("svd", "asvd", "data")
# rotations whose angles do not depend on how long the input is
_FIXED = ("default", "linear", "llama3", "yarn", "proportional")


@dataclass(frozen=True, eq=False)
class Rotation:
    """Rotary positions (Su et al., 2021) of one head's `d` channels; `rates` (d / 2)."""

    rates: Tensor
    scale: float = 1.0

    def turn(self, rows: Tensor, first: int, back: bool = False) -> Tensor:
        """Rows `(..., t, d)` at positions `first`, `first` + 1, ... turned, or turned back."""
        steps = torch.arange(first, first + rows.shape[-2], device=rows.device)
        angles = steps[:, None].float() * self.rates.to(rows.device)[None]
        angles = torch.cat([angles, angles], -1)
        scale = 1 / self.scale if back else self.scale
        cos, sin = (angles.cos() * scale).to(rows.dtype), (angles.sin() * scale).to(rows.dtype)
        one, two = rows.chunk(2, -1)
        aside = torch.cat([-two, one], -1) * sin
        return rows * cos - aside if back else rows * cos + aside


@dataclass(frozen=True, eq=False)
class Factors:
    """Rows of all heads together, `groups * head` numbers, as `rank` numbers and back.

    `down` (r, groups * head) and `up` (groups * head, r); keys are turned back to position 0
    before and to their own position after, so that one pair of factors serves every position.
    """

    down: Tensor
    up: Tensor
    groups: int
    rotation: Rotation | None = None

    @property
    def rank(self) -> int:
        """Numbers a token."""
        return int(self.down.shape[0])

    def encode(self, rows: Tensor, first: int) -> Tensor:
        """`(b, h, t, d)` at positions from `first` on to `(b, 1, t, r)`."""
        exact = rows.float()
        if self.rotation is not None:
            exact = self.rotation.turn(exact, first, back=True)
        codes = exact.transpose(1, 2).flatten(2) @ self.down.t().to(rows.device)
        return codes.unsqueeze(1).to(rows.dtype)

    def decode(self, codes: Tensor, first: int) -> Tensor:
        """`(b, 1, t, r)` to `(b, h, t, d)`."""
        rows = codes.squeeze(1).float() @ self.up.t().to(codes.device)
        rows = rows.reshape(*rows.shape[:2], self.groups, -1).transpose(1, 2)
        if self.rotation is not None:
            rows = self.rotation.turn(rows, first)
        return rows.to(codes.dtype)

    def kept(self, groups: tuple[int, ...]) -> Factors:
        """The same for some of the groups of heads, in this order."""

        def chosen(columns: Tensor) -> Tensor:
            parted = columns.reshape(*columns.shape[:-1], self.groups, -1)
            return parted[..., list(groups), :].flatten(-2)

        return replace(self, down=chosen(self.down), up=chosen(self.up.t()).t(), groups=len(groups))

    def within(self, rank: int) -> Factors:
        """The first `rank` numbers alone: factors are in order of what they explain."""
        return replace(self, down=self.down[:rank].clone(), up=self.up[:, :rank].clone())


def rotation(model: nn.Module) -> Rotation | None:
    """How a model turns its keys; None where positions are not rotary.

    Errors: `EspalierError` where the angles depend on the input's length.
    """
    found: Any = [m for name, m in model.named_modules() if name.endswith("rotary_emb")]
    if not found:
        return None
    kind = getattr(found[0], "rope_type", "default")
    if len(found) > 1 or kind not in _FIXED:
        what = f"{len(found)} kinds" if len(found) > 1 else f"{kind!r} positions"
        rule = "keys are kept by few numbers where rotary positions are fixed"
        raise EspalierError(f"{rule}; this model has {what}: decide on its values alone")
    scale = float(getattr(found[0], "attention_scaling", 1.0))
    return Rotation(found[0].inv_freq.detach().float().clone(), scale)


@dataclass
class Seen:
    """What a layer's cache was given on calibration text: `(n * t, groups * head)` each, keys
    turned back to position 0; `inputs` are the mean sizes of what the maps read."""

    keys: Tensor
    values: Tensor
    inputs: Tensor


@torch.no_grad()
def seen(model: nn.Module, windows: Tensor) -> list[Seen]:
    """Keys, values and input sizes of every attention on windows `(n, t)`, in order."""
    from transformers import DynamicCache

    owners = attentions(model)
    sizes: dict[str, Tensor] = {}

    def note(path: str) -> Callable[..., None]:
        def hook(module: nn.Module, args: tuple[Tensor, ...]) -> None:
            sizes[path] = args[0].detach().abs().flatten(0, -2).float().mean(0)

        return hook

    hooks = [
        model.get_submodule(a.key.path).register_forward_pre_hook(note(a.path)) for a in owners
    ]
    cache = DynamicCache()
    try:
        model(input_ids=windows, past_key_values=cache, use_cache=True)
    finally:
        for hook in hooks:
            hook.remove()
    turn, out = rotation(model), []
    for attention, layer in zip(owners, cache.layers, strict=True):
        keys = layer.keys.float()
        keys = keys if turn is None else turn.turn(keys, 0, back=True)
        flat = [rows.transpose(1, 2).flatten(2).flatten(0, 1) for rows in (keys, layer.values)]
        out.append(Seen(flat[0], flat[1].float(), sizes[attention.path]))
    return out


def attentions(model: nn.Module) -> list[Attention]:
    """The attentions that a model has, in order. Errors: `EspalierError` where there are none."""
    if not (found := [x.attention for x in anatomy(model).layers if x.attention is not None]):
        raise EspalierError("this model has no attention left: there is no cache to decide on")
    return found


def factors(
    model: nn.Module,
    attention: Attention,
    part: Literal["keys", "values"],
    rank: int,
    data: Seen,
    method: Method = "data",
) -> Factors:
    """Rank-`rank` factors of an attention's keys or values.

    - "svd": left singular vectors of the layer's own matrix;
    - "asvd": of the matrix times the square root of its inputs' mean sizes (Yuan et al., 2023),
      which CSKV (Wang et al., 2024) begins with;
    - "data": principal directions of the keys or values themselves, which no other pair of factors
      of this rank betters in squared error on the text they were taken from.

    Keeping `A x` of the input is keeping a projection of the key `W x`: the best `A` lies in the
    rows of `W`. Errors: `EspalierError` for a rank out of range.
    """
    if method not in METHODS:
        raise EspalierError(unknown("method of factors", method, METHODS))
    rows = data.keys if part == "keys" else data.values
    if not 1 <= rank <= rows.shape[1]:
        raise EspalierError(f"a rank is 1 to {rows.shape[1]} for {attention.path}, got {rank!r}")
    if method == "data":
        gram = rows.double().t() @ rows.double()
        basis = torch.linalg.eigh(gram)[1].flip(1)
    else:
        weights = attention.key if part == "keys" else attention.value
        matrix = weights.read(model).detach().double()
        if method == "asvd":
            matrix = matrix * data.inputs.double().clamp_min(1e-8).sqrt()[None]
        basis = torch.linalg.svd(matrix, full_matrices=False)[0]
    up = basis[:, :rank].float().contiguous()
    turn = rotation(model) if part == "keys" else None
    return Factors(up.t().contiguous(), up, attention.groups, turn)


def tuned(
    start: Factors, rows: Tensor, steps: int = 200, rate: float = 5e-3, seed: int = 0
) -> Factors:
    """Factors after `steps` of Adam on the squared error of rows `(n, groups * head)`: layer-wise
    reconstruction, as CSKV tunes them. 256 rows a step, drawn by the seed."""
    down, up = (nn.Parameter(x.clone()) for x in (start.down, start.up))
    optimiser = torch.optim.Adam([down, up], lr=rate)
    draw = torch.Generator().manual_seed(seed)
    scale = rows.square().mean().clamp_min(1e-12)
    with torch.enable_grad():
        for step in range(steps):
            for group in optimiser.param_groups:
                group["lr"] = rate * (1 - step / steps)
            batch = rows[torch.randint(len(rows), (256,), generator=draw)]
            loss = (batch @ down.t() @ up.t() - batch).square().mean() / scale
            optimiser.zero_grad()
            loss.backward()  # type: ignore[no-untyped-call]
            optimiser.step()
    return replace(start, down=down.detach(), up=up.detach())
