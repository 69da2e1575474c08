"""Image tasks: splits, normalisation, sizes, sources, augmentation."""

import importlib.util
import pickle
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils.data import Dataset

from espalier import tasks
from espalier.tasks.augment import random_crop, random_flip
from espalier.tasks.split import Counts, split
from espalier.testing.task import check_task

SPLITS = ("train", "validation", "test")


def numbered(n=90, classes=3, side=6):
    """Images whose first pixel tells which item they are; labels in turn."""
    rng = np.random.default_rng(0)
    x = rng.integers(0, 200, (n, side, side, 3), dtype=np.uint8)
    x[:, 0, 0, 0] = np.arange(n)
    return x, np.arange(n) % classes


def stored(task, name):
    return task._splits[name]


class Pairs(Dataset):
    def __init__(self, x, y):
        self.x, self.y = x, y

    def __len__(self):
        return len(self.y)

    def __getitem__(self, i):
        return self.x[i], self.y[i]


def test_digits_keeps_the_rules_of_tasks():
    task = tasks.make("digits")
    check_task(task)
    assert task.shape == (1, 8, 8)
    assert task.classes == 10
    assert sum(task.size(s) for s in SPLITS) == 1797


def test_splits_are_disjoint_and_complete():
    x, y = numbered()
    task = tasks.images((x, y))
    items = [set(stored(task, s)[0][:, 0, 0, 0].tolist()) for s in SPLITS]
    assert set.union(*items) == set(range(90))
    assert sum(map(len, items)) == 90


def test_splits_keep_the_share_of_each_class():
    y = np.repeat([0, 1, 2], [600, 300, 100])
    rows = split(y, 3, None, Counts(train=300, validation=100, test=200), seed=3)
    assert np.bincount(y[rows["train"]]).tolist() == [180, 90, 30]
    assert np.bincount(y[rows["validation"]]).tolist() == [60, 30, 10]
    assert np.bincount(y[rows["test"]]).tolist() == [120, 60, 20]


def test_split_is_a_function_of_the_seed():
    x, y = numbered()
    a, b, c = (tasks.images((x, y), seed=s) for s in (1, 1, 2))
    assert a.fingerprint == b.fingerprint != c.fingerprint


def test_rare_class_stands_in_every_split():
    y = np.array([0] * 500 + [1] * 3)
    rows = split(y, 2, None, Counts(), seed=0)
    assert all((y[rows[s]] == 1).sum() == 1 for s in SPLITS)


def test_a_source_with_a_test_set_keeps_it_apart():
    x, y = numbered(60)
    task = tasks.images({"x_train": x[:40], "y_train": y[:40], "x_test": x[40:], "y_test": y[40:]})
    assert set(stored(task, "test")[0][:, 0, 0, 0].tolist()) == set(range(40, 60))
    assert task.size("train") + task.size("validation") == 40


def test_train_is_normalised_by_its_own_statistics():
    task = tasks.images(numbered())
    x = torch.cat([b for b, _ in task.batches("train", 16)])
    assert torch.allclose(x.mean((0, 2, 3)), torch.zeros(3), atol=1e-5)
    assert torch.allclose(x.std((0, 2, 3), unbiased=False), torch.ones(3), atol=1e-5)
    raw = stored(task, "test")[0].float() / task.normalisation["white"]
    expected = (raw - torch.tensor(task.normalisation["mean"])) / torch.tensor(
        task.normalisation["std"]
    )
    got = torch.cat([b for b, _ in task.batches("test", 16)])
    assert torch.allclose(got, expected.permute(0, 3, 1, 2), atol=1e-5)


def test_a_constant_channel_does_not_divide_by_zero():
    x, y = numbered()
    x[..., 1] = 7
    batch, _ = next(iter(tasks.images((x, y)).batches("train", 8)))
    assert torch.isfinite(batch).all()


def test_size_averages_areas():
    x = np.zeros((12, 4, 4), dtype=np.float32)
    x[:, :2, :2] = [[0, 1], [2, 5]]
    task = tasks.images((x, np.arange(12) % 2), size=2)
    assert task.shape == (1, 2, 2)
    assert torch.equal(stored(task, "train")[0][0, :, :, 0], torch.tensor([[2.0, 0], [0, 0]]))


