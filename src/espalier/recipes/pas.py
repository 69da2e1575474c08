"""Pruning-as-Search: binary gates on every channel, learned, then folded into a plain network."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from espalier import tasks
from espalier.compress import Pretrained
from espalier.compress.gates import Gated
from espalier.compress.masks import Place
from espalier.recipes import Recipe
from espalier.recipes._parts.gated import BEDS, Bed, best, cuttable, evenly, l1, macs, shown
from espalier.solvers.prune import Budget, budgeted
from espalier.solvers.prune import pas as search
from espalier.space import Candidate
from espalier.tasks import Task
from espalier.train import evaluate, fit
from espalier.train.seeds import generator, global_seed, mixed

SHARE = 0.4  # of the original's multiply-accumulates
NEAR = 0.02  # how far from the target the gates may end
ALIKE = 1e-4  # largest difference of outputs, plain against gated
_WEIGHTS, _TRAIN, _FINE, _SEEN = 71, 72, 73, 74  # purposes of random streams


class Branches(nn.Module):
    """A 3x3 and a 1x1 convolution and, where shapes allow, the input itself; each with a norm."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.conv3 = nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False)
        self.norm3 = nn.BatchNorm2d(outputs)
        self.conv1 = nn.Conv2d(inputs, outputs, 1, stride, bias=False)
        self.norm1 = nn.BatchNorm2d(outputs)
        self.norm0 = nn.BatchNorm2d(outputs) if stride == 1 and inputs == outputs else None

    def forward(self, x: Tensor) -> Tensor:
        out = self.norm3(self.conv3(x)) + self.norm1(self.conv1(x))
        if self.norm0 is not None:
            out = out + self.norm0(x)
        return torch.relu(out)


class Branched(nn.Module):
    """A chain of branched blocks, the first of each stage but the first at stride 2; logits."""

    def __init__(
        self, shape: Sequence[int], classes: int, widths: Sequence[int], blocks: int
    ) -> None:
        super().__init__()
        self.blocks = nn.ModuleList([Branches(shape[0], widths[0], 1)])
        before = widths[0]
        for index, width in enumerate(widths):
            for number in range(2 * blocks):
                stride = 2 if index and not number else 1
                self.blocks.append(Branches(before, width, stride))
                before = width
        self.linear = nn.Linear(before, classes)

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = block(x)
        logits: Tensor = self.linear(x.mean((2, 3)))
        return logits


class Plain(nn.Module):
    """The same chain with one 3x3 convolution a block."""

    def __init__(self, convs: Sequence[nn.Conv2d], linear: nn.Linear) -> None:
        super().__init__()
        self.convs, self.linear = nn.ModuleList(convs), linear

    def forward(self, x: Tensor) -> Tensor:
        for conv in self.convs:
            x = torch.relu(conv(x))
        logits: Tensor = self.linear(x.mean((2, 3)))
        return logits


@torch.no_grad()
def folded(model: nn.Module) -> Plain:
    """Each block's branches and norms as one convolution (RepVGG, Ding et al., 2021)."""
    assert isinstance(model, Branched)
    convs = []
    for block in model.blocks:
        assert isinstance(block, Branches)
        wide = nn.Conv2d(
            block.conv3.in_channels, block.conv3.out_channels, 3, block.conv3.stride[0], 1
        )
        kernels = [
            (block.conv3.weight, block.norm3),
            (nn.functional.pad(block.conv1.weight, (1, 1, 1, 1)), block.norm1),
        ]
        if block.norm0 is not None:
            one = torch.zeros_like(wide.weight)
            one[range(len(one)), range(len(one)), 1, 1] = 1.0
            kernels.append((one, block.norm0))
        assert wide.bias is not None
        wide.weight.zero_()
        wide.bias.zero_()
        for kernel, norm in kernels:
            assert norm.running_mean is not None
            assert norm.running_var is not None
            scale = norm.weight / (norm.running_var + norm.eps).sqrt()
            wide.weight += kernel * scale.reshape(-1, 1, 1, 1)
            wide.bias += norm.bias - norm.running_mean * scale
        convs.append(wide)
    linear = nn.Linear(model.linear.in_features, model.linear.out_features)
    linear.load_state_dict(model.linear.state_dict())
    return Plain(convs, linear).eval()


