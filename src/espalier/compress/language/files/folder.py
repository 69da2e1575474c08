"""A local Hugging Face folder, read without running anything that it brings: safetensors only."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from espalier.compress.language.anatomy import KINDS
from espalier.compress.language.files.configuration import expressible as expressible
from espalier.compress.language.files.saving import Saved as Saved
from espalier.compress.language.files.saving import greedy as greedy
from espalier.compress.language.files.saving import save_folder as save_folder
from espalier.compress.language.files.saving import store_as as store_as
from espalier.compress.language.files.stored import (
    few,
    first_line,
    raw_config,
    refuse,
    stored_type,
    weight_files,
)
from espalier.compress.language.hush import hushed
from espalier.errors import DataError, EspalierError, MissingExtra, unknown

TOKENIZERS = (
    *("tokenizer.json", "tokenizer_config.json", "vocab.json", "vocab.txt", "tokenizer.model"),
    "spiece.model",
)


@dataclass(frozen=True)
class Folder:
    """A folder that was looked over: it can be loaded by what its own files hold.

    - `config`: the configuration, of `transformers`; `kind`: its architecture, one of `KINDS`.
    - `weights`: the files of weights; `stored`: the type in which most of the weights are there.
    - `dtype`: the type in which `model()` holds the weights.
    """

    path: Path
    config: Any
    kind: str
    weights: tuple[Path, ...]
    stored: torch.dtype
    dtype: torch.dtype

    @property
    def bytes_on_disk(self) -> int:
        """Bytes of the files of weights."""
        return sum(file.stat().st_size for file in self.weights)

    def model(self) -> Any:
        """The model, in evaluation mode. Errors: `DataError` for weights that are missing, have
        another shape than the configuration says, or are not finite."""
        made = load(model_class(self.config), self.path, self.config, self.dtype)
        for name, tensor in made.named_parameters():
            if not bool(torch.isfinite(tensor).all()):
                raise DataError(f"{self.path}: {name} holds NaN or infinite weights")
        return made

    def tokenizer(self) -> Any | None:
        """The folder's tokenizer; None where it has none: then tokens are bytes.

        Errors: `DataError` for one that can't be read or knows more tokens than the model.
        """
        if not any((self.path / name).is_file() for name in TOKENIZERS):
            return None
        from transformers import AutoTokenizer

        try:
            found = AutoTokenizer.from_pretrained(
                self.path, trust_remote_code=False, local_files_only=True
            )
        except Exception as error:
            raise DataError(
                f"{self.path}: its tokenizer can't be read: {first_line(error)}"
            ) from error
        rows = getattr(self.config, "vocab_size", None)
        if rows is not None and len(found) > rows:
            raise DataError(
                f"{self.path}: its tokenizer has {len(found)} tokens, the model's table {rows} rows: "
                "give the folder the tokenizer that the model was trained with"
            )
        return found


def read_folder(path: str | Path, *, dtype: torch.dtype | None = torch.float32) -> Folder:
    """Look a folder over; weights are only loaded by `.model()`.

    `dtype`: the type in which the model is to hold its weights; None: as they are stored.
    Errors: `DataError` for no folder, no config.json, no safetensors, a file that is broken;
    `EspalierError` for remote code, weights that are quantised, an unknown architecture.
    """
    _need_transformers()
    place = Path(path).expanduser()
    raw = raw_config(place)
    refuse(place, raw)
    kind = raw.get("model_type", "")
    if kind not in KINDS:
        raise EspalierError(f"{place}: " + unknown("architecture", str(kind), KINDS))
    weights = weight_files(place)
    stored = stored_type(weights)
    from transformers import AutoConfig

    try:
        config = AutoConfig.from_pretrained(place, trust_remote_code=False, local_files_only=True)
    except Exception as error:
        raise DataError(f"{place / 'config.json'} can't be read: {first_line(error)}") from error
    model_class(config)
    return Folder(place, config, kind, weights, stored, dtype or stored)


def is_encoder(path: str | Path) -> bool:
    """Whether a folder holds a model that reads (BERT, ViT) and writes no text; False for none."""
    try:
        kind = raw_config(Path(path).expanduser()).get("model_type", "")
    except DataError:
        return False
    return kind in KINDS and not KINDS[kind].decoder


def model_class(config: Any) -> Any:
    """The class of `transformers` for a configuration: the one that its `architectures` names.

    Errors: `EspalierError` where a decoder is not one with a language head.
    """
    import transformers
    from transformers import (
        AutoModelForCausalLM,
        AutoModelForImageClassification,
        AutoModelForMaskedLM,
    )

    kind = config.model_type
    auto = {"bert": AutoModelForMaskedLM, "vit": AutoModelForImageClassification}
    default = auto.get(kind, AutoModelForCausalLM)._model_mapping[type(config)]
    named = (getattr(config, "architectures", None) or [default.__name__])[0]
    found = getattr(transformers, str(named), None)
    if not (isinstance(found, type) and issubclass(found, transformers.PreTrainedModel)):
        raise EspalierError(f"transformers has no model {named!r}, which the configuration names")
    if KINDS[kind].decoder and found is not default:
        raise EspalierError(f"{named} gives no logits of the next token: give a {default.__name__}")
    return found


def load(
    cls: Any,
    path: Path | None,
    config: Any,
    dtype: torch.dtype,
    state: dict[str, torch.Tensor] | None = None,
    within: str = "",
    **extra: Any,
) -> Any:
    """Weights of a folder (or the tensors `state`) in a model of `transformers`, as it stores them.

    `within`: only tensors below this module must be there. `extra`: of the model's own arguments.
    Errors: `DataError`, naming what does not fit.
    """
    given = {"local_files_only": True} if path else {"state_dict": state}
    place = "" if path is None else f"{path}: "
    with hushed():
        try:
            model, said = cls.from_pretrained(
                path,
                config=config,
                dtype=dtype,
                use_safetensors=True,
                output_loading_info=True,
                ignore_mismatched_sizes=True,  # they are told in one line below
                **given,
                **extra,
            )
        except Exception as error:
            raise DataError(f"{place}its weights can't be loaded: {first_line(error)}") from error
    wrong = sorted(map(str, said.get("mismatched_keys", ())))
    if wrong:
        raise DataError(f"{place}weights have other shapes than config.json says: {few(wrong)}")
    missing = sorted(
        n for n in said["missing_keys"] if n.startswith(f"{within}." if within else "")
    )
    if missing:
        raise DataError(
            f"{place}{len(missing)} tensors are missing ({few(missing)}): the folder is not whole, "
            "or config.json is another model's"
        )
    return model.eval()


def _need_transformers() -> None:
    try:
        import transformers  # noqa: F401
    except ImportError as error:
        raise MissingExtra("transformers", "transformers") from error