def test_size_can_enlarge():
    assert tasks.make("digits:size=12,train=100").shape == (1, 12, 12)


@pytest.mark.parametrize("layout", ["nhw", "nhwc", "nchw", "torch"])
def test_layouts_give_the_same_task(layout):
    x = np.random.default_rng(0).integers(0, 255, (30, 5, 6), dtype=np.uint8)
    y = np.arange(30) % 2
    given = {"nhw": x, "nhwc": x[..., None], "nchw": x[:, None], "torch": torch.from_numpy(x)}
    expected = tasks.images((x, y))
    got = tasks.images((given[layout], y), name="arrays")
    assert got.shape == (1, 5, 6)
    assert got.fingerprint == expected.fingerprint


def test_wide_integers_are_pixels_and_floats_stay():
    x, y = numbered()
    assert stored(tasks.images((x.astype(np.int64), y)), "train")[0].dtype == torch.uint8
    assert stored(tasks.images((x / 255, y)), "train")[0].dtype == torch.float32


def test_npz_with_and_without_a_test_set(tmp_path):
    x, y = numbered(60)
    np.savez(tmp_path / "one.npz", x=x, y=y)
    np.savez(tmp_path / "two.npz", x_train=x[:40], y_train=y[:40], x_test=x[40:], y_test=y[40:])
    one = tasks.make(f"{tmp_path}/one.npz:train=20,size=3")
    assert (one.size("train"), one.shape, one.name) == (20, (3, 3, 3), "one")
    assert tasks.images(tmp_path / "two.npz").size("test") == 20


def write_folder(root, x, y, parts=("",)):
    for part in parts:
        for i, (image, label) in enumerate(zip(x, y, strict=True)):
            path = root / part / f"class{label}" / f"{i:03}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(image).save(path)


def test_folder_of_class_folders(tmp_path):
    x, y = numbered(30)
    write_folder(tmp_path / "pets", x, y)
    task = tasks.make(str(tmp_path / "pets"))
    assert task.name == "pets"
    assert task.class_names == ("class0", "class1", "class2")
    for name in SPLITS:
        pixels, labels = stored(task, name)
        items = pixels[:, 0, 0, 0].numpy()
        assert np.array_equal(pixels.numpy(), x[items])
        assert np.array_equal(labels.numpy(), y[items])


def test_folder_with_train_and_test_and_a_size(tmp_path):
    x, y = numbered(30)
    write_folder(tmp_path, x, y, ("train", "test"))
    task = tasks.images(tmp_path, size=3)
    assert task.size("test") == 30
    assert task.shape == (3, 3, 3)
    expected = x.reshape(30, 3, 2, 3, 2, 3).mean((2, 4))
    assert np.abs(np.sort(stored(task, "test")[0].numpy(), 0) - np.sort(expected, 0)).max() <= 1


def test_grey_files_have_one_channel(tmp_path):
    x, y = numbered(12)
    write_folder(tmp_path, x[..., 0], y)
    assert tasks.images(tmp_path).shape == (1, 6, 6)


def test_only_the_chosen_files_are_decoded(tmp_path):
    x, y = numbered(90)
    write_folder(tmp_path, x, y)
    task = tasks.images(tmp_path, train=6, validation=3, test=3)
    used = {int(i) for s in SPLITS for i in stored(task, s)[0][:, 0, 0, 0]}
    for i in set(range(90)) - used:
        next(tmp_path.rglob(f"{i:03}.png")).write_bytes(b"broken")
    again = tasks.images(tmp_path, train=6, validation=3, test=3)
    assert again.fingerprint == task.fingerprint


def test_pair_of_torch_datasets():
    x, y = numbered(60)
    tensors = torch.from_numpy(x).permute(0, 3, 1, 2)
    task = tasks.images((Pairs(tensors[:40], y[:40]), Pairs(tensors[40:], y[40:])))
    arrays = tasks.images(
        {"x_train": x[:40], "y_train": y[:40], "x_test": x[40:], "y_test": y[40:]}
    )
    assert task.fingerprint == arrays.fingerprint


def test_batches_are_channels_last_and_lose_nothing():
    task = tasks.images(numbered())
    for x, _ in task.batches("train", 8, torch.Generator().manual_seed(0), augment=True):
        assert x.is_contiguous(memory_format=torch.channels_last)
    labels = torch.cat([y for _, y in task.batches("validation", 7)])
    assert torch.equal(labels, stored(task, "validation")[1])


