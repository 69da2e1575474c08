"""Tasks: data in three disjoint splits, a loss and metrics."""

from espalier.tasks.images import ImageTask, images
from espalier.tasks.named import TASKS, make
from espalier.tasks.task import Split, Task
from espalier.tasks.tensors import TensorTask

__all__ = ["TASKS", "ImageTask", "Split", "Task", "TensorTask", "images", "make"]
