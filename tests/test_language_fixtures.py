"""The language models that recipes share: their text, their training, the stories' folder."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("transformers")

from espalier.recipes._parts import language

SMALL = {"hidden_size": 16, "num_hidden_layers": 1, "intermediate_size": 16}


def test_what_is_fresh_was_not_trained_on() -> None:
    train, fresh = (language.byte_text(part) for part in ("train", "fresh"))
    assert 0.15 < len(fresh) / len(train + fresh) < 0.25
    fresh.decode()  # whole lines, so whole characters
    lines = [line for line in fresh.splitlines() if len(line) > 60]
    known = set(train.splitlines())
    assert sum(line in known for line in lines) < 0.1 * len(lines)  # the library repeats itself


def test_windows_are_of_the_text_and_of_the_seed() -> None:
    first, again = (language.windows("fresh", 3, 5, 40) for _ in range(2))
    assert first.shape == (3, 40)
    assert torch.equal(first, again)
    assert not torch.equal(first, language.windows("fresh", 3, 6, 40))
    text = language.byte_text("fresh")
    assert all(bytes(row.tolist()) in text for row in first)


def test_answers_of_lookups_are_told_before() -> None:
    rows, asked = language.lookups(2, 0, 64)
    assert asked.sum(1).tolist() == [2 * (64 // 12)] * 2
    for row, mask in zip(rows, asked, strict=True):
        lines = bytes(row.tolist()).decode().splitlines()
        told, second = lines[:5], lines[5:10]
        assert sorted(told) == sorted(second)
        assert len({line[:2] for line in told}) == 5
        assert bytes(row[mask].tolist()).decode() == "".join(line[3:] for line in second)


@pytest.mark.parametrize("kind", ["dense", "experts"])
def test_a_byte_model_learns_and_is_kept(kind, tmp_path) -> None:
    own = SMALL if kind == "dense" else {**SMALL, "num_local_experts": 4}
    model = language.byte_model(kind, 0, 12, tmp_path, **own)
    x = language.windows("fresh", 8, 0, 64)
    with torch.inference_mode():
        start = float(language.fresh_model(kind, 0, **own)(input_ids=x, labels=x).loss)
        assert float(model(input_ids=x, labels=x).loss) < start - 0.2
    again = language.byte_model(kind, 0, 12, **own)  # not from the folder
    pairs = zip(model.parameters(), again.parameters(), strict=True)
    assert all(torch.equal(a, b) for a, b in pairs)
    (folder,) = tmp_path.iterdir()
    assert (folder / "fresh.txt").read_bytes() == language.byte_text("fresh")
    assert (folder / "model.safetensors").exists()


@pytest.mark.data
def test_the_folder_of_stories_computes_what_the_weights_do(real_data, tmp_path) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from espalier.recipes._parts import stories
    from espalier.recipes._parts.stories_folder import stories_folder

    folder = stories_folder(tmp_path)
    model = AutoModelForCausalLM.from_pretrained(folder)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    text = stories.read_text("text", "warandpeace", "warandpeace.txt.xz")[200_000:205_000]
    text += "two  spaces, \u00f6, \u2603\n\t and \u65e5\u672c "
    ids = tokenizer(text)["input_ids"]
    assert ids == stories.Tokens.read().encode(text)
    assert tokenizer.decode(ids) == text
    x = torch.tensor(ids[:512]).reshape(2, 256)
    with torch.inference_mode():
        assert torch.allclose(model(x).logits, stories.model()(x), atol=5e-4)