def test_a_last_batch_of_one_is_dropped_in_training_only():
    x, y = numbered(33)
    task = tasks.images((x, y), train=17)
    assert sum(len(b) for _, b in task.batches("train", 8, torch.Generator())) == 16
    assert sum(len(b) for _, b in task.batches("train", 8)) == 17


def test_random_crop_shifts_whole_images():
    images = torch.arange(1, 1 + 50 * 4 * 4 * 2).reshape(50, 4, 4, 2)
    got = random_crop(images, 1, torch.Generator().manual_seed(0))
    padded = torch.nn.functional.pad(images, (0, 0, 1, 1, 1, 1))
    seen = set()
    for i in range(50):
        fits = [
            (dy, dx)
            for dy in range(3)
            for dx in range(3)
            if torch.equal(got[i], padded[i, dy : dy + 4, dx : dx + 4])
        ]
        assert len(fits) == 1
        seen.add(fits[0])
    assert len(seen) == 9


def test_random_flip_mirrors_about_half():
    images = torch.arange(200 * 2 * 3 * 1).reshape(200, 2, 3, 1)
    got = random_flip(images, torch.Generator().manual_seed(0))
    same = (got == images).all(dim=(1, 2, 3))
    mirrored = (got == images.flip(2)).all(dim=(1, 2, 3))
    assert bool((same ^ mirrored).all())
    assert 70 < int(mirrored.sum()) < 130


def test_digits_are_neither_mirrored_nor_shifted():
    task = tasks.make("digits")
    assert (task.flip, task.shift) == (False, 0)
    assert tasks.images(numbered()).flip is True
    assert tasks.images(numbered(side=16)).shift == 2


def test_augmented_batches_are_shifted_and_mirrored():
    x, y = numbered(side=16)
    task = tasks.images((x, y))
    plain = next(task.batches("train", 30, torch.Generator().manual_seed(0)))
    augmented = next(task.batches("train", 30, torch.Generator().manual_seed(0), augment=True))
    assert torch.equal(plain[1], augmented[1])
    changed = (plain[0] != augmented[0]).flatten(1).any(1)
    assert int(changed.sum()) > 25


def test_a_pickled_task_gives_the_same_batches():
    task = tasks.images(numbered())
    copy = pickle.loads(pickle.dumps(task))
    for (a, _), (b, _) in zip(task.batches("train", 9), copy.batches("train", 9), strict=True):
        assert torch.equal(a, b)


def test_the_fingerprint_sees_one_pixel_and_one_label():
    x, y = numbered()
    before = tasks.images((x, y)).fingerprint
    x[5, 3, 3, 1] += 1
    changed = tasks.images((x, y)).fingerprint
    y = y.copy()
    y[:3] = y[[1, 0, 2]]
    assert len({before, changed, tasks.images((x, y)).fingerprint}) == 3


def test_own_task_example_runs(capsys, monkeypatch):
    path = Path(__file__).parents[1] / "docs" / "examples" / "own_task.py"
    assert len(path.read_text().splitlines()) <= 30
    spec = importlib.util.spec_from_file_location("own_task", path)
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, "own_task", module)  # so that its class can be pickled
    spec.loader.exec_module(module)
    check_task(module.task)
    printed = capsys.readouterr().out
    assert printed.startswith("mean error on validation:")
    assert float(printed.split()[-1]) < 1.5  # guessing the mean is wrong by 2.5


@pytest.mark.data
def test_mnist(real_data):
    task = tasks.make("mnist:size=16,train=200,validation=100,test=100")
    check_task(task)
    assert task.shape == (1, 16, 16)
    assert task.normalisation["mean"][0] == pytest.approx(0.1307, abs=0.01)


@pytest.mark.data
def test_cifar10_decodes_what_is_asked(real_data):
    task = tasks.make("cifar10:size=16,train=200,validation=100,test=100")
    check_task(task)
    assert task.shape == (3, 16, 16)
    assert torch.equal(torch.bincount(stored(task, "train")[1]), torch.full((10,), 20))
    assert task.class_names[8] == "ship"
