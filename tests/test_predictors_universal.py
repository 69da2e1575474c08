"""The universal predictors against sums by hand, and what they must not depend on."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from scipy.stats import spearmanr

from espalier.errors import DataError
from espalier.estimators.predictors.opgraph import Operator, OpGraph, OpGraphs, canonical, stack
from espalier.estimators.predictors.ranking import Learning
from espalier.estimators.predictors.text import Reading, TextRanker, tokens
from espalier.estimators.predictors.universal import (
    Sizes,
    Universal,
    centres,
    contrast,
    memberships,
    read,
    similarity,
    spectra,
)

RNG = np.random.default_rng(0)


def chain(kinds: list[str], width: int = 8) -> OpGraph:
    """Operators one after the other; convolutions have weights."""
    return canonical(
        Operator(
            kind,
            weights=((width, width, 3, 3),) if kind == "Conv" else (),
            inputs=(i - 1,),
            shapes=((width, 8, 8),),
            output=(width, 8, 8),
        )
        for i, kind in enumerate(kinds)
    )


def some(n: int) -> OpGraphs:
    kinds = [RNG.choice(["Conv", "Relu", "AveragePool"], RNG.integers(2, 9)) for _ in range(n)]
    return stack([chain([str(k) for k in ks]) for ks in kinds])


def test_spectra_of_a_path_are_its_cosines() -> None:
    graphs = stack([chain(["Relu"] * 5), chain(["Relu"] * 9)])
    found = spectra(graphs, points=5)[0]
    # the normalised Laplacian of a path of n nodes has 1 - cos(pi k / (n - 1))
    assert found == pytest.approx(1 - np.cos(np.pi * np.arange(5) / 4), abs=1e-9)


def test_similarity_and_contrast_by_hand() -> None:
    near = similarity(np.array([[0.0, 0.0], [0.3, 0.1], [9.0, 9.0]]), 0.5)
    assert near[0, 1] == pytest.approx(np.exp(-(0.09 + 0.01) / 2 / 0.25))
    assert near.diagonal().tolist() == [0, 0, 0]
    z = torch.nn.functional.normalize(torch.randn(4, 3), dim=1)
    weight = torch.rand(4, 4)
    weight.fill_diagonal_(0)
    by_hand = 0.0
    for i in range(4):
        others = [j for j in range(4) if j != i]
        alike = {j: float(z[i] @ z[j]) / 0.2 for j in others}
        total = np.log(sum(np.exp(a) for a in alike.values()))
        share = weight[i] / weight[i].sum()
        by_hand -= sum(float(share[j]) * (alike[j] - total) for j in others) / 4
    assert float(contrast(z, weight, 0.2)) == pytest.approx(by_hand, abs=1e-4)


def test_fuzzy_clusters_find_the_groups() -> None:
    groups = torch.tensor([[0.0, 0.0], [5.0, 0.0], [0.0, 5.0]])
    z = groups.repeat(20, 1) + 0.1 * torch.randn(60, 2)
    found = min(
        (centres(z, 3, seed) for seed in range(5)),
        key=lambda c: float(torch.cdist(groups, c).min(1).values.sum()),
    )
    assert torch.cdist(groups, found).min(1).values.max() < 0.3
    member = memberships(z, found)
    assert member.sum(1).tolist() == pytest.approx([1.0] * 60, abs=1e-5)
    near, far = 1 / 0.5**2, 1 / 1.5**2
    two = memberships(torch.tensor([[0.5]]), torch.tensor([[0.0], [2.0]]))
    assert two[0].tolist() == pytest.approx([near / (near + far), far / (near + far)])


def test_padding_and_order_do_not_matter() -> None:
    one, long = chain(["Conv", "Relu", "Conv"]), chain(["Relu"] * 12)
    learner = Universal(6, Sizes(steps=0, flops=False))
    vocabulary = ("", "Conv", "Relu", "AveragePool", "?")
    learner.pretrain(stack([one, long], vocabulary))
    assert learner.network is not None
    learner.network.eval()
    with torch.no_grad():
        padded = learner.network.embed(read(stack([one, long], vocabulary)))[0]
        alone = learner.network.embed(read(stack([one], vocabulary)))[0]
    assert torch.allclose(padded, alone, atol=1e-5)


def test_it_ranks_graphs_and_survives_a_file() -> None:
    graphs, more = some(80), some(60)
    quality = [(g.operators == 2).sum(1) - 0.3 * (g.operators == 1).sum(1) for g in (graphs, more)]
    learner = Universal(len(graphs.vocabulary), Sizes(steps=20), Learning(80, 3e-3, batch=64))
    learner.pretrain(graphs)
    learner.fit(graphs, quality[0])
    found = learner.predict(more)[0]
    assert spearmanr(found, quality[1]).statistic > 0.75
    again = Universal(len(graphs.vocabulary), Sizes(steps=20))
    again.restore(learner.arrays())
    assert np.array_equal(again.predict(more)[0], found)
    twin = Universal(len(graphs.vocabulary), Sizes(steps=20), Learning(80, 3e-3, batch=64))
    torch.manual_seed(5)
    twin.pretrain(graphs)
    twin.fit(graphs, quality[0])
    assert np.array_equal(twin.predict(more)[0], found)
    json.dumps(learner.settings())
    with pytest.raises(DataError, match="pretrain or fit first"):
        Universal(5).predict(more)


def test_text_is_read_as_words_and_sizes() -> None:
    line = "Conv(group=1, kernel_shape=3x3, w16x3x3x3, 3x32x32)->16x32x32"
    assert tokens(line)[:5] == ["conv", "group", "#0", "kernel_shape", "#3"]
    assert tokens("Relu(20x9x9)") == ["relu", "#9", "#6", "#6"]
    assert tokens("Relu(21x9x9)") == tokens("Relu(20x9x9)")  # near sizes read alike


def test_text_ranks_networks_and_survives_a_file() -> None:
    kinds = [[str(k) for k in RNG.choice(["Conv", "Relu"], 6)] for _ in range(120)]
    lines = [chain(k).lines() for k in kinds]
    quality = np.array([k.count("Conv") for k in kinds], dtype=float)
    small = Reading(width=16, lines=8)
    learner = TextRanker(small, Learning(60, 3e-3, batch=64))
    learner.fit(lines[:80], quality[:80])
    found, std = learner.predict(lines[80:])
    assert spearmanr(found, quality[80:]).statistic > 0.8
    assert (std == 0).all()
    again = TextRanker(small)
    again.restore(learner.arrays())
    assert np.array_equal(again.predict(lines[80:])[0], found)
    with pytest.raises(DataError, match="fit first"):
        TextRanker().predict(lines)
