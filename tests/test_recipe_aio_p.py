"""Parts of the recipe aio-p: its tasks, its adapters, what each arm may learn from."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from espalier import recipes
from espalier.errors import DataError
from espalier.estimators.predictors.opgraph import Operator, OpGraph, stack
from espalier.estimators.predictors.universal import read
from espalier.recipes import aio_p
from espalier.recipes.aio_p import Adapted, Known, Plan, Predictor, Sizes, Steps

SMALL = Sizes(width=16, layers=2, small=8, hidden=16)


def chain(width: int, depth: int, outputs: int) -> OpGraph:
    """A chain of convolutions and a head."""
    nodes = [
        Operator(
            "Conv", (("kernel_shape", "3x3"),), ((width, width, 3, 3),), (i - 1,), (), (width, 4, 4)
        )
        for i in range(depth)
    ]
    head = Operator("Gemm", (), ((outputs, width),), (depth - 1,), (), (outputs,))
    return OpGraph((*nodes, head))


def pretended(n: int = 40) -> Known:
    """Three tasks with labels that are formulas: box is what class says, on another scale."""
    rng = np.random.default_rng(0)
    widths, depths = rng.integers(2, 40, n), rng.integers(1, 6, n)
    graphs = [
        chain(int(w), int(d), outputs)
        for outputs in (10, 36, 4)
        for w, d in zip(widths, depths, strict=True)
    ]
    together = stack(graphs)
    good = np.log(widths) + depths / 2.0
    labels = {"class": 60 + 5 * good, "mask": 80 - depths * 1.0, "box": 50 + 2 * good}
    kinds = enumerate(labels)
    return Known(labels, {k: together.take(slice(i * n, (i + 1) * n)) for i, k in kinds})


# --- the tasks ----------------------------------------------------------------------------------


def test_boxes_and_masks_are_where_the_ink_is() -> None:
    digits = np.random.default_rng(0).random((20, 8, 8))
    digits[:, :2] = 0  # nothing in the upper quarter
    images, mask, box = aio_p.placed(digits, 1)
    assert images.shape == (20, 1, 12, 12)
    for image, cells, (left, top, right, bottom) in zip(images[:, 0], mask, box, strict=True):
        rows, columns = np.nonzero(image.numpy() > aio_p.INK)
        expected = [columns.min(), rows.min(), columns.max() + 1, rows.max() + 1]
        assert [float(v) * 12 for v in (left, top, right, bottom)] == pytest.approx(expected)
        means = image.numpy().reshape(6, 2, 6, 2).mean((1, 3))
        assert np.array_equal(cells.numpy().reshape(6, 6) > 0, means > aio_p.INK)
    assert len({tuple(b.tolist()) for b in box}) > 10  # places differ


def test_the_overlap_of_boxes_is_that_of_their_cells() -> None:
    rng = np.random.default_rng(0)
    corners = np.sort(rng.integers(0, 9, (50, 2, 2, 2)), axis=2)  # box, pair, end, axis
    a, b = (torch.tensor(corners[:, i].reshape(50, 4)).float() for i in (0, 1))
    found = aio_p.overlap(a, b)
    for i in range(50):
        cells = []
        for left, top, right, bottom in (a[i].int().tolist(), b[i].int().tolist()):
            cells.append({(x, y) for x in range(left, right) for y in range(top, bottom)})
        union = len(cells[0] | cells[1])
        expected = len(cells[0] & cells[1]) / union if union else 0.0
        assert float(found[i]) == pytest.approx(expected)


def test_the_metrics_are_1_for_the_truth_and_less_for_a_guess() -> None:
    for kind in aio_p.TASKS:
        task = aio_p.Placed(kind)
        _, targets = next(iter(task.batches("test", 500)))
        perfect = targets
        if kind == "class":
            perfect = torch.nn.functional.one_hot(targets, 10).float()
        if kind == "mask":
            perfect = 2 * targets - 1
        assert task.measure(perfect, targets) == {"score": pytest.approx(1.0)}
        assert task.measure(perfect.flip(0), targets)["score"] < 0.7
        assert task.classes == perfect.shape[1]


# --- the predictor ------------------------------------------------------------------------------


def test_an_adapter_learns_and_the_backbone_stays_as_it_was() -> None:
    given = pretended()
    every = np.arange(40)
    predictor = Predictor(given, SMALL, Steps(20), 0)
    predictor.pretrain(("class",), every)
    before = {k: v.clone() for k, v in predictor.network.encoder.state_dict().items()}
    predictor.network.adapt()
    start = {k: v.clone() for k, v in predictor.network.adapters.state_dict().items()}
    aio_p.learn(
        predictor.network,
        predictor.batches["mask"],
        aio_p.standard(given.labels["mask"]),
        Steps(20),
    )
    after = predictor.network.encoder.state_dict()
    assert all(torch.equal(v, after[k]) for k, v in before.items())
    moved = predictor.network.adapters.state_dict()
    assert all(not torch.equal(v, moved[k]) for k, v in start.items())


def test_the_states_are_those_of_the_encoder() -> None:
    batch = read(stack([chain(8, 3, 4), chain(4, 1, 10)]))
    encoder = Adapted(4, SMALL).encoder
    embedded, layers = aio_p.states(encoder, batch)
    assert torch.equal(embedded, encoder(*batch.graphs))
    assert layers.shape == (2, SMALL.layers, SMALL.width)
    alone = aio_p.states(encoder, read(stack([chain(4, 1, 10)], ("", "Conv", "Gemm", "?"))))[1]
    assert torch.allclose(layers[1], alone[0], atol=1e-6)  # padding counts for nothing
    assert not any(norm._forward_hooks for norm in encoder.norm)


def test_without_steps_the_labels_give_mean_and_deviation_only() -> None:
    given = pretended()
    predictor = Predictor(given, SMALL, Steps(60), 0)
    predictor.pretrain(("class", "mask"), np.arange(40))
    rows = np.arange(10)
    found = predictor.predict("box", rows, None)
    labels = given.labels["box"]
    given.labels["box"] = 7 + 3 * labels
    assert np.allclose(predictor.predict("box", rows, None), 7 + 3 * found)
    given.labels["box"] = np.where(np.arange(40) < 10, labels, np.nan)
    for how in (None, Steps(5)):  # the other labels are not looked at
        assert np.isfinite(predictor.predict("box", rows, how)).all()


def test_what_other_tasks_know_helps_where_the_target_is_alike() -> None:
    given, plan = pretended(), Plan(networks=40, sizes=SMALL, pretraining=Steps(120, 5e-3))
    how = {"aio_p": Steps(30, 1e-3), "scratch": Steps(60, 3e-3)}
    for own in range(2):
        found = aio_p.split(given, plan, own, how)
        assert found["no_adapter"]["mae"] < found["scratch"]["mae"]
        assert found["no_adapter"]["spearman"] > 0.8
        assert found["measured_class"]["mae"] < 1e-9  # a line of class is the truth
        assert found["mean"]["spearman"] == 0


def test_the_verdict_counts_splits() -> None:
    better, worse = {"mae": 1.0, "spearman": 0.6}, {"mae": 2.0, "spearman": 0.5}
    arms = {"aio_p": [better] * 4 + [worse], "scratch": [worse] * 4 + [better]}
    arms |= {f"{arm}_unseen": rows for arm, rows in arms.items()}
    check = aio_p.judged(arms)
    assert check["holds"]
    assert check["wins"]["both"] == 4
    assert check["aio_p"]["mae"] == pytest.approx(1.2)
    half = {"mae": 1.0, "spearman": 0.4}  # a lower error alone is no win
    assert not aio_p.judged({**arms, "aio_p": [better] * 3 + [half] * 2})["holds"]


# --- the whole ----------------------------------------------------------------------------------


def test_trainings_are_kept_and_go_on_where_they_ended(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    trained = []

    def one(task: aio_p.Placed, *_: object) -> tuple[list[float], list[object]]:
        trained.append(task.kind)
        if len(trained) == 8:
            raise KeyboardInterrupt
        return [float(len(trained)), 2.0 + len(trained)], chain(4, 2, task.classes).to_json()

    monkeypatch.setattr(aio_p, "_one", one)
    with pytest.raises(KeyboardInterrupt):
        aio_p.known(4, 1, 2, tmp_path)
    found = aio_p.known(4, 1, 2, tmp_path)
    assert len(trained) == 8 + 6  # two networks were kept, two were trained anew
    assert found.labels["class"].tolist() == [2, 5, 10, 13]  # means of two
    assert len(found.graphs["box"]) == 4
    assert len(aio_p.known(4, 1, 2, tmp_path).labels["box"]) == 4
    assert len(trained) == 14
    (file,) = tmp_path.iterdir()
    file.write_text("damaged")
    with pytest.raises(DataError, match="delete it"):
        aio_p.known(4, 1, 2, tmp_path)


def test_the_recipe_runs(tmp_path: Path) -> None:
    found = json.loads(json.dumps(recipes.run("aio-p", "smoke", 0, tmp_path)))
    assert found["check"]["splits"] == 2
    assert set(found["labels"]) == set(aio_p.TASKS)
    again = json.loads(json.dumps(recipes.run("aio-p", "smoke", 0, tmp_path)))
    assert again == found
