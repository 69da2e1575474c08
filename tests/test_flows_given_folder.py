"""Folders of BERT and ViT that classify, shrunk for a task like any other model."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from typer.testing import CliRunner

import espalier as esp
from espalier.cli import app
from espalier.errors import EspalierError
from espalier.flows.decisions import make_cuts
from espalier.flows.given import given_model
from espalier.flows.shrink import pretrained
from espalier.problem import Metric
from espalier.solvers.allocate import Program, cost_factors
from espalier.tasks.tensors import TensorTask
from quick import QUICK

transformers = pytest.importorskip("transformers")
pytest.importorskip("ortools")

WORDS, LENGTH = 64, 16


class FirstWord(TensorTask):
    """Rows of word numbers `(b, 16)`; the class is told by the first."""

    metrics = (Metric("accuracy", "", "max", "measured"),)

    def __init__(self) -> None:
        rows = torch.randint(0, WORDS, (96, LENGTH), generator=torch.Generator().manual_seed(0))
        classes = rows[:, 0] % 4
        parts = {"train": slice(0, 48), "validation": slice(48, 72), "test": slice(72, 96)}
        super().__init__({k: (rows[s], classes[s]) for k, s in parts.items()}, 4, "first word")

    def prepare(self, inputs: Tensor, generator: Any, augment: bool) -> Tensor:
        return inputs.long()

    def loss(self, outputs: Tensor, targets: Tensor) -> Tensor:
        return nn.functional.cross_entropy(outputs, targets)

    def measure(self, outputs: Tensor, targets: Tensor) -> dict[str, float]:
        return {"accuracy": float((outputs.argmax(1) == targets).float().mean())}


@pytest.fixture(scope="module")
def bert(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(0)
    config = transformers.BertConfig(
        vocab_size=WORDS, hidden_size=16, num_hidden_layers=1, num_attention_heads=2,
        intermediate_size=32, max_position_embeddings=32, num_labels=4,
    )  # fmt: skip
    folder = tmp_path_factory.mktemp("bert")
    transformers.BertForSequenceClassification(config).save_pretrained(folder)
    return folder


def test_a_bert_is_shrunk_by_an_own_task_of_word_numbers(bert: Path, tmp_path: Path) -> None:
    found = esp.shrink(
        bert, FirstWord(), within={"params": "70%"}, budget="3 trials", decisions="width:steps=2,depth",
        repair=False, baselines=False, on=QUICK, out=tmp_path / "run",
    )  # fmt: skip
    network, ids = found.network(), torch.randint(0, WORDS, (3, LENGTH))
    original = transformers.BertForSequenceClassification.from_pretrained(bert).eval()
    count = sum(p.numel() for p in network.parameters())
    assert count <= 0.7 * sum(p.numel() for p in original.parameters())
    assert network(ids).shape == (3, 4)
    with torch.no_grad():
        assert torch.equal(found.network(found.original)(ids), original(ids).logits)


def test_tables_of_a_bert_add_up_and_never_build_what_is_forbidden(bert: Path) -> None:
    task = FirstWord()
    model, example = given_model(bert, task, None, None)
    family = pretrained(model, example, task, make_cuts("width:steps=2,depth"))
    space = family.space
    assert not space.valid(space.corner(last=False))[0]  # otherwise this shows nothing
    program = Program(space, (), {"params": cost_factors(family, "params")}, ())
    rows = space.sample(12, np.random.default_rng(0))
    told = program.values(rows)[1]["params"]
    for candidate, params in zip(space.decode(rows), told, strict=True):
        assert sum(p.numel() for p in family.build(candidate).parameters()) == params


def test_the_command_takes_a_vit_for_a_task(tmp_path: Path) -> None:
    config = transformers.ViTConfig(
        image_size=8, patch_size=4, num_channels=1, hidden_size=16, num_hidden_layers=1,
        num_attention_heads=4, intermediate_size=32, num_labels=10,
    )  # fmt: skip
    transformers.ViTForImageClassification(config).save_pretrained(tmp_path)
    words = ["shrink", str(tmp_path), "--task", "digits", "--explain", "--json"]
    done = CliRunner().invoke(app, words)
    assert done.exit_code == 0, done.output
    decided = {row.get("decision") for row in json.loads(done.stdout)}
    assert "width:model.vit.layers.0.attention.q_proj" in decided


def test_a_folder_of_a_language_model_is_told_its_own_way(tmp_path: Path) -> None:
    config = transformers.LlamaConfig(
        vocab_size=32, hidden_size=16, num_hidden_layers=1, num_attention_heads=2,
        intermediate_size=16,
    )  # fmt: skip
    transformers.LlamaForCausalLM(config).save_pretrained(tmp_path / "llama")
    with pytest.raises(EspalierError, match=r"writes text.*shrink_language"):
        esp.shrink(tmp_path / "llama", "digits", within={"params": "70%"})
