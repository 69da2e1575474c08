"""Zero-cost proxies, each against a computation of its own on a network small enough to follow."""

from __future__ import annotations

import copy
import gc
import math
import weakref

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn.functional import cross_entropy

from espalier import nets, tasks
from espalier.errors import EspalierError
from espalier.estimators.zero_cost import ALL, MEASURES, ZeroCost, complexity, scores
from espalier.estimators.zero_cost.entropy import Shape, depth_entropy
from espalier.estimators.zero_cost.w_pca import components, principal
from espalier.testing.estimator import check_estimator


class Net(nn.Module):
    """Convolutions with norms, a shortcut, box pooling, a functional ReLU and a dead branch."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 4, 3, padding=1, bias=False), nn.BatchNorm2d(4))
        self.first = nn.Sequential(nn.ReLU(), nn.Conv2d(4, 4, 3, padding=1), nn.BatchNorm2d(4))
        self.pool = nn.AvgPool2d(3, 1, 1, count_include_pad=False)
        self.dead = nn.Conv2d(4, 4, 1)
        self.drop = nn.Dropout(0.5)
        self.head = nn.Linear(4, 3)

    def forward(self, x):
        x = self.stem(x)
        self.dead(x)
        x = torch.relu(self.first(x) + self.pool(x))
        return self.head(self.drop(x.mean((2, 3))))


def net(seed=0):
    torch.manual_seed(seed)
    made = Net()
    for module in made.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.weight, 0.5, 1.5)
            nn.init.uniform_(module.bias, -0.5, 0.5)
    return made


def smooth():
    """Layers without norms or kinks, in which every image stands for itself."""
    torch.manual_seed(1)
    return nn.Sequential(
        nn.Conv2d(3, 4, 3), nn.Tanh(), nn.AvgPool2d(2), nn.Flatten(), nn.Linear(36, 5)
    )


def mlp():
    torch.manual_seed(2)
    return nn.Sequential(nn.Flatten(), nn.Linear(192, 7), nn.ReLU(), nn.Linear(7, 3))


X = torch.randn(12, 3, 8, 8, generator=torch.Generator().manual_seed(3))
Y = torch.arange(12) % 3


def trained_mode(network):
    """A copy whose batch norms use the batch and whose dropout is off."""
    made = copy.deepcopy(network).eval()
    for module in made.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.train()
    return made


def layers(network):
    return [m for m in network.modules() if isinstance(m, (nn.Conv2d, nn.Linear))]


def pairs(network):
    """Weights and gradients by torch's own backward pass, in double precision."""
    made = trained_mode(network).double()
    cross_entropy(made(X.double()), Y).backward()
    zero = torch.zeros_like
    return [
        (m.weight.detach(), zero(m.weight) if m.weight.grad is None else m.weight.grad)
        for m in layers(made)
    ]


def test_sums_over_weights_and_gradients():
    found = scores(net(), X, Y, ("grad_norm", "snip", "plain", "l2"))
    both = pairs(net())
    assert found["grad_norm"] == pytest.approx(sum(float(g.norm()) for _, g in both), rel=1e-4)
    assert found["snip"] == pytest.approx(
        sum(float((w * g).abs().sum()) for w, g in both), rel=1e-4
    )
    assert found["plain"] == pytest.approx(sum(float((w * g).sum()) for w, g in both), abs=1e-5)
    assert found["l2"] == pytest.approx(sum(float(w.norm()) for w, _ in both), rel=1e-5)


def test_grasp_is_the_hessian_times_the_gradient():
    made = trained_mode(net()).double()
    weights = [m.weight for m in layers(made)]
    sizes = [w.numel() for w in weights]

    def loss(flat):
        names = [n for n, p in made.named_parameters() if any(p is w for w in weights)]
        parts = [p.view(w.shape) for p, w in zip(flat.split(sizes), weights, strict=True)]
        given = dict(zip(names, parts, strict=True))
        return cross_entropy(torch.func.functional_call(made, given, X.double()), Y)

    flat = torch.cat([w.detach().flatten() for w in weights])
    gradient = torch.autograd.functional.jacobian(loss, flat)
    hessian = torch.autograd.functional.hessian(loss, flat)
    expected = -float(flat @ hessian @ gradient)
    assert scores(net(), X, Y, ("grasp",))["grasp"] == pytest.approx(expected, rel=1e-3)


