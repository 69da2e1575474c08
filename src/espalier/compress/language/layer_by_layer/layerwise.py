"""Models that do not fit in memory: hidden states go through one layer after another.

Every layer is loaded when the hidden states of all windows stand before it, may be looked at and
changed, and is freed. The memory that this takes is said beforehand, and measured.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Collection, Iterator
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from espalier.compress.language.files.folder import Folder
from espalier.compress.language.layer_by_layer.held import Held, Peak, release
from espalier.compress.language.layer_by_layer.journal import Journal
from espalier.compress.language.layer_by_layer.memory import POSITIONS, shown, stages, states_bytes
from espalier.compress.language.layer_by_layer.pieces import Pieces
from espalier.compress.language.layer_by_layer.rewriting import Rewriter
from espalier.compress.language.layer_by_layer.stand_ins import Below, Stand, Stop
from espalier.errors import DataError, EspalierError


class Inputs:
    """What stands before a layer: chunks of hidden states (b, t, width), one after another.

    Iterating reads them; `through(layer)` gives what the layer makes of each, with the masks and
    positions that the model would give it. `model` is a model of one layer, the one that is
    visited: what is written for whole models (anatomy, surgery, rounding) works on it.
    """

    def __init__(self, held: Held, calls: list[tuple[Any, Any]], model: Any) -> None:
        self._held, self._calls, self.model = held, calls, model

    def __len__(self) -> int:
        return len(self._held)

    def __iter__(self) -> Iterator[Tensor]:
        return iter(self._held)

    @torch.no_grad()
    def through(self, layer: nn.Module) -> Iterator[Tensor]:
        """Outputs of the layer, chunk by chunk."""
        for chunk, (args, kwargs) in zip(self._held, self._calls, strict=True):
            yield layer(chunk, *args, **kwargs)


Visit = Callable[[int, nn.Module, Inputs], None]


@dataclass(frozen=True)
class Passed:
    """A pass through all layers.

    - `loss`: nats a token of the windows, on average; None for an encoder.
    - `peak`: the most resident memory of this process, bytes, measured; `needed`: as predicted.
    - `influence`: how much each layer turns hidden states, 1 - cosine, mean of tokens (block
      influence: Men et al., ShortGPT, 2024); 0 for one that was skipped.
    - `written`: the folder with the layers as they were left, where one was asked for.
    """

    loss: float | None
    peak: int
    needed: int
    influence: tuple[float, ...]
    written: Path | None
    hidden: Held | None = None


class Layerwise:
    """A folder's model, of which one layer at a time is in memory.

    - `memory`: the most bytes that the process may hold, everything included (Python and libraries
      are some 400 MB).
    - `scratch`: a folder for hidden states that do not fit; a temporary one by default.
    - `batch`: windows that go through a layer at once.

    The limit is checked before anything is loaded and held against what is measured after every
    layer. Errors: `EspalierError`, with what is needed.
    """

    def __init__(
        self, folder: Folder, memory: int, *, scratch: str | Path | None = None, batch: int = 1
    ) -> None:
        if memory <= 0 or batch <= 0:
            raise EspalierError(f"memory and batch must be above 0, got {memory} and {batch}")
        self.folder, self.memory, self.batch = folder, memory, batch
        self.pieces = Pieces(folder)
        self._scratch = None if scratch is None else Path(scratch).expanduser()

    def needs(self, windows: Tensor, room: int = 0) -> dict[str, int]:
        """Bytes that each stage takes, beside what the process holds and the hidden states:
        "entry", "layer 3", "head"."""
        return stages(self.pieces, windows, self.batch, room)

    def run(
        self,
        windows: Tensor,
        visit: Visit | None = None,
        *,
        out: str | Path | None = None,
        skip: Collection[int] = (),
        room: int = 0,
        keep: bool = False,
        journal: Journal | None = None,
    ) -> Passed:
        """Take windows through the model.

        - `windows`: ids (n, t), or images (n, channels, h, w).
        - `visit(i, layer, inputs)`: sees each layer, a module of `transformers` with its weights,
          before the hidden states go through it; it may change the layer, in values or in shape.
        - `out`: a folder to which the model is written with its layers as they were left, each in
          the type in which the folder stores them. It is read again and compared.
        - `skip`: layers that are left out, also of what is written.
        - `room`: bytes that `visit` takes of its own. `keep`: the result has the last hidden states.
        - `journal`: keeps each layer that is done with, and knows those of a pass that died: it
          goes on behind them, with the same arguments.

        Errors: `EspalierError` where the limit of memory can't be kept; `DataError` for ids that
        the model does not know; `ExportError` where the changed layers are none that a
        configuration can express.
        """
        windows = self._checked(windows)
        gone = self._skipped(skip)
        with ExitStack() as stack:
            peak = stack.enter_context(Peak())
            needed, spilled = self._plan(windows, room, peak.now())
            scratch: Path | None = None
            if spilled:
                parent = None if self._scratch is None else str(self._scratch)
                scratch = Path(stack.enter_context(tempfile.TemporaryDirectory(dir=parent)))
            rewriter = None
            if out is not None:
                kept = None if journal is None else journal.written
                rewriter = Rewriter(self.pieces, Path(out).expanduser(), gone, kept)
                stack.enter_context(rewriter)
            chunks = list(torch.split(windows, self.batch))
            held = Held(scratch)
            calls = self._enter(chunks, held)
            release(self.pieces.bytes(self.pieces.entry))
            influence = [0.0] * len(calls)
            first = 0 if journal is None else journal.begin(held, influence, rewriter)
            for i in range(first, len(calls)):
                if i in gone:
                    continue
                influence[i] = self._layer(i, held, calls[i], visit, rewriter)
                release(self.pieces.bytes(self.pieces.layers[i]))
                if journal is not None:
                    journal.layer(i, held, influence, rewriter)
                self._within(peak, f"layer {i}", needed)
            loss = self._leave(chunks, held)
            self._within(peak, "the head", needed)
            if rewriter is not None:
                rewriter.finish()
            most = peak.most()
        if rewriter is not None:
            self._verify(rewriter.folder, windows[: self.batch], loss if len(chunks) == 1 else None)
        place = None if rewriter is None else rewriter.place
        return Passed(loss, most, needed, tuple(influence), place, held if keep else None)

    def _checked(self, windows: Tensor) -> Tensor:
        own = self.pieces.own
        if not own.vocabulary:
            return windows.to(self.folder.dtype)
        if windows.dim() != 2 or windows.is_floating_point() or not windows.numel():
            raise DataError(
                f"windows must be ids (n, t), got {tuple(windows.shape)} {windows.dtype}"
            )
        low, high = int(windows.min()), int(windows.max())
        if low < 0 or high >= own.vocabulary:
            raise DataError(f"ids must be within 0..{own.vocabulary - 1}, got {low}..{high}")
        if windows.shape[1] > own.context:
            raise DataError(f"windows of {windows.shape[1]} tokens: the model takes {own.context}")
        return windows

    def _skipped(self, skip: Collection[int]) -> frozenset[int]:
        count = len(self.pieces.layers)
        wrong = [i for i in skip if not 0 <= i < count]
        if wrong or len(set(skip)) == count:
            what = f"got {wrong[0]}" if wrong else "and one must stay"
            raise EspalierError(f"layers to skip are numbers from 0 to {count - 1}, {what}")
        return frozenset(skip)

    def _plan(self, windows: Tensor, room: int, held: int) -> tuple[int, bool]:
        """What the run needs in all, and whether hidden states go to disk."""
        needs, states = self.needs(windows, room), states_bytes(self.pieces, windows)
        stage = max(needs, key=lambda name: needs[name])
        bare = held + needs[stage]
        if bare > self.memory:
            raise EspalierError(
                f"a memory limit of {shown(self.memory)} can't be kept: {stage} takes "
                f"{shown(needs[stage])} and the process holds {shown(held)} already: give "
                f"{shown(bare)} or more"
            )
        spilled = bare + states > self.memory
        return bare + (0 if spilled else states), spilled

    def _within(self, peak: Peak, stage: str, needed: int) -> None:
        if (most := peak.most()) > self.memory:
            raise EspalierError(
                f"the memory limit of {shown(self.memory)} was passed at {stage}: {shown(most)} were "
                f"held, {shown(needed)} were expected: give {shown(int(1.1 * most))}, or say what "
                "the visit takes (room)"
            )

    @torch.no_grad()
    def _enter(self, chunks: list[Tensor], held: Held) -> list[list[tuple[Any, Any]]]:
        """Hidden states before the first layer, and how each layer is called: a row a layer."""
        base = self.pieces.base()
        stands = self._stand(base)
        calls: list[list[tuple[Any, Any]]] = [[] for _ in stands]
        for index, chunk in enumerate(chunks):
            if 0 < index < len(chunks) - 1:  # of the shape of the first: called the same way
                held[index] = self._embedded(base, stands, chunk)
                for row in calls:
                    row.append(row[0])
                continue
            held[index] = self._embedded(base, stands, chunk)
            last = chunk.shape == chunks[0].shape
            for row, stand in zip(calls, stands, strict=True):
                row.append(row[0] if row and last else stand.call)
        return calls

    def _stand(self, base: Any) -> list[Stand]:
        owner, name = self.pieces.stack(base)
        stands = [Stand() for _ in self.pieces.layers]
        stands[-1].last = True
        setattr(owner, name, nn.ModuleList(stands))
        return stands

    def _embedded(self, base: Any, stands: list[Stand], chunk: Tensor) -> Tensor:
        with suppress(Stop):
            base(chunk, **self._extra())
        assert stands[0].hidden is not None
        return stands[0].hidden.clone()

    def _extra(self) -> dict[str, Any]:
        return {"use_cache": False} if self.pieces.own.decoder else {}

    @torch.no_grad()
    def _layer(
        self,
        i: int,
        held: Held,
        calls: list[tuple[Any, Any]],
        visit: Visit | None,
        rewriter: Rewriter | None,
    ) -> float:
        layer, around = self.pieces.layer(i)
        inputs = Inputs(held, calls, around)
        if visit is not None:
            with torch.enable_grad():
                visit(i, layer, inputs)
            layer = around.get_submodule(self.pieces.own.layers[0].path)
            layer.requires_grad_(False)
        if rewriter is not None:
            rewriter.layer(i, layer, around)
        turned = tokens = 0.0
        for index, output in enumerate(inputs.through(layer)):
            same = nn.functional.cosine_similarity(held[index].double(), output.double(), dim=-1)
            turned, tokens = turned + float((1 - same).sum()), tokens + same.numel()
            held[index] = output
        return turned / tokens

    @torch.no_grad()
    def _leave(self, chunks: list[Tensor], held: Held) -> float | None:
        """Through the last norm and the head; the loss, where the model is a decoder."""
        self._norm(chunks, held)
        release(self.pieces.bytes(self.pieces.entry))
        if not self.pieces.own.decoder or self.pieces.own.head is None:
            return None
        total = count = 0.0
        for index, chunk, logits in self._logits(chunks, held):
            wanted = chunk[:, index + 1 : index + 1 + logits.shape[1]]
            if not wanted.shape[1]:
                continue
            found = logits[:, : wanted.shape[1]].float().flatten(0, 1)
            total += float(nn.functional.cross_entropy(found, wanted.flatten(), reduction="sum"))
            count += wanted.numel()
        return total / count if count else None

    def _norm(self, chunks: list[Tensor], held: Held) -> None:
        base = self.pieces.base()
        stands = self._stand(base)
        stands[-1].last = False
        for index, chunk in enumerate(chunks):
            stands[-1].answer = held[index]
            held[index] = base(chunk, **self._extra()).last_hidden_state

    def _logits(self, chunks: list[Tensor], held: Held) -> Iterator[tuple[int, Tensor, Tensor]]:
        """(first position, ids of the chunk, logits of some positions)."""
        whole = self.pieces.whole()
        prefix = whole.base_model_prefix
        for chunk, states in zip(chunks, held, strict=True):
            for start in range(0, states.shape[1], POSITIONS):
                part = states[:, start : start + POSITIONS]
                setattr(whole, prefix, Below(part))
                yield start, chunk, whole(chunk[:, : part.shape[1]]).logits

    def _verify(self, folder: Folder, windows: Tensor, loss: float | None) -> None:
        again = Layerwise(folder, self.memory, scratch=self._scratch, batch=self.batch)
        found = again.run(windows).loss
        if loss is not None and found is not None and not abs(found - loss) <= 1e-3 * max(1, loss):
            raise DataError(
                f"{folder.path}: what was written has a loss of {found:.4f}, in memory it was "
                f"{loss:.4f}"
            )
