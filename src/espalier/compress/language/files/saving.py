"""A model as a folder that plain `transformers` loads, loaded again and compared before it counts."""

from __future__ import annotations

import copy
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
from safetensors import SafetensorError
from torch import Tensor, nn

from espalier.compress.language.anatomy import Anatomy, anatomy
from espalier.compress.language.files.configuration import expressed, idle
from espalier.compress.language.hush import hushed
from espalier.errors import ExportError
from espalier.export import disk

TOLERANCE = 1e-4  # of the largest logit, or of 1; half precision is off by its rounding
_ROUNDING = {torch.float16: 1e-2, torch.bfloat16: 4e-2}
TOKENS = 64  # generated greedily, with cache
COPIED = (  # what belongs to a tokenizer or an image processor; never Python, never weights
    *("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json"),
    *("vocab.json", "merges.txt", "vocab.txt", "tokenizer.model", "spiece.model"),
    *("chat_template.jinja", "chat_template.json", "preprocessor_config.json"),
    "processor_config.json",
)


@dataclass(frozen=True)
class Saved:
    """What was written and how it was checked.

    - `bytes`: of the files of weights. `config`: fields of the configuration that changed, each
      (before, after).
    - `difference`: the largest of logits, relative to the largest logit (or 1).
    - `tokens`: how many greedy tokens, generated with cache, were found equal; 0 for an encoder.
    """

    path: Path
    files: tuple[Path, ...]
    bytes: int
    difference: float
    tokens: int
    config: dict[str, tuple[Any, Any]]


def save_folder(
    model: Any,
    path: str | Path,
    tokenizer_from: str | Path | None = None,
    *,
    example: Tensor | None = None,
    was: Any = None,
) -> Saved:
    """Write a folder that plain `transformers` loads, and check that it does.

    - `tokenizer_from`: the folder whose tokenizer goes along.
    - `example`: inputs on which both are compared, ids `(b, t)` or images; random by default.
    - `was`: a configuration, to say what changed; the model's own by default.

    It is loaded again as a stranger would: logits agree within 1e-4 of the largest (half precision:
    its rounding) and greedy tokens, generated with cache, are equal; nothing appears in the folder
    before. Errors: `ExportError` where the configuration can't express the model (see
    `expressible`), where what is loaded computes something else, or the folder can't be written.
    """
    source = None if tokenizer_from is None else Path(tokenizer_from).expanduser()
    place = Path(path).expanduser()
    if source is not None and place.resolve() == source.resolve():
        raise ExportError(f"{place} is the folder of the original: choose another to write to")
    try:
        config = expressed(model)
    except ExportError as error:
        raise ExportError(
            f"a {anatomy(model).kind} configuration can't say what this model is: {error}; make "
            "layers of one shape (grouped), or export to ONNX"
        ) from error
    with disk.staging(place) as stage:
        whole = _without(model, idle(model))
        before, whole.config = whole.config, config
        try:
            with hushed():
                whole.save_pretrained(stage)
        except SafetensorError as error:
            raise ExportError(f"can't write to {place}: {error}") from error
        finally:
            whole.config = before
        for name in COPIED if source is not None else ():
            if (file := cast(Path, source) / name).is_file():
                shutil.copyfile(file, stage / name)
        difference, tokens = compare(model, stage, config, example)
        for file in place.glob("model*.safetensors*"):  # of a model that was here before
            file.unlink()
        files = tuple(disk.settle(stage, place))
    size = sum(file.stat().st_size for file in files if file.suffix == ".safetensors")
    return Saved(place, files, size, difference, tokens, _changed(was or before, config))


