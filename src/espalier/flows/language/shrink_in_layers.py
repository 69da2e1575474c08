"""Shrinking a language model that does not fit in memory: layer by layer, under a limit of memory."""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from espalier.compress.language.files.folder import Folder, read_folder
from espalier.compress.language.layer_by_layer.layerwise import Layerwise
from espalier.compress.language.layer_by_layer.memory import shown
from espalier.compress.language.layer_by_layer.narrow import Harms, narrow_room, narrowed
from espalier.errors import BudgetError, EspalierError
from espalier.flows.language.fit_in_layers import Fit, check_reach, fits, group_shares
from espalier.flows.language.identity import fingerprint
from espalier.flows.language.limits import language_limits
from espalier.flows.language.passes import UNDERWAY, Passes
from espalier.flows.language.room import check_place
from espalier.flows.measuring import withdraw
from espalier.flows.progress import Display, Silent
from espalier.problem import Limit, Limits
from espalier.study import Study
from espalier.tasks.tokens import TokenText, encoder, token_text

RECORD = "in_layers.json"
_UNITS = (0.875, 0.75, 0.625, 0.5, 0.375, 0.25)
_GROUPS = (0.75, 0.5)
_CONTEXT = 512


@dataclass(frozen=True)
class InLayers:
    """A model that was shrunk without ever being in memory whole.

    - `fit`: what went; `tried`: the other shapes that were measured, with calibration loss.
    - `bytes`: of the files of weights, (before, after). `loss`: on held-out text, nats a token,
      (before, after); `rivals`: the same of other ways to as few bytes.
    - `peak`: the most resident memory of the process, measured; `limit`: what it had to keep.
    """

    path: Path
    fit: Fit
    tried: tuple[tuple[Fit, float], ...]
    bytes: tuple[int, int]
    loss: tuple[float, float]
    rivals: dict[str, float]
    peak: int
    limit: int
    seconds: float

    def to_json(self) -> dict[str, Any]:
        """Plain JSON."""
        tried = [{**fit.to_json(), "calibration_loss": loss} for fit, loss in self.tried]
        return {**vars(self), "path": str(self.path), "fit": self.fit.to_json(), "tried": tried}

    def lines(self) -> list[str]:
        """What is to be said of it."""
        gone = ", ".join(map(str, self.fit.gone)) or "none"
        told = [
            f"{self.path}: {self.bytes[1]:,} of {self.bytes[0]:,} bytes",
            f"held-out loss {self.loss[1]:.4f} nats a token, before {self.loss[0]:.4f}",
            *(f"  {name} left out: {loss:.4f}" for name, loss in self.rivals.items()),
            f"blocks that went: {gone}; units that stay: {self.fit.units:.0%}, "
            f"groups of heads: {self.fit.groups:.0%}",
            f"memory: {shown(self.peak)} at most, of {shown(self.limit)}",
        ]
        return told


def shrink_in_layers(
    model: str | Path,
    text: str | Path | bytes,
    *,
    within: Limits | Sequence[Limit],
    memory: int,
    out: str | Path,
    context: int | None = None,
    windows: tuple[int, int, int] = (64, 8, 64),
    tries: int = 4,
    seed: int = 0,
    batch: int = 4,
    resume: bool = False,
    progress: Display | None = None,
) -> InLayers:
    """Makes a model keep a limit of bytes while at most `memory` bytes are resident.

    All layers keep one shape, so that `transformers` loads the result. One pass reads what each
    block, each width and each number of heads harms its layer's output, after what stays took over;
    for each pair of widths the blocks that may go are found; the `tries` of least harm are passed
    through the calibration windows, and the best by their loss is written. It is then tested, once,
    on held-out windows beside leaving out the last blocks and those of least influence.

    - `within`: a limit on bytes alone. `text`, `context`, `windows`: as in `shrink_language`.
    - `batch`: windows that go through a layer at once.
    - `resume`: goes on with a run into `out` that died, behind the last layer that it finished, to
      the same result; `memory` may be another. Until the end, `out` has the hidden states on disk.

    Errors: `EspalierError` where the limit of memory can't be kept, with what is needed;
    `BudgetError` for a limit that is not on bytes, or below what is reachable; `StudyError` where
    what is resumed is another model, text, limit or setting.
    """
    began, show = time.time(), progress or Silent()
    limit, where = _limit(within), Path(out)
    folder = read_folder(model)
    check_place(where, folder)
    task = _text(folder, text, context, windows, seed)
    through = Layerwise(folder, memory, scratch=where / UNDERWAY, batch=batch)
    identity = {
        "model": fingerprint(folder), "task": task.name, "data": task.fingerprint, "seed": seed,
        "limits": [limit.exact()], "in layers": {"tries": tries, "batch": batch},
    }  # fmt: skip
    study = (
        Study.resume(where, identity)
        if resume
        else Study.create(where, identity, {"memory": memory}, seed)
    )
    try:
        with study, show:
            for line in study.notes:
                show.note(line)
            done = _shrunk(Passes(through, study, show), task, limit, tries)
            found = replace(done, seconds=time.time() - began)
        (where / RECORD).write_text(json.dumps(found.to_json(), indent=1))
        shutil.rmtree(where / UNDERWAY, ignore_errors=True)
        return found
    except EspalierError as error:
        with Study.open(where) as known:
            nothing = not known.recorded() and not any((where / UNDERWAY).glob("*/*.json"))
        if resume:
            raise
        if nothing or isinstance(error, BudgetError):  # this limit is never kept
            shutil.rmtree(where / UNDERWAY, ignore_errors=True)
            withdraw(where)
            raise
        error.args = (f"{error}; what is finished is kept: go on with --resume",)
        raise