@pytest.mark.parametrize("make", [net, mlp])
def test_fisher_is_taken_channel_by_channel(make):
    made = trained_mode(make()).double()
    kept = []
    for layer in layers(made):
        layer.register_forward_hook(lambda m, a, o: kept.append((m, o)) or o.retain_grad())
    cross_entropy(made(X.double()), Y).backward()
    expected = 0.0
    for layer, out in kept:
        if out.grad is None:
            continue
        for channel in range(out.shape[1]):
            product = (out * out.grad)[:, channel].reshape(len(X), -1).sum(1)
            expected += float(product.detach().square().mean()) / 2 * layer.weight[0].numel()
    assert scores(make(), X, Y, ("fisher",))["fisher"] == pytest.approx(expected, rel=1e-4)


def test_fisher_lets_go_of_the_graph():
    made, left = net(), []
    handle = made.first[1].register_forward_hook(lambda _, a, out: left.append(weakref.ref(out)))
    scores(made, X, Y, ("fisher", "jacob_cov", "naswot"))
    handle.remove()
    gc.collect()
    assert left
    assert all(ref() is None for ref in left)


def test_fisher_survives_activations_in_place():
    torch.manual_seed(0)
    apart = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(144, 3))
    place = copy.deepcopy(apart)
    place[1] = nn.ReLU(inplace=True)
    names = ("fisher", "naswot", "snip")
    assert scores(place, X, Y, names) == pytest.approx(scores(apart, X, Y, names), rel=1e-5)


def jacobians(network):
    """Gradient of each image's summed outputs, one image at a time."""
    rows = []
    for x in X.double():
        x = x[None].clone().requires_grad_()
        network.double()(x).sum().backward()
        rows.append(x.grad.flatten().numpy())
    return np.stack(rows)


def test_jacob_cov_from_image_by_image_gradients():
    values = np.linalg.eigvals(np.corrcoef(jacobians(smooth()))).real
    expected = -np.sum(np.log(values + 1e-5) + 1 / (values + 1e-5))
    found = scores(smooth(), X, Y, ("jacob_cov",))["jacob_cov"]
    assert found == pytest.approx(expected, rel=2e-3)


def test_epe_nas_from_image_by_image_gradients():
    rows, expected = jacobians(smooth()), 0.0
    for label in range(3):
        corr = np.corrcoef(rows[Y.numpy() == label])
        expected += abs(np.log(np.abs(corr) + 1e-5).sum())
    assert scores(smooth(), X, Y, ("epe_nas",))["epe_nas"] == pytest.approx(expected, rel=1e-3)


def test_jacobians_go_through_batch_norms():
    made, x = trained_mode(net()).double(), X.double().requires_grad_()
    made(x).sum().backward()
    values = np.linalg.eigvalsh(np.corrcoef(x.grad.flatten(1).numpy()))
    expected = -np.sum(np.log(values + 1e-5) + 1 / (values + 1e-5))
    assert scores(net(), X, Y, ("jacob_cov",))["jacob_cov"] == pytest.approx(expected, rel=2e-3)


def test_naswot_counts_agreements():
    made = mlp()
    with torch.no_grad():
        on = (made[:2](X) > 0).numpy()
    kernel = np.array([[sum(a == b for a, b in zip(p, q, strict=True)) for q in on] for p in on])
    expected = np.linalg.slogdet(kernel + np.eye(len(X)))[1]
    assert scores(made, X, Y, ("naswot",))["naswot"] == pytest.approx(expected, rel=1e-9)


def test_naswot_is_finite_for_equal_images():
    assert math.isfinite(scores(net(), X[:1].repeat(6, 1, 1, 1), Y[:6], ("naswot",))["naswot"])


