import math

import pytest
import torch

from espalier.errors import DataError
from espalier.tasks.tokens import encoder, token_text
from espalier.testing.task import check_task

TEXT = bytes(range(256)) * 40


def test_keeps_the_rules_of_tasks() -> None:
    check_task(token_text(TEXT, 256, 16, windows=(40, 8, 8)))


def test_no_token_is_in_two_splits() -> None:
    places = (b"%06d " % i for i in range(4000))
    task = token_text(b"".join(places), 256, 34, windows=(999, 999, 999))
    seen: dict[str, set[bytes]] = {}
    for split in ("train", "validation", "test"):
        rows = [bytes(row.tolist()) for row in task.windows(split)]
        seen[split] = {w for row in rows for w in row.split() if len(w) == 6}
        assert seen[split]
    assert not seen["train"] & seen["validation"]
    assert not seen["train"] & seen["test"]
    assert not seen["validation"] & seen["test"]


def test_loss_is_that_of_the_next_token_and_bits_are_of_bytes() -> None:
    pair = lambda text: [ord(a) % 64 for a in text[::2]]  # noqa: E731  # a token is two bytes
    task = token_text(b"ab" * 600, 64, 8, encode=pair)
    assert task.bytes_a_token == 2
    outputs = torch.zeros(3, 8, 64)
    outputs[..., ord("a") % 64] = 4.0
    found = task.measure(outputs, task.windows("test", 3)[:, 1:])
    wanted = math.log(math.exp(4) + 63) - 4
    assert found["loss"] == pytest.approx(wanted, rel=1e-5)
    assert found["bits_per_byte"] == pytest.approx(wanted / math.log(2) / 2, rel=1e-5)


def test_seed_deals_otherwise_and_only_the_seed() -> None:
    first, same, other = (token_text(TEXT, 256, 20, seed=s) for s in (1, 1, 2))
    assert first.fingerprint == same.fingerprint != other.fingerprint


@pytest.mark.parametrize(
    ("text", "vocabulary", "context", "told"),
    [
        (b"", 256, 8, "is empty"),
        (b"short", 256, 8, "5 tokens, too short for a context of 8"),
        (b"a little longer than that one", 256, 16, "set the context to 8 or less"),
        (TEXT, 64, 8, "fewer than the 256 bytes"),
        (TEXT, 256, 1, "2 tokens or more"),
    ],
)
def test_bad_input_is_one_line(text: bytes, vocabulary: int, context: int, told: str) -> None:
    with pytest.raises(DataError, match=told) as error:
        token_text(text, vocabulary, context)
    assert "\n" not in str(error.value)


def test_tokenizers_are_checked(tmp_path) -> None:
    ids = lambda text: [300] * len(text)  # noqa: E731
    with pytest.raises(DataError, match="token 300 and the model has 256"):
        token_text(b"x" * 99, 256, 8, encode=ids)
    (tmp_path / "t.txt").write_bytes(b"\xff\xfe" * 99)
    with pytest.raises(DataError, match="no UTF-8"):
        token_text(tmp_path / "t.txt", 512, 8, encode=ids)
    with pytest.raises(DataError, match="no file"):
        token_text(tmp_path / "none.txt", 256, 8)
    assert encoder(None) is None


def test_of_a_long_text_pieces_from_all_over_it_are_read(tmp_path, monkeypatch) -> None:
    monkeypatch.setattr("espalier.tasks.tokens._MOST", 64_000)
    (tmp_path / "t.txt").write_bytes(b"".join(b"%07d\n" % i for i in range(40_000)))
    task = token_text(tmp_path / "t.txt", 256, 15, windows=(9999, 9999, 9999))
    lines = [b"".join(bytes(w.tolist()) for w in task.windows(s)) for s in ("train", "test")]
    numbers = [int(x) for text in lines for x in text.split() if len(x) == 7]
    assert max(numbers) > 39_000
    assert min(numbers) < 1000


def test_a_long_text_that_is_no_utf_8_is_refused_but_not_for_its_cut_ends(
    tmp_path, monkeypatch
) -> None:
    monkeypatch.setattr("espalier.tasks.tokens._MOST", 64_000)
    line = "é" * 5000  # no line ends: pieces are cut through characters
    (tmp_path / "long.txt").write_text("x" + line * 20)
    encode = lambda text: [1] * len(text)  # noqa: E731
    assert token_text(tmp_path / "long.txt", 256, 8, encode=encode).tokens > 30_000
    for size in (8, 20):  # read whole, and in pieces
        (tmp_path / "latin.txt").write_bytes(line.encode("latin-1") * size)
        with pytest.raises(DataError, match="no UTF-8"):
            token_text(tmp_path / "latin.txt", 256, 8, encode=encode)
