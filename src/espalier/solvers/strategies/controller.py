"""The recurrent controller of `reinforce`: writes rows in NumPy, learns in PyTorch."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from espalier.solvers.strategies.bins import Bins

Codes = NDArray[Any]
Array = NDArray[np.float64]
Index = NDArray[np.int64]
Mask = NDArray[np.bool_]

_SPREAD = 0.1  # initial weights are even in +-0.1, as in Zoph & Le (2017)


class Controller:
    """An LSTM over the decisions in order: it reads its last choice, and each decision has its own
    weights to turn the state into the odds of its choices.

    Writing needs no gradient, and NumPy calls cost a tenth of PyTorch's at this size: both see the
    same numbers in memory.
    """

    def __init__(self, bins: Bins, hidden: int, rate: float, seed: int) -> None:
        sizes = [bins.sizes[j] for j in bins.turns.order]
        most = max(sizes, default=1)
        steps = len(sizes)
        self._bins = bins
        self._offsets = np.cumsum([1, *sizes])[:-1]  # of each decision's choices; 0 is the start
        generator = torch.Generator().manual_seed(seed)

        def even(*shape: int) -> Tensor:
            drawn = torch.rand(shape, generator=generator) * (2 * _SPREAD) - _SPREAD
            return drawn.requires_grad_()

        self._embedding = even(1 + sum(sizes), hidden)
        self._lstm = [even(4 * hidden, hidden), even(4 * hidden, hidden)]
        self._lstm += [even(4 * hidden), even(4 * hidden)]
        self._heads, self._bias = even(steps, hidden, most), even(steps, 1, most)
        absent = np.arange(most) >= np.array(sizes)[:, None]  # choices a decision does not have
        self._absent = np.where(absent, -np.inf, 0.0)[:, None, :].astype(np.float32)
        weights = [self._embedding, *self._lstm, self._heads, self._bias]
        self._views = [w.detach().numpy() for w in weights]
        self._adam = torch.optim.Adam(weights, lr=rate, fused=True)

    def write(self, n: int, rng: np.random.Generator, heat: float = 1.0) -> Codes:
        """n canonical rows of codes, by the logarithm of the odds divided by `heat`.

        A decision that is inactive is read as its first choice.
        """
        bins = self._bins
        embedding, w_in, w_state, b_in, b_state, heads, bias = self._views
        codes = np.zeros((n, len(bins.sizes)), dtype=bins.space.dtype)
        active = np.ones(codes.shape, dtype=np.bool_)
        # the largest of odds plus Gumbel noise is a draw by the odds
        noise = rng.gumbel(size=(len(bins.sizes), n, heads.shape[2])).astype(np.float32)
        token = np.zeros(n, dtype=np.int64)
        state = np.zeros((n, w_state.shape[1]), dtype=np.float32)
        memory = np.zeros_like(state)
        take, keep, new, show = (
            slice(q * state.shape[1], (q + 1) * state.shape[1]) for q in range(4)
        )
        for turn, j in enumerate(bins.turns.order):
            gates = embedding[token] @ w_in.T + state @ w_state.T + (b_in + b_state)
            open_ = _sigmoid(gates)  # of the third quarter this is of no use, and cheaper than not
            memory = open_[:, keep] * memory + open_[:, take] * np.tanh(gates[:, new])
            state = open_[:, show] * np.tanh(memory)
            odds = state @ heads[turn] + bias[turn] + self._absent[turn]
            choice = (odds + heat * noise[turn]).argmax(axis=1)
            codes[:, j] = bins.codes(j, choice, rng)
            if bins.turns.conditional(j):
                active[:, j] = bins.turns.active(j, codes, active)
                choice = np.where(active[:, j], choice, 0)
            token = self._offsets[turn] + choice
        return bins.space.canonical(codes)

    def learn(self, choices: Index, made: Mask, advantage: Array, entropy: float) -> None:
        """One step of Adam: the choices `(n, d)` (see `Bins.of`) of rows with a high advantage
        `(n,)` become likelier; only those `made` count."""
        with _one_thread():
            tokens = np.zeros(choices.shape, dtype=np.int64)
            tokens[:, 1:] = (self._offsets + choices)[:, :-1]
            wanted = torch.from_numpy(np.ascontiguousarray(choices))[..., None]
            counts = torch.from_numpy(np.ascontiguousarray(made)).float()
            log_odds = self._log_odds(torch.from_numpy(tokens))
            chosen = log_odds.gather(2, wanted)[..., 0]
            spread = -(log_odds.exp() * log_odds.clamp(min=-50)).sum(2)
            gain = chosen * torch.from_numpy(advantage).float()[:, None] + entropy * spread
            loss = -(gain * counts).sum(1).mean()
            self._adam.zero_grad()
            loss.backward()  # type: ignore[no-untyped-call]
            self._adam.step()

    def _log_odds(self, tokens: Tensor) -> Tensor:
        """Log-probabilities `(n, d, choices)` given what was chosen before."""
        n, hidden = len(tokens), self._embedding.shape[1]
        start = self._embedding.new_zeros(1, n, hidden)
        read = torch.nn.functional.embedding(tokens, self._embedding)
        states = torch.lstm(read, [start, start], self._lstm, True, 1, 0.0, False, False, True)[0]
        odds = torch.bmm(states.transpose(0, 1), self._heads) + self._bias
        odds = odds + torch.from_numpy(self._absent)
        return odds.log_softmax(2).transpose(0, 1)


def _sigmoid(x: NDArray[np.float32]) -> NDArray[np.float32]:
    out: NDArray[np.float32] = 0.5 * (np.tanh(0.5 * x) + 1)
    return out


@contextmanager
def _one_thread() -> Iterator[None]:
    """Sums depend on how they are divided among threads."""
    before = torch.get_num_threads()
    if before != 1:
        torch.set_num_threads(1)
    try:
        yield
    finally:
        if before != 1:
            torch.set_num_threads(before)