def compare(
    model: Any, path: Path, config: Any, example: Tensor | None = None
) -> tuple[float, int]:
    """Load a folder with plain `transformers` and compare it with a model: the largest difference
    of logits, relative, and the number of equal greedy tokens. Errors: `ExportError`."""
    with hushed():
        loaded = (
            type(model)
            .from_pretrained(path, dtype=model.dtype, use_safetensors=True, local_files_only=True)
            .eval()
        )
    own = anatomy(model)
    inputs = samples(own, model) if example is None else example
    wanted, found = (logits(net, inputs) for net in (model, loaded))
    scale = max(1.0, float(wanted.abs().max()))
    gap = float((wanted - found).abs().max()) / scale
    allowed = _ROUNDING.get(model.dtype, TOLERANCE)
    if not gap <= allowed:
        raise ExportError(
            f"the folder, loaded by transformers, computes something else: logits differ by "
            f"{gap:.2g}, at most {allowed:g} is allowed; nothing was written"
        )
    if not own.decoder:
        return gap, 0
    prompt = inputs[:1, : max(1, min(inputs.shape[1], own.context // 4))]
    count = max(1, min(TOKENS, own.context - prompt.shape[1]))
    one, two = (greedy(net, prompt, count) for net in (model, loaded))
    if not torch.equal(one, two):
        first = int((one != two).nonzero()[0][-1])
        raise ExportError(
            f"the folder, loaded by transformers, writes another text: token {first + 1} of {count} "
            "generated with cache differs; nothing was written"
        )
    return gap, count


def samples(own: Anatomy, model: Any, rows: int = 2, length: int = 24) -> Tensor:
    """Seeded random inputs of a model: ids (rows, length), or images."""
    draw = torch.Generator().manual_seed(0)
    if own.vocabulary:
        return torch.randint(own.vocabulary, (rows, min(length, own.context)), generator=draw)
    config, size = model.config, model.config.image_size
    high, wide = (size, size) if isinstance(size, int) else size
    return torch.rand(rows, config.num_channels, high, wide, generator=draw).to(model.dtype)


@torch.no_grad()
def logits(model: Any, inputs: Tensor) -> Tensor:
    """What a model gives for inputs, without cache, in float32: (b, t, vocabulary) or (b, classes);
    hidden states where it has no head."""
    extra = {"use_cache": False} if anatomy(model).decoder else {}
    out = model(inputs, **extra)
    found: Tensor = out.logits if hasattr(out, "logits") else out.last_hidden_state
    return found.float()


@torch.no_grad()
def greedy(model: Any, prompt: Tensor, count: int, cache: Any = None) -> Tensor:
    """The `count` most likely tokens after a prompt (b, t), one by one with cache: (b, count).

    `cache`: one of `transformers` to fill; the model's own by default. No end token stops it.
    """
    found, step = [], prompt
    for _ in range(count):
        out = model(step, past_key_values=cache, use_cache=True)
        cache, step = out.past_key_values, out.logits[:, -1:].argmax(-1)
        found.append(step)
    return torch.cat(found, 1)


@torch.no_grad()
def store_as(model: nn.Module, dtype: torch.dtype) -> None:
    """Puts what a folder holds of a model in a type, in place. What is made from the configuration
    (rotary frequencies) stays as it is: `transformers` makes it anew in full when it loads."""
    for tensor in model.state_dict(keep_vars=True).values():
        if tensor.is_floating_point():
            tensor.data = tensor.data.to(dtype)


def _without(model: Any, gone: tuple[int, ...]) -> Any:
    """The model, or one without the layers `gone` that shares its weights."""
    if not gone:
        return model
    own = anatomy(model)
    stack = own.layers[0].path.rpartition(".")[0]
    memo = {id(tensor): tensor for tensor in (*model.parameters(), *model.buffers())}
    twin = copy.deepcopy(model, memo)
    layers = cast(nn.ModuleList, twin.get_submodule(stack))
    parent, _, name = stack.rpartition(".")
    kept = nn.ModuleList(layer for i, layer in enumerate(layers) if i not in gone)
    setattr(twin.get_submodule(parent), name, kept)
    return twin


def _changed(before: Any, after: Any) -> dict[str, tuple[Any, Any]]:
    old, new = before.to_dict(), after.to_dict()
    skipped = ("architectures", "dtype", "transformers_version", "_name_or_path")
    return {
        name: (old.get(name), value)
        for name, value in new.items()
        if name not in skipped and old.get(name) != value
    }
