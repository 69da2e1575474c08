"""The files of a Hugging Face folder: which there are, and which are refused before they are read."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch

from espalier.compress.language.anatomy import KINDS
from espalier.errors import DataError, EspalierError

INDEX = "model.safetensors.index.json"
_DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
# fields of a configuration by which transformers would fetch and run code from elsewhere
_KERNELS = ("_attn_implementation", "attn_implementation", "_experts_implementation")


def raw_config(place: Path) -> dict[str, Any]:
    """config.json as it is written. Errors: `DataError` where there is none, or it is no JSON."""
    what = "give a local folder with config.json and *.safetensors, as save_pretrained writes it"
    if not place.is_dir():
        raise DataError(f"no folder {str(place)!r}: {what}")
    if not (place / "config.json").is_file():
        raise DataError(f"{place} has no config.json: {what}")
    return _json(place / "config.json")


def _json(file: Path) -> dict[str, Any]:
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise DataError(f"{file} is no JSON: {first_line(error)}") from error
    if not isinstance(found, dict):
        raise DataError(f"{file} must hold a JSON object, it holds a {type(found).__name__}")
    return found


def refuse(place: Path, raw: dict[str, Any]) -> None:
    """Errors: `EspalierError` where the folder asks for code, or is not of plain weights."""
    for name in ("config.json", "tokenizer_config.json", "processor_config.json"):
        own = raw if name == "config.json" else {}
        if (file := place / name).is_file() and not own:
            own = _json(file)
        if own.get("auto_map"):
            raise EspalierError(
                f"{file} has 'auto_map': the folder brings its own Python, which is never run; give "
                f"a model of transformers itself ({', '.join(sorted(KINDS))}), without auto_map"
            )
    for key in _KERNELS:
        if "/" in str(raw.get(key, "")):
            raise EspalierError(
                f"{place / 'config.json'} has {key!r} {raw[key]!r}, code from elsewhere, which is "
                "never run: remove that line"
            )
    if raw.get("quantization_config"):
        method = raw["quantization_config"].get("quant_method", "an unknown method")
        raise EspalierError(
            f"{place}: its weights are quantised already ({method}): give the folder of the model "
            "before that"
        )
    if (place / "adapter_config.json").is_file():
        raise EspalierError(
            f"{place} holds an adapter: merge it (peft's merge_and_unload) and save the whole model"
        )


def weight_files(place: Path) -> tuple[Path, ...]:
    """The files of weights, those that transformers would take.

    Errors: `DataError` where there is no safetensors, or some are gone.
    """
    if (place / "model.safetensors").is_file():
        return (place / "model.safetensors",)
    if (place / INDEX).is_file():
        names = sorted(set(_json(place / INDEX).get("weight_map", {}).values()))
        files = tuple(place / Path(str(name)).name for name in names)
        gone = [file.name for file in files if not file.is_file()]
        if gone or not files:
            raise DataError(f"{place}: files that {INDEX} names are missing: {few(gone)}")
        return files
    others = sorted(file.name for file in place.glob("*.safetensors"))
    if others:
        raise DataError(
            f"{place} has {few(others)}, but no {INDEX} that says what is where: save it again "
            "with save_pretrained"
        )
    old = sorted(file.name for file in (*place.glob("*.bin"), *place.glob("*.pt*")))
    if old:
        raise DataError(
            f"{place} has no *.safetensors, only {few(old)}, which can run code when opened: where "
            "you trust it, load it with transformers and call model.save_pretrained(folder)"
        )
    raise DataError(f"{place} has no *.safetensors: save the model with save_pretrained(folder)")


def stored_type(files: tuple[Path, ...]) -> torch.dtype:
    """The type of most of the weights. Errors: `DataError` for a file that is not whole."""
    from safetensors import safe_open

    sizes: dict[str, int] = {}
    for file in files:
        try:
            with safe_open(file, "pt") as opened:
                for name in opened.keys():  # noqa: SIM118
                    part = opened.get_slice(name)
                    count = 1
                    for side in part.get_shape():
                        count *= side
                    sizes[part.get_dtype()] = sizes.get(part.get_dtype(), 0) + count
        except Exception as error:
            raise DataError(f"{file} is no whole safetensors file: {first_line(error)}") from error
    most = max(sizes, key=lambda name: sizes[name], default="F32")
    if most not in _DTYPES:
        raise DataError(
            f"{files[0].parent}: most weights are stored as {most}: give a folder of "
            f"{', '.join(_DTYPES)}"
        )
    return _DTYPES[most]


def first_line(error: Exception) -> str:
    """What another library's error says, in one line."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


def few(names: list[str]) -> str:
    """The first names of a list, and how many more there are."""
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
