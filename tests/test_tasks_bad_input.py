"""Data that can't be used: one line that says which item and what was expected."""

import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils.data import Dataset

from espalier import tasks
from espalier.errors import DataError


def good(n=30, classes=3):
    rng = np.random.default_rng(0)
    return rng.random((n, 4, 4, 3)).astype(np.float32), np.arange(n) % classes


def refused(*patterns, source=None, **options):
    with pytest.raises(DataError) as caught:
        tasks.images(source, **options)
    line = str(caught.value)
    assert "\n" not in line
    for pattern in patterns:
        assert pattern in line, line


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_not_finite_names_the_item(value):
    x, y = good()
    x[17, 2, 1, 0] = value
    refused("x[17]", "NaN", source=(x, y))


def test_not_finite_in_the_test_set_names_the_array():
    x, y = good()
    bad = x.copy()
    bad[3] = np.nan
    refused("x_test[3]", source={"x_train": x, "y_train": y, "x_test": bad, "y_test": y})


def test_one_class():
    x, y = good()
    refused("two classes", "got 1", source=(x, y * 0))


@pytest.mark.parametrize("shape", [(30,), (30, 16), (30, 2, 4, 4, 3), (30, 0, 4, 3)])
def test_wrong_shape(shape):
    refused("(n, h, w", str(shape), source=(np.zeros(shape), good()[1]))


def test_wrong_dtype():
    x, y = good()
    refused("dtype", "<U", source=(x.astype(str), y))
    refused("whole-number labels", "float64", source=(x, y.astype(float)))
    refused("whole-number labels", "(30, 3)", source=(x, np.eye(3, dtype=int)[y]))


def test_labels_out_of_range():
    x, y = good()
    y = y.copy()
    y[4] = -1
    refused("y[4] = -1", source=(x, y))


def test_label_gap_and_rare_class():
    x, y = good()
    refused("class '1' has 0 examples", "0..2", source=(x, np.where(y == 1, 0, y)))
    rare = np.zeros(30, dtype=int)
    rare[:2] = 1
    refused("class '1' has 2 examples", "3 or more", source=(x, rare))


def test_label_of_test_that_train_does_not_have():
    x, y = good()
    other = y.copy()
    other[0] = 3
    refused("'3'", "0 examples", source={"x_train": x, "y_train": y, "x_test": x, "y_test": other})


def test_lengths_and_shapes_that_do_not_match():
    x, y = good()
    refused("30 images and 29 labels", source=(x, y[:-1]))
    arrays = {"x_train": x, "y_train": y, "x_test": x[:, :3], "y_test": y}
    refused("one shape", source=arrays)


def test_more_than_there_is_and_less_than_the_classes():
    refused("train=31", source=good(), train=31)
    refused("validation=2", "3 classes", source=good(), validation=2)
    refused("size", "0", source=good(), size=0)


def test_unknown_names_say_the_nearest():
    with pytest.raises(DataError, match=r"unknown task 'digit'\. Did you mean 'digits'"):
        tasks.make("digit")
    with pytest.raises(DataError, match="Did you mean 'validation'"):
        tasks.make("digits:validatoin=100")
    with pytest.raises(DataError, match="whole number, got 'many'"):
        tasks.make("digits:train=many")


def test_missing_path():
    with pytest.raises(DataError, match=r"no file or folder '/nowhere/at/all'"):
        tasks.make("/nowhere/at/all:size=16")
    refused("no file or folder", "x.npz", source="nowhere/x.npz")


def test_missing_data_says_what_to_put_where(monkeypatch, tmp_path):
    monkeypatch.delenv("ESPALIER_DATA", raising=False)
    refused("ESPALIER_DATA", "mnist/mnist.npz", "x_train", source="mnist")
    monkeypatch.setenv("ESPALIER_DATA", str(tmp_path))
    refused("cifar10_jpeg.npz", "train_jpeg", str(tmp_path), source="cifar10")