def test_zico_over_two_mini_batches():
    made, halves = net(), []
    for part in (slice(0, 6), slice(6, 12)):
        copied = trained_mode(made).double()
        cross_entropy(copied(X[part].double()), Y[part]).backward()
        halves.append([m.weight.grad for m in layers(copied)])
    expected = 0.0
    for a, b in zip(*halves, strict=True):
        if a is None:
            continue
        ratio = ((a.abs() + b.abs()) / 2) / ((a - b).abs() / 2)
        expected += math.log(float(ratio[(a - b) != 0].sum()))
    assert scores(made, X, Y, ("zico",))["zico"] == pytest.approx(expected, rel=5e-2)


def test_synflow_is_the_flow_without_norms():
    made = copy.deepcopy(net()).double()
    with torch.no_grad():
        for p in made.parameters():
            p.abs_()
    made.stem[1] = made.first[2] = nn.Identity()
    made.eval()(torch.ones(1, 3, 8, 8, dtype=torch.float64)).sum().backward()
    total = sum(
        float((m.weight.detach() * m.weight.grad).sum())
        for m in layers(made)
        if m.weight.grad is not None
    )
    assert scores(net(), X, Y, ("synflow",))["synflow"] == pytest.approx(math.log(total), abs=1e-5)


def test_synflow_overflows_at_no_depth():
    torch.manual_seed(0)
    deep = nn.Sequential(nn.Flatten(), *[nn.Linear(192, 192, bias=False) for _ in range(500)])
    row, log = np.ones(192), 0.0
    for layer in deep[1:]:
        row = np.abs(layer.weight.detach().double().numpy()) @ row
        log, row = log + math.log(row.max()), row / row.max()
    expected = log + math.log(row.sum()) + math.log(500)  # each layer's share is the whole flow
    assert expected > 709, "exp(709) is the largest double"
    found = scores(deep, X, Y, ("synflow",))["synflow"]
    assert found == pytest.approx(expected, rel=1e-5)


