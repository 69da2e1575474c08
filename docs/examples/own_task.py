"""A task of your own: read a number off an image, as a number and not as a class."""

import torch
from sklearn.datasets import load_digits
from torch import nn

import espalier as esp


class Value(esp.tasks.TensorTask):
    metrics = (esp.Metric("mae", goal="min", how="measured"),)

    def loss(self, outputs, targets):
        return nn.functional.huber_loss(outputs[:, 0], targets)

    def measure(self, outputs, targets):
        return {"mae": float((outputs[:, 0] - targets).abs().mean())}


data = load_digits()
x = torch.tensor(data.images / 16, dtype=torch.float32)[:, None]
y = torch.tensor(data.target, dtype=torch.float32)
rows = torch.randperm(len(y), generator=torch.Generator().manual_seed(0)).split([1200, 300, 297])
splits = dict(zip(("train", "validation", "test"), ((x[i], y[i]) for i in rows), strict=True))
task = Value(splits, outputs=1, name="value of a digit")

torch.manual_seed(0)
network = nn.Sequential(nn.Flatten(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 1))
esp.train.fit(network, task, esp.Recipe(epochs=40, lr=0.1), seed=0)
print(f"mean error on validation: {esp.train.evaluate(network, task, 'validation')['mae']:.2f}")