def gated(model: Branched, family: Pretrained) -> Gated:
    """A gate behind every block: it multiplies what reads the block, the shortcut's norm included.

    Folding frees each layer's width: the shortcut is a part of the kernel, and couples nothing.
    """
    places: dict[str, list[Place]] = {}
    for index, block in enumerate(model.blocks[1:]):
        assert isinstance(block, Branches)
        column = torch.arange(block.conv3.in_channels).reshape(1, -1, 1, 1)
        at = f"blocks.{index + 1}"
        found = [Place(f"{at}.conv3.weight", column), Place(f"{at}.conv1.weight", column)]
        if block.norm0 is not None:
            found.append(Place(f"{at}.norm0.weight", torch.arange(block.conv3.in_channels)))
        places[f"width:convs.{index}"] = found
    last = torch.arange(model.linear.in_features)[None]
    places[f"width:convs.{len(model.blocks) - 1}"] = [Place("linear.weight", last)]
    counts = {d.name: tuple(int(o) for o in d.options) for d in family.space.decisions}
    return Gated(model, family.space, counts, places, family=family, fold=folded)


SCALES: Mapping[str, Bed] = {
    "smoke": BEDS["smoke"],
    "cpu": replace(BEDS["cpu"], widths=(16, 24, 32)),
    "gpu": BEDS["gpu"],
}


def run(scale: str, seed: int, out: Path | None) -> dict[str, Any]:
    """Learned gates and two cuts by magnitude, each on the branched network for as many epochs."""
    bed = SCALES[scale]
    task = tasks.make(bed.task)
    with global_seed(seed, _WEIGHTS):
        model = Branched(task.shape, task.classes, bed.widths, bed.blocks)
    fit(model, task, bed.training, mixed(seed, _TRAIN))
    plain = folded(model.eval())
    family = cuttable(plain, task)
    limit = SHARE * macs(plain, task)
    found: dict[str, dict[str, Any]] = {}

    learned = search(gated(model, family), task, {"macs": limit}, settings=bed.search, seed=seed)
    ended = reached(learned.history[-1]["probabilities"], budgeted(learned.gated, {"macs": limit}))
    found["pas"] = finished(bed, learned.gated, learned.candidate, task, seed, bed.fine.epochs)
    scores = l1(family)
    for name in ("l1", "global_l1"):
        other = gated(model, family)
        budget = budgeted(other, {"macs": limit})
        candidate = evenly(budget) if name == "l1" else best(other, budget, scores)
        other.scores = dict(scores)
        epochs = bed.search.epochs + bed.fine.epochs
        found[name] = finished(bed, other, candidate, task, seed, epochs)
    return {
        "original": {
            "accuracy": evaluate(plain, task, "test")["accuracy"],
            "macs": macs(plain, task),
        },
        "limit": limit,
        "gates_ended_at": ended * limit,
        "history": [{k: h[k] for k in ("epoch", "loss", "terms")} for h in learned.history],
        "networks": found,
        "check": checked(found, ended, limit),
    }


def finished(
    bed: Bed, net: Gated, candidate: Candidate, task: Task, seed: int, epochs: int
) -> dict[str, Any]:
    """Trains on under fixed gates, folds and cuts; the plain network is what is tested."""
    net.activate(candidate)
    fit(net, task, replace(bed.fine, epochs=epochs), mixed(seed, _FINE))
    plain = net.network()
    x = torch.randn(32, *task.shape, generator=generator(seed, _SEEN))
    with torch.no_grad():
        apart = float((net.eval()(x) - plain(x)).abs().max())
    return {
        "widths": shown(candidate),
        "macs": macs(plain, task),
        "accuracy": evaluate(plain, task, "test")["accuracy"],
        "apart": apart,
    }