class Mixed(nn.Module):
    """Sums, products, concatenation, gates and biases."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.a, self.b = nn.Conv2d(3, 4, 1), nn.Conv2d(3, 4, 3, padding=1)
        self.gate, self.head = nn.Linear(4, 4), nn.Linear(8, 3)

    def forward(self, x):
        a, b = self.a(x), self.b(x)
        gate = torch.sigmoid(self.gate(a.mean((2, 3))))[:, :, None, None]
        out = torch.cat([a * gate, a + b * 0.5], 1)
        return self.head(out.flatten(2).max(2).values / 2.0)


def test_synflow_follows_sums_products_and_gates():
    made = Mixed().double()
    with torch.no_grad():
        for p in made.parameters():
            p.abs_()
    made(torch.ones(1, 3, 8, 8, dtype=torch.float64)).sum().backward()
    total = sum(float((m.weight * m.weight.grad).sum()) for m in layers(made))
    assert scores(Mixed(), X, Y, ("synflow",))["synflow"] == pytest.approx(
        math.log(total), abs=1e-5
    )


def test_zen_with_weights_drawn_again():
    random = torch.Generator().manual_seed(7)
    x, e = torch.randn(2, 16, 3, 8, 8, generator=random)
    made = trained_mode(net())
    with torch.no_grad():
        for module in made.modules():
            if isinstance(module, (nn.Conv2d, nn.Linear)):
                module.weight.copy_(torch.randn(module.weight.shape, generator=random))
                if module.bias is not None:
                    module.bias.zero_()
            elif isinstance(module, nn.BatchNorm2d):
                module.weight.fill_(1.0)
                module.bias.zero_()
                module.momentum = 1.0

        def features(x):
            x = made.stem(x)
            return torch.relu(made.first(x) + made.pool(x))

        one = features(x)
        unbiased = x[:, 0].numel() / (x[:, 0].numel() - 1)
        scales = [(m.running_var.mean() / unbiased) for m in (made.stem[1], made.first[2])]
        change = (features(x + 0.01 * e) - one).abs().sum((1, 2, 3)).mean()
    expected = math.log(change) + sum(math.log(s) for s in scales) / 2
    assert scores(net(), X, Y, ("zen",), seed=7)["zen"] == pytest.approx(expected, rel=1e-4)


def test_counts_and_depth_entropy_in_closed_form():
    found = scores(net(), X, Y, ("params", "macs", "depth_entropy"))
    weights = 4 * 3 * 9 + 8 + 4 * 4 * 9 + 4 + 8 + 16 + 4 + 12 + 3
    assert found["params"] == weights
    assert found["macs"] == 64 * (4 * 27 + 4 * 36 + 4 * 4) + 12
    so_far = (math.log(27) + math.log(4) + math.log(36)) / 2  # all three at one resolution
    assert found["depth_entropy"] == pytest.approx(8 * math.log(64 * 4) * so_far)
    two = depth_entropy([Shape(27, 4, 64), Shape(36, 8, 16), Shape(8, 10, 1)])
    first, second = math.log(27) / 2, (math.log(27) + math.log(36)) / 2
    assert two == pytest.approx(math.log(256) * first + 8 * math.log(128) * second)


def former():
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(8, 2, 24, dropout=0.0, activation="gelu", batch_first=True)
    return nn.Sequential(nn.Flatten(2), nn.Linear(64, 8), layer, nn.Flatten(), nn.Linear(24, 3))


def test_w_pca_counts_principal_components():
    with torch.no_grad():
        made = former().eval()
        x = made[1](X.flatten(2))
        layer = made[2]
        x = layer.norm1(x + layer.self_attn(x, x, x, need_weights=False)[0])
        hidden = layer.linear1(x).flatten(0, 1).double().numpy()
    spectrum = np.linalg.svd(hidden - hidden.mean(0), compute_uv=False) ** 2
    shares = np.cumsum(spectrum) / spectrum.sum()
    expected = int(np.searchsorted(shares, 0.99)) + 1
    assert components(former(), X) == [expected]
    params = sum(p.numel() for p in made.parameters())
    assert scores(former(), X, Y, ("w_pca",))["w_pca"] == expected * params


@pytest.mark.parametrize("shape", [(40, 6), (5, 9)])
def test_principal_components_of_known_rank(shape):
    torch.manual_seed(0)
    low = torch.randn(shape[0], 2) @ torch.randn(2, shape[1])
    assert principal(low, 0.999) == 2
    assert principal(torch.ones(shape), 0.99) == 0


@pytest.mark.parametrize("make", [smooth, net])
def test_ntk_condition_from_the_jacobian(make):
    made = trained_mode(make()).double()
    weights = [m.weight for m in layers(made) if m is not getattr(made, "dead", None)]
    names = [n for n, p in made.named_parameters() if any(p is w for w in weights)]

    def outputs(*given):
        return torch.func.functional_call(
            made, dict(zip(names, given, strict=True)), X.double()
        ).sum(1)

    parts = torch.autograd.functional.jacobian(outputs, tuple(w.detach() for w in weights))
    rows = torch.cat([p.flatten(1) for p in parts], 1)
    values = torch.linalg.eigvalsh(rows @ rows.T)
    expected = float(torch.log(values[0] / values[-1]))
    assert scores(make(), X, Y, ("ntk_condition",))["ntk_condition"] == pytest.approx(
        expected, abs=0.02
    )


def test_length_distortion_along_a_polygon():
    made = former().double()
    layer = made[2]
    layer.norm1 = layer.norm2 = nn.Identity()
    random = torch.Generator().manual_seed(5)
    plane = torch.linalg.qr(torch.randn(192, 2, generator=random))[0].double()
    angles = torch.linspace(0, 2 * math.pi, 20001, dtype=torch.float64)[:-1]
    circle = torch.stack([angles.cos(), angles.sin()], 1) @ plane.T
    with torch.no_grad():
        out = made[:-1](circle.reshape(-1, 3, 8, 8))  # what the classifier reads
    steps = (out - out.roll(1, 0)).norm(dim=1).sum() / (2 * math.pi)
    found = complexity.length_distortion(former(), (3, 8, 8), seed=5, points=256)
    assert found == pytest.approx(math.log(float(steps)), abs=1e-3)


@pytest.mark.parametrize("training", [True, False])
def test_the_network_leaves_as_it_came(training):
    made = net().train(training)
    made.head.weight.requires_grad_(False)
    made.stem[1].eval()
    state = {k: v.clone() for k, v in made.state_dict().items()}
    modes = [m.training for m in made.modules()]
    learned = [p.requires_grad for p in made.parameters()]
    places = [(p.data_ptr(), p.stride(), p.dtype) for p in made.parameters()]
    random = torch.random.get_rng_state()
    x, y = X.clone(), Y.clone()
    scores(made, x, y, [m for m in MEASURES if m != "w_pca"])
    components(made, x)
    assert all(torch.equal(state[k], v) for k, v in made.state_dict().items())
    assert modes == [m.training for m in made.modules()]
    assert learned == [p.requires_grad for p in made.parameters()]
    assert places == [(p.data_ptr(), p.stride(), p.dtype) for p in made.parameters()]
    assert all(p.grad is None for p in made.parameters())
    assert torch.equal(random, torch.random.get_rng_state())
    assert torch.equal(x, X)
    assert not x.requires_grad
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in made.modules())


def test_a_score_does_not_hang_on_the_others():
    together = scores(net(), X, Y)
    for name in ALL:
        assert scores(net(), X, Y, (name,))[name] == pytest.approx(
            together[name], rel=1e-5, abs=1e-7
        )


def test_what_a_network_lacks_is_said():
    with pytest.raises(EspalierError, match=r"naswot .* has none .* leave"):
        scores(smooth(), X, Y, ("naswot",))
    with pytest.raises(EspalierError, match=r"zen .* convolutions"):
        scores(mlp(), X, Y, ("zen",))
    with pytest.raises(EspalierError, match=r"Identity has none"):
        scores(nn.Identity(), X, Y, ("snip",))
    with pytest.raises(EspalierError, match="w_pca"):
        scores(nn.Sequential(nn.Flatten(), nn.Linear(192, 3)), X, Y, ("w_pca",))
    with pytest.raises(EspalierError, match="Did you mean 'synflow'"):
        scores(net(), X, Y, ("sinflow",))
    with pytest.raises(EspalierError, match=r"zico .* 3: give a larger batch"):
        scores(net(), X[:3], Y[:3], ("zico",))
    broken = net()
    with torch.no_grad():
        broken.head.weight[0, 0] = math.nan
    with pytest.raises(EspalierError, match="snip of Net is nan"):
        scores(broken, X, Y, ("snip",))


def test_a_network_that_nothing_flows_through_has_finite_scores():
    made = net()
    with torch.no_grad():
        for p in made.parameters():
            p.zero_()
    assert all(math.isfinite(v) for v in scores(made, X, Y).values())


def test_the_estimator_conforms():
    task = tasks.make("digits:train=80,validation=40,test=40")
    family = nets.ResNet(task.shape, task.classes, 8, widths=[4, (4, 8), 8], depth=(1, 2), kernel=3)
    codes = family.space.sample(3, np.random.default_rng(0))
    candidates = list(family.space.decode(codes[family.space.unique(codes)]))
    made = ZeroCost(family, task, batch=16)
    check_estimator(made, candidates)
    assert [m.name for m in made.metrics] == list(ALL)
    assert {m.goal for m in made.metrics} == {"max"}
    assert {m.how for m in made.metrics} == {"estimated", "counted"}
    other = ZeroCost(family, task, ("snip",), batch=16, seed=1).estimate(candidates)
    assert not np.allclose(other["snip"], made.estimate(candidates)["snip"])
    with pytest.raises(EspalierError, match="batch"):
        ZeroCost(family, task, batch=2)


def test_networks_in_double_precision_are_scored():
    single, double = scores(net(), X, Y), scores(net().double(), X.double(), Y)
    for name in set(ALL) - {"zico"}:  # whose ratios rounding decides
        assert double[name] == pytest.approx(single[name], rel=2e-3, abs=1e-5), name
