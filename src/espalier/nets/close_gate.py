"""The gate of CLOSE: which block of weights each edge of a cell takes (Zhou et al., 2022)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from espalier.nets.nb201 import EDGES, OPERATORS

_NODES = 4
_NONE = OPERATORS.index("none")
_INDEX = {name: i for i, name in enumerate(OPERATORS)}
Assigned = tuple[list[int], Tensor | None]  # of each edge: its block, and the gate's weight


class Gate(nn.Module):
    """From a cell to a block for each edge: an encoder of the graph, and an MLP on edges' ends.

    The encoder has operators on edges (Ning et al., GATES, 2020): along an edge goes what the node
    before it holds, each component let through by a sigmoid of the operator's vector; a node sums.
    Logits are against the other edges of the cell and of one spread: with raw ones a fresh gate
    gives all edges one block in evaluation and nearly any block in training.
    """

    grown: Tensor

    def __init__(
        self, blocks: int, temperature: float, width: int = 32, layers: int = 2, hidden: int = 64
    ) -> None:
        super().__init__()
        self.blocks, self.temperature = blocks, temperature
        self.nodes = nn.Parameter(torch.empty(_NODES, width))
        self.operators = nn.Parameter(torch.empty(len(OPERATORS), width))
        self.let = nn.ModuleList(nn.Linear(width, width) for _ in range(layers))
        self.carry = nn.ModuleList(nn.Linear(width, width) for _ in range(layers))
        self.read = nn.Sequential(
            nn.Linear(2 * width, hidden), nn.ReLU(), nn.Linear(hidden, blocks)
        )
        # how many blocks there are now; with the weights, so that a checkpoint knows it
        self.register_buffer("grown", torch.ones((), dtype=torch.int64))
        self.register_buffer("ends", torch.tensor([to for to, _ in EDGES]), persistent=False)
        self.register_buffer("origins", torch.tensor([o for _, o in EDGES]), persistent=False)
        self.gain = nn.Parameter(torch.empty(()))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Fresh vectors of nodes and operators."""
        nn.init.normal_(self.nodes)
        nn.init.normal_(self.operators)
        nn.init.constant_(self.gain, 2.0)

    def forward(self, chosen: Sequence[str]) -> Tensor:
        """Logits `(6, blocks)` of a cell's six operators, over all blocks."""
        ends, origins = self.get_buffer("ends"), self.get_buffer("origins")
        codes = torch.tensor([_INDEX[name] for name in chosen], device=ends.device)
        vectors = self.operators[codes]
        open_ = (codes != _NONE).to(vectors.dtype)[:, None]
        state: Tensor = self.nodes
        for let, carry in zip(self.let, self.carry, strict=True):
            messages = open_ * torch.sigmoid(let(vectors)) * carry(state)[origins]
            state = F.relu(self.nodes.index_add(0, ends, messages))
        read: Tensor = self.read(torch.cat([state[origins], state[ends]], dim=1))
        centred = read - read.mean(dim=0)
        return self.gain * centred / (centred.detach().std(dim=0) + 1e-6)

    def assign(self, chosen: Sequence[str], drawn: bool) -> Assigned:
        """Blocks of the six edges; if `drawn`, at random and with weights of 1 that have gradients."""
        now = int(self.grown)
        if now == 1:
            return [0] * len(EDGES), None
        if not drawn:
            with torch.no_grad():
                return self(chosen)[:, :now].argmax(dim=1).tolist(), None
        logits = self(chosen)[:, :now]
        weights = F.gumbel_softmax(logits.float(), self.temperature, hard=True)
        blocks = weights.detach().argmax(dim=1)
        return blocks.tolist(), weights.gather(1, blocks[:, None])[:, 0]
