"""Small decoders that predict the next byte: GPT-2's form (Radford et al., 2019), every layer alike.

https://cdn.openai.com/better-language-models/language_models_are_unsupervised_multitask_learners.pdf.
Differs in that the output layer is not tied to the embedding, and in the sizes.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn

from espalier.errors import SpaceError
from espalier.nets.family import Family
from espalier.nets.plain import traced
from espalier.nets.transformer import Body, initialise, whole_heads
from espalier.space import Candidate, Space, choice, ordinal

BYTES = 256


class _Decoder(nn.Module):
    def __init__(self, context: int, depth: int, width: int, heads: int, hidden: int) -> None:
        super().__init__()
        self.context = context
        self.embed = nn.Embedding(BYTES, width)
        self.body = Body(depth, width, heads, hidden, context, causal=True)
        self.head = nn.Linear(width, BYTES)
        initialise(self)

    def forward(self, x: Tensor) -> Tensor:
        tokens = x.long().clamp(0, BYTES - 1)
        out: Tensor = self.head(self.body(self.embed(tokens)))
        return out.reshape(-1, self.context * BYTES)


class GPT(Family):
    """Decoders of bytes: inputs `(b, context)`, bytes as floats, to `(b, context * 256)`: for each
    place in order, what the next byte is.

    Decisions: `depth`, `width`, `ratio` (hidden width of the feed-forward layers over the width)
    and `heads` (the nearest number below where they don't divide the width).
    """

    name = "gpt"

    def __init__(
        self,
        shape: Sequence[int] = (64,),
        classes: int = 64 * BYTES,
        depth: Sequence[int] = (1, 2, 3, 4, 6),
        width: Sequence[int] = (16, 32, 48, 64, 96, 128),
        ratio: Sequence[float] = (0.5, 1, 2, 4),
        heads: Sequence[int] = (1, 2, 4),
    ) -> None:
        if len(shape) != 1 or classes != shape[0] * BYTES:
            raise SpaceError(
                f"gpt takes a shape of (context,) and gives 256 classes a place, got {tuple(shape)} "
                f"and {classes} classes: use tasks.text"
            )
        self.shape, self.classes = (int(shape[0]),), int(classes)
        self._space = Space(
            [
                ordinal("depth", *depth),
                ordinal("width", *width),
                ordinal("ratio", *ratio),
                choice("heads", *heads),
            ]
        )

    @property
    def space(self) -> Space:
        """Four decisions."""
        return self._space

    def build(self, candidate: Candidate) -> nn.Module:
        """The decoder of a candidate."""
        chosen = self._space.candidate(candidate)
        depth, width, heads = (int(chosen[k]) for k in ("depth", "width", "heads"))
        hidden = max(1, round(float(chosen["ratio"]) * width))
        made = _Decoder(self.shape[0], depth, width, whole_heads(width, heads), hidden)
        return traced(made, "GPT")