def _shrunk(passes: Passes, task: TokenText, limit: Limit, tries: int) -> InLayers:
    through, pieces, where = passes.through, passes.through.pieces, passes.study.folder
    calibration, test = task.windows("train"), task.windows("test")
    room = max(
        narrow_room(layer) + pieces.layer_bytes(i) for i, layer in enumerate(pieces.own.layers)
    )
    before = pieces.bytes(pieces.files, through.folder.stored)
    allowed = limit.resolve(before).bound
    harms = Harms(_UNITS, group_shares(pieces, _GROUPS))
    check_reach(pieces, min(_UNITS), min((1.0, *harms.group_shares)), allowed)
    first = passes("sensitivity", calibration, harms, found=harms, room=room)
    tried = []
    for number, fit in enumerate(fits(pieces, harms, allowed)[:tries]):
        visit = narrowed(fit.units, fit.groups)
        done = passes(f"trying {number + 1}", calibration, visit, skip=fit.gone, room=room)
        tried.append((fit, done.loss))
        passes.show.best(f"calibration loss {min(loss for _, loss in tried):.4f}")
    best = min(tried, key=lambda pair: pair[1])[0]
    visit = narrowed(best.units, best.groups)
    passes("writing", calibration, visit, skip=best.gone, room=room, out=where)
    small = Layerwise(read_folder(where), through.memory, batch=through.batch)
    after = passes("test", test, through=small).loss
    losses = (passes("test: the original", test).loss, after)
    rivals = {
        name: passes(f"test: {name}", test, skip=gone).loss
        for name, gone in _rivals(through, first.influence, allowed).items()
    }
    sizes = (before, small.pieces.bytes(small.pieces.files, small.folder.stored))
    return InLayers(
        where, best, tuple(tried), sizes, losses, rivals, passes.peak, through.memory, 0.0
    )


def _rivals(
    through: Layerwise, influence: Sequence[float], allowed: float
) -> dict[str, tuple[int, ...]]:
    """Whole blocks left out until the limit is kept: the last ones but one, and those of least
    influence (Men et al., ShortGPT, 2024)."""
    pieces, found = through.pieces, {}
    count = len(pieces.layers)
    orders = {
        "last blocks": [*range(count - 2, -1, -1)],
        "least influence": sorted(range(count), key=lambda i: influence[i])[:-1],
    }
    for name, order in orders.items():
        size = pieces.bytes(pieces.files, pieces.folder.stored)
        gone = []
        for i in order:
            if size <= allowed:
                break
            gone.append(i)
            size -= pieces.bytes(pieces.layers[i], pieces.folder.stored)
        if size <= allowed:
            found[name] = tuple(sorted(gone))
    return found


def _limit(within: Limits | Sequence[Limit]) -> Limit:
    asked, _ = language_limits(within)
    if len(asked) != 1 or asked[0].metric != "bytes":
        told = ", ".join(map(str, asked))
        raise BudgetError(f"with a limit of memory, the limit is one on bytes, got {told}")
    return asked[0]


def _text(
    folder: Folder,
    text: str | Path | bytes,
    context: int | None,
    windows: tuple[int, int, int],
    seed: int,
) -> TokenText:
    most = int(getattr(folder.config, "max_position_embeddings", None) or _CONTEXT)
    length = context or min(most - 1, _CONTEXT)
    if not 2 <= length < most:
        raise EspalierError(f"a context of this model is 2 to {most - 1} tokens, got {length}")
    encode = encoder(folder.tokenizer())
    return token_text(text, int(folder.config.vocab_size), length, encode, windows, seed)