def reached(probabilities: Mapping[str, Sequence[float]], budget: Budget) -> float:
    """The cost that the gates ended at, as a share of the limit."""
    given = {name: torch.tensor(p, dtype=torch.float64) for name, p in probabilities.items()}
    return float(budget.capped[0].cost(given)) / budget.capped[0].most


def checked(found: Mapping[str, Mapping[str, Any]], ended: float, limit: float) -> dict[str, Any]:
    """The three claims: the target met in one run, better than L1, the plain network the same."""
    own = found["pas"]
    met = abs(ended - 1) <= NEAR and abs(own["macs"] / limit - 1) <= NEAR
    ahead = {name: own["accuracy"] - found[name]["accuracy"] for name in ("l1", "global_l1")}
    better, alike = ahead["l1"] > 0, own["apart"] <= ALIKE
    return {
        "gates_off_target": ended - 1,
        "network_off_target": own["macs"] / limit - 1,
        "ahead": ahead,
        "apart": own["apart"],
        "target_met": met,
        "better": better,
        "alike": alike,
        "holds": bool(met and better and alike),
    }


RECIPE = Recipe(
    name="pas",
    title="Pruning-as-Search: binary gates and re-parameterised widths",
    source="Li, Zhao, Yuan, Lin, Wang & Chen, Pruning-as-Search: Efficient Neural Architecture Search via "
    "Channel Pruning and Structural Reparameterization (IJCAI 2022), https://arxiv.org/abs/2206.01198",
    parts=(
        "network: a chain of blocks with a 3x3, a 1x1 and an identity branch, trained",
        "gates: a number a channel behind each block; above 0.5 it is open, the gradient passes straight "
        "through",
        "rule: gates and weights on the same batches in one training",
        "term: (multiply-accumulates / target - 1)^2, from the gates; the target narrows to the limit",
        "selection: the gates at the target; trained on; branches, norms and gates folded into one 3x3 "
        "convolution a block, closed channels cut out",
        "baselines: L1 magnitudes at one ratio (Li et al., 2017) and L1 over all layers, on the same "
        "network for as many epochs",
    ),
    works_when="In one run the gates end within 2% of 40% of the multiply-accumulates, as does the network; "
    "its test accuracy is above that of L1 pruning at one ratio with as many epochs; and the plain network "
    "computes what the gated one does, to 1e-4.",
    run=run,
    text="""
A gate of this kind does not look at how large the weights are: whether a channel is needed is learned
from the loss, and one that was closed can open again, because the gradient passes the threshold as if it
were not there.

Shortcuts usually tie the widths of all layers of a stage to one another. Here the identity is a branch of
the block, which folds into the kernel of the 3x3 convolution together with the 1x1 branch and the norms.
What is left is a chain of plain convolutions in which every layer has its own width, whatever it was.
Folding takes the gates with it: what a closed channel would have added to a shortcut is gone, its norm's
constant stays in the bias.

The gates move by plain descent with momentum, in steps that fall with the learning rate. The pull is 10
(macs / target - 1)^2 and grows to five times that; the target goes from the whole network to the limit over the first 60% of the search,
so that gates close one after the other. What differs from the paper: that narrowing; digits of 8x8 pixels
and seven blocks instead of ImageNet (the gpu scale is CIFAR-10), no distillation.

Five seeds at the scale cpu: the check holds in none. The gates end 2.3% below to 5.2% above the target, the network, cut to fit,
at most 0.4% below it. Its test accuracy is 0.3 points below that of L1 at one ratio on average (0.9 below to equal) and 0.9 above that
of L1 over all layers (1.4 below to 2.6 above). The fold is exact; a gain over one ratio does not show on a network of this size. The table is of the same seeds on another machine: there the
check holds in three, 0.4 points ahead of L1 at one ratio on average (0.3 below to 1.0 above); the test has 697 images.
""",
)
