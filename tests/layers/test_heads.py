"""Every weighted layer whose output reaches the logits through no other weighted layer is a head."""

import numpy as np
import pytest
import timm
import torch
from conftest import Chain, make_attack, make_classifier
from torch import nn
from torch.nn import functional as F

from art_clat import AdversarialTrainerCLATPyTorch, measure_criticality
from art_clat.layers.discovery import find_layers


def small():
    return nn.Sequential(
        nn.Conv2d(2, 4, 3, padding=1), nn.ReLU(inplace=True), nn.Conv2d(4, 4, 3), nn.ReLU(inplace=True),
        nn.Flatten(), nn.Linear(64, 4),
    )  # fmt: skip


class Ensemble(nn.Module):
    def __init__(self):
        super().__init__()
        self.nets = nn.ModuleList([small() for _ in range(3)])

    def forward(self, x):
        return torch.stack([net(x) for net in self.nets]).mean(0)


class TwoHeads(nn.Module):
    """Two summed heads on the same features; one of them sees another head's input scaled."""

    def __init__(self):
        super().__init__()
        self.body, self.one, self.other = nn.Conv2d(2, 4, 3), nn.Linear(64, 4), nn.Linear(64, 4)

    def forward(self, x):
        features = self.body(x).relu_().flatten(1)
        return self.one(features).relu_() + self.other(2 * features)


class DeepSupervision(nn.Module):
    """An early head is added to the last one."""

    def __init__(self):
        super().__init__()
        self.first, self.early = nn.Conv2d(2, 4, 3), nn.Linear(64, 4)
        self.second, self.last = nn.Conv2d(4, 4, 3), nn.Linear(16, 4)

    def forward(self, x):
        x = self.first(x).relu()
        early = self.early(x.flatten(1))
        return 0.3 * early + self.last(self.second(x).relu().flatten(1))


class Cosine(nn.Module):
    """The head's weight is used without calling the head."""

    def __init__(self):
        super().__init__()
        self.body, self.head = nn.Conv2d(2, 4, 3), nn.Linear(64, 4, bias=False)

    def forward(self, x):
        features = self.body(x).relu().flatten(1)
        return 10 * F.linear(F.normalize(features), F.normalize(self.head.weight))


class Gated(nn.Module):
    """A weighted layer whose output multiplies the logits."""

    def __init__(self):
        super().__init__()
        self.body, self.head, self.gate = nn.Conv2d(2, 4, 3), nn.Linear(64, 4), nn.Linear(64, 1)

    def forward(self, x):
        features = self.body(x).relu().flatten(1)
        return self.head(features) * self.gate(features).sigmoid()


class Unused(nn.Module):
    """What runs last does not reach the logits."""

    def __init__(self):
        super().__init__()
        self.body, self.head, self.auxiliary = nn.Conv2d(2, 4, 3), nn.Linear(64, 4), nn.Linear(64, 9)

    def forward(self, x):
        features = self.body(x).relu().flatten(1)
        logits = self.head(features)
        self.auxiliary(features)
        return logits


class Residual(nn.Module):
    """A head on a sum: what is summed passes through the head."""

    def __init__(self):
        super().__init__()
        self.stem, self.block, self.head = nn.Conv2d(2, 4, 3), nn.Conv2d(4, 4, 3, padding=1), nn.Linear(4, 4)

    def forward(self, x):
        x = self.stem(x)
        return self.head((x + self.block(x)).mean((2, 3)))


class Detached(nn.Module):
    """No gradient passes; the last layer is taken for the head, as well as can be known."""

    def __init__(self):
        super().__init__()
        self.body, self.head = nn.Conv2d(2, 4, 3), nn.Linear(64, 4)

    def forward(self, x):
        with torch.no_grad():
            return self.head(self.body(x).relu().flatten(1))


class Grown(nn.Module):
    """The output of a recurrent layer is a tuple."""

    def __init__(self):
        super().__init__()
        self.recurrent, self.head = nn.LSTM(12, 5, batch_first=True), nn.Linear(5, 4)

    def forward(self, x):
        return self.head(self.recurrent(x.transpose(1, 2).flatten(2))[0][:, -1])


@pytest.mark.parametrize(
    ("model", "heads"),
    [
        (Chain, ["head"]), (Ensemble, ["nets.0.5", "nets.1.5", "nets.2.5"]), (TwoHeads, ["one", "other"]),
        (DeepSupervision, ["early", "last"]), (Cosine, ["head"]), (Gated, ["head", "gate"]), (Unused, ["head"]),
        (Residual, ["head"]), (Detached, ["head"]), (Grown, ["head"]),
    ],
)  # fmt: skip
def test_heads(model, heads):
    made = model().eval()
    flags = {name: parameter.requires_grad for name, parameter in made.named_parameters()}
    hooks = sum(len(module._forward_hooks) for module in made.modules())
    layers = find_layers(made, lambda size: made(torch.rand(size, 2, 6, 6)))
    assert [layer.name for layer in layers if layer.is_head] == heads
    assert sum(len(module._forward_hooks) for module in made.modules()) == hooks
    assert {name: parameter.requires_grad for name, parameter in made.named_parameters()} == flags
    assert all(parameter.grad is None for parameter in made.parameters())


@pytest.mark.parametrize(
    ("name", "heads"),
    [
        ("deit_tiny_distilled_patch16_224", ["head", "head_dist"]), ("beit_base_patch16_224", ["head"]),
        ("resnet10t", ["fc"]), ("levit_128s", ["head.linear", "head_dist.linear"]), ("ghostnet_050", ["classifier"]),
    ],
)  # fmt: skip
def test_heads_of_timm(name, heads):
    model = timm.create_model(name, num_classes=5).eval()
    size = model.default_cfg["input_size"]
    layers = find_layers(model, lambda n: model(torch.rand(n, *size)))
    assert [layer.name for layer in layers if layer.is_head] == heads


@pytest.mark.parametrize("model", [Ensemble, TwoHeads, DeepSupervision])
def test_no_head_is_chosen(data, model):
    """The 1/N of eq. 2 makes every head's index large."""
    classifier = make_classifier(model())
    attack = make_attack(classifier)
    measured = measure_criticality(classifier, *data, attack=attack)
    heads = {layer.name for layer in measured if layer.is_head}
    assert len(heads) > 1 and max(measured, key=lambda layer: layer.criticality).name in heads
    trainer = AdversarialTrainerCLATPyTorch(classifier, attack, seed=0)
    before = {name: parameter.detach().clone() for name, parameter in classifier.model.named_parameters()}
    trainer.fit(*data, nb_epochs=1, verbose=False)
    moved = {n.rpartition(".")[0] for n, p in classifier.model.named_parameters() if not torch.equal(p, before[n])}
    assert moved == set(trainer.history.selections[0].chosen) and not moved & heads
    assert np.isfinite(trainer.history.epochs[0].loss)