def test_npz_that_can_not_be_read(tmp_path):
    path = tmp_path / "bad.npz"
    path.write_bytes(b"not a zip")
    refused("bad.npz", "can't read", source=str(path))
    np.save(tmp_path / "single.npy", np.zeros(3))
    refused("single.npy", "not an .npz", source=tmp_path / "single.npy")
    np.savez(tmp_path / "objects.npz", x=np.array([{}], dtype=object), y=np.zeros(1))
    refused("objects.npz", source=tmp_path / "objects.npz")
    np.savez(tmp_path / "names.npz", images=np.zeros(3))
    refused("x and y", "images", source=tmp_path / "names.npz")


def write(path, size=(4, 4)):
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.random.default_rng(0).integers(0, 255, (*size, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(path)


def folder(tmp_path):
    for label in "ab":
        for i in range(4):
            write(tmp_path / label / f"{i}.png")
    return tmp_path


@pytest.mark.parametrize("content", [b"", b"no image", None])
def test_unreadable_image_names_the_file(tmp_path, content):
    path = folder(tmp_path) / "b" / "2.png"
    path.write_bytes(path.read_bytes()[:60] if content is None else content)
    refused("can't read the image file", str(path), source=tmp_path)


def test_sizes_that_differ_name_the_file_and_the_way_out(tmp_path):
    write(folder(tmp_path) / "b" / "2.png", (5, 7))
    refused("give a size", source=tmp_path)
    assert tasks.images(tmp_path, size=3).shape == (3, 3, 3)


def test_folders_without_classes(tmp_path):
    refused("two or more classes", source=tmp_path)
    write(tmp_path / "only" / "1.png")
    refused("two or more classes", "found 1", source=tmp_path)
    (tmp_path / "empty").mkdir()
    refused("holds no image file", "empty", source=tmp_path)


def test_test_folder_with_a_class_of_its_own(tmp_path):
    folder(tmp_path / "train")
    write(tmp_path / "test" / "zebra" / "1.png")
    refused("zebra", source=tmp_path)


class Broken(Dataset):
    def __init__(self, item):
        self.item = item

    def __len__(self):
        return 5

    def __getitem__(self, i):
        if i == 3:
            return self.item(i)
        return torch.zeros(1, 4, 4), i % 2


@pytest.mark.parametrize(
    ("item", "pattern"),
    [
        (lambda i: torch.zeros(1, 4, 4), "(image, label) pair"),
        (lambda i: (torch.zeros(1, 5, 4), 0), "(1, 5, 4)"),
        (lambda i: 1 / 0, "ZeroDivisionError"),
        (lambda i: (torch.zeros(1, 4, 4), "cat"), "ValueError"),
    ],
)
def test_dataset_items_that_can_not_be_used(item, pattern):
    refused("item 3 of the train dataset", pattern, source=(Broken(item), Broken(item)))


def test_something_else_entirely():
    refused("int", source=42)


def test_tensor_task_refuses_what_it_can_not_use():
    x, y = torch.zeros(4, 3), torch.zeros(4)
    splits = {"train": (x, y), "validation": (x, y), "test": (x, y)}

    class Own(tasks.TensorTask):
        def loss(self, outputs, targets):
            return outputs.sum()

        def measure(self, outputs, targets):
            return {}

    with pytest.raises(DataError, match="'test' is missing"):
        Own({"train": (x, y), "validation": (x, y)}, 1)
    with pytest.raises(DataError, match="4 inputs and 3 targets"):
        Own({**splits, "test": (x, y[:3])}, 1)
    with pytest.raises(DataError, match="shape"):
        Own({**splits, "test": (x[:, :2], y)}, 1)
    bad = y.clone()
    bad[2] = torch.nan
    with pytest.raises(DataError, match="validation target 2"):
        Own({**splits, "validation": (x, bad)}, 1)
