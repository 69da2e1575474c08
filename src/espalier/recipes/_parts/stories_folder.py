"""The Llama of 260,032 weights as a Hugging Face folder, with its tokens as `tokenizer.json`."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

from torch import Tensor

from espalier.errors import MissingExtra
from espalier.recipes._parts import stories

_MARKS = ("<unk>", "<s>", "</s>")
_SPACE = "\u2581"
_NAMES = {
    "query": "self_attn.q_proj",
    "key": "self_attn.k_proj",
    "value": "self_attn.v_proj",
    "out": "self_attn.o_proj",
    "gate": "mlp.gate_proj",
    "up": "mlp.up_proj",
    "down": "mlp.down_proj",
    "norm1": "input_layernorm",
    "norm2": "post_attention_layernorm",
}


def stories_folder(out: str | Path) -> Path:
    """The folder `stories260k` under `out`: written where it is not there.

    Plain `transformers` loads it, model and tokenizer. Errors: `DataError` without the weights.
    """
    folder = Path(out) / "stories260k"
    if not folder.exists():
        begun = folder.with_name("stories260k.part")
        shutil.rmtree(begun, ignore_errors=True)
        stories_model().save_pretrained(begun)
        stories_tokenizer().save_pretrained(begun)
        begun.rename(folder)
    return folder


def stories_model() -> Any:
    """The model as `LlamaForCausalLM`, float32, ready to run."""
    transformers = _transformers()
    source = stories.model()
    sizes = source.sizes
    config = transformers.LlamaConfig(
        vocab_size=sizes.vocabulary,
        hidden_size=sizes.width,
        intermediate_size=sizes.hidden,
        num_hidden_layers=sizes.depth,
        num_attention_heads=sizes.heads,
        num_key_value_heads=sizes.groups,
        max_position_embeddings=sizes.context,
        rms_norm_eps=sizes.eps,
        rope_parameters={"rope_type": "default", "rope_theta": sizes.theta},
        tie_word_embeddings=True,
        bos_token_id=1,
        eos_token_id=2,
    )
    weights = source.state_dict()
    embedding = weights.pop("embed.weight")
    found = {"model.embed_tokens.weight": embedding, "lm_head.weight": embedding}
    found["model.norm.weight"] = weights.pop("norm.weight")
    head = sizes.width // sizes.heads
    for name, weight in weights.items():
        _, layer, part, _ = name.split(".")
        turned = _halves(weight, head) if part in ("query", "key") else weight
        found[f"model.layers.{layer}.{_NAMES[part]}.weight"] = turned
    made = transformers.LlamaForCausalLM(config)
    made.load_state_dict(found)
    return made.eval()


def _halves(weight: Tensor, head: int) -> Tensor:
    """Rows of each head reordered: pairs that turn together are half a head apart, not neighbours."""
    pairs = weight.reshape(-1, head // 2, 2, weight.shape[1])
    return pairs.transpose(1, 2).reshape(weight.shape)


def stories_tokenizer() -> Any:
    """Its byte pairs as a `transformers` tokenizer: the same tokens as `stories.Tokens` gives."""
    transformers = _transformers()
    from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers

    pieces = stories.Tokens.read().pieces
    vocabulary = {piece: i for i, piece in enumerate(pieces)}
    # every way to put a piece together has the piece's rank
    merges = [
        (piece[:at], piece[at:])
        for piece in pieces[stories.FIRST_MERGE :]
        for at in range(1, len(piece))
        if piece[:at] in vocabulary and piece[at:] in vocabulary
    ]
    made = Tokenizer(
        models.BPE(vocab=vocabulary, merges=merges, unk_token=_MARKS[0], byte_fallback=True)
    )
    made.normalizer = normalizers.Sequence(
        [normalizers.Prepend(_SPACE), normalizers.Replace(" ", _SPACE)]
    )
    # no piece goes over the start of a word
    made.pre_tokenizer = pre_tokenizers.Split(_SPACE, "merged_with_next")
    made.decoder = decoders.Sequence(
        [
            decoders.Replace(_SPACE, " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            decoders.Strip(" ", 1, 0),
        ]
    )
    unknown, begin, end = _MARKS
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=made,
        unk_token=unknown,
        bos_token=begin,
        eos_token=end,
        clean_up_tokenization_spaces=False,
    )


def _transformers() -> Any:
    try:
        import transformers
    except ImportError as error:
        raise MissingExtra("transformers", "transformers") from error
    return transformers
