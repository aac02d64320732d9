"""Weights that are used without calling their module."""

import pytest
import torch
from conftest import NB_CLASSES, make_attack, make_classifier
from torch import nn
from torch.nn import functional

from art_clat import AdversarialTrainerCLATPyTorch
from art_clat.layers.discovery import find_layers
from art_clat.layers.features import Features, tap
from art_clat.layers.freezing import only_trainable, train_only
from art_clat.layers.weight_uses import WeightUses


class Attention(nn.Module):
    """As in BEiT: the weight of `qkv` goes into ``functional.linear``, with a bias joined from two parameters."""

    def __init__(self, width):
        super().__init__()
        self.qkv = nn.Linear(width, 3 * width, bias=False)
        self.q_bias = nn.Parameter(torch.randn(width))
        self.v_bias = nn.Parameter(torch.randn(width))
        self.register_buffer("k_bias", torch.zeros(width))
        self.table = nn.Parameter(torch.randn(7, 7))
        self.proj = nn.Linear(width, width)

    def bias(self):
        return torch.cat((self.q_bias, self.k_bias, self.v_bias))

    def forward(self, x):
        q, k, v = functional.linear(x, weight=self.qkv.weight, bias=self.bias()).chunk(3, dim=-1)
        tokens = x.shape[1]
        scores = q @ k.transpose(1, 2) + self.table[:tokens, :tokens]
        return self.proj(scores.softmax(-1) @ v)


class Transformer(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed = nn.Conv2d(2, 6, 3, stride=3)
        self.one, self.norm, self.two = Attention(6), nn.BatchNorm1d(4), Attention(6)
        self.head = nn.Linear(6, NB_CLASSES)

    def tokens(self, x):
        x = self.embed(x).flatten(2).transpose(1, 2)
        return self.norm(x + self.one(x))

    def forward(self, x):
        x = self.tokens(x)
        return self.head((x + self.two(x)).mean(1))


@pytest.fixture
def model():
    return Transformer()


@pytest.fixture
def layers(model):
    return find_layers(model.eval(), lambda size: model(torch.rand(size, 2, 6, 6)))


def test_modules_of_such_weights_are_layers_with_their_bias(model, layers):
    assert [layer.name for layer in layers] == ["embed", "one.qkv", "one.proj", "two.qkv", "two.proj", "head"]
    assert set(layers[3].parameters()) == {model.two.qkv.weight, model.two.q_bias, model.two.v_bias}
    assert (layers[3].shape, layers[3].input.shape) == ((4, 18), (4, 6))


@pytest.mark.parametrize("stop", [False, True])
@pytest.mark.parametrize("training", [False, True])
def test_feature_is_what_the_function_returns(model, layers, stop, training):
    qkv, ran = layers[3], []
    model.two.proj.register_forward_hook(lambda *_: ran.append("proj"))
    x = torch.rand(5, 2, 6, 6)
    if training:
        train_only(model, [layers[1], qkv])
        model.norm.train()
    features = Features([qkv], inputs=True)
    with features.keep(stop=stop):
        model(x)
    by_hand = model.tokens(x)
    kept, entered = features._kept[qkv.output][0], features._kept[qkv.input][0]
    torch.testing.assert_close(entered, by_hand)
    torch.testing.assert_close(kept, by_hand @ model.two.qkv.weight.T + model.two.bias())
    assert ran == ([] if stop else ["proj"])


def test_stopping_early_changes_no_bit(model, layers):
    x, results = torch.rand(5, 2, 6, 6), []
    with only_trainable(model, []):
        for stop in (False, True):
            z, features = (x + 0.1).requires_grad_(), Features([layers[1], layers[3]])
            with features.keep(stop=stop):
                model(x)
            with features.compare(stop=stop):
                model(z)
            distance = features.total_distance()
            results.append((distance, *torch.autograd.grad(distance.sum(), z)))
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


def test_hooks_and_modes_are_removed_after_an_exception(model, layers):
    seen = []
    with pytest.raises(KeyboardInterrupt), tap([layers[1].output], lambda *_: seen.append(1)):
        raise KeyboardInterrupt
    model(torch.rand(2, 2, 6, 6))
    assert seen == [] and not any(module._forward_hooks for module in model.modules())
    assert torch.overrides._get_current_function_mode_stack() == []


@pytest.mark.parametrize("objective", ["adversarial", "clean"])
def test_training_moves_such_a_layer_and_its_bias_alone(model, data, objective):
    classifier = make_classifier(model)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    model.requires_grad_(False)
    model.two.requires_grad_(True)
    model.two.proj.requires_grad_(False)
    trainer = AdversarialTrainerCLATPyTorch(classifier, make_attack(classifier), objective=objective, seed=0)
    trainer.fit(*data, nb_epochs=1, batch_size=16, verbose=False)
    assert trainer.history.selections[0].chosen == ("two.qkv",)
    moved = {name for name, tensor in model.state_dict().items() if not torch.equal(tensor, before[name])}
    assert moved == {"two.qkv.weight", "two.q_bias", "two.v_bias"}
    assert trainer.history.epochs[0].criticality_loss > 0


@pytest.mark.parametrize(
    "product",
    [
        lambda x, w: x @ w.t(),
        lambda x, w: torch.einsum("bi,oi->bo", x, w),
        lambda x, w: functional.linear(x, w * torch.ones_like(w)),  # as in pruning
        lambda x, w: functional.linear(x, torch.cat([w, w])[[0, 1, 2, 3]]),
        lambda x, w: functional.conv1d(x[..., None], w[..., None]).squeeze(-1),
    ],
)
def test_uses_of_a_weight_that_is_rearranged_first(product):
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.second = nn.Linear(6, 4, bias=False), nn.Linear(4, 3)

        def forward(self, x):
            return self.second(product(x, self.first.weight))

    model = Net()
    first, second = find_layers(model, lambda size: model(torch.rand(size, 6)))
    assert (first.name, first.size, second.name) == ("first", 4, "second")
    x, z, features = torch.rand(3, 6), torch.rand(3, 6), Features([first])
    with features.keep():
        model(x)
    with features.compare():
        model(z)
    torch.testing.assert_close(features.distance(first), product(z - x, model.first.weight).norm(dim=1))


def test_modules_whose_weight_is_only_added_or_a_scale_are_no_layers():
    class Scale(nn.Module):  # like ResMLP's affine
        def __init__(self):
            super().__init__()
            self.alpha, self.beta = nn.Parameter(torch.ones(1, 1, 6)), nn.Parameter(torch.zeros(1, 1, 6))

        def forward(self, x):
            return torch.addcmul(self.beta, self.alpha, x)

    class Positions(nn.Module):  # like MaxxViT's relative position bias
        def __init__(self):
            super().__init__()
            self.table = nn.Parameter(torch.randn(9, 6))
            self.register_buffer("index", torch.randint(9, (4,)))

        def forward(self, x):
            return x + self.table[self.index].unsqueeze(0)

    class Scaled(nn.Linear):  # a weight that is standardised before it is used is a weight
        def forward(self, x):
            return functional.linear(x, (self.weight - self.weight.mean()) / self.weight.std(), self.bias)

    model = nn.Sequential(Scale(), Positions(), Scaled(6, 6), nn.Flatten(), nn.Linear(24, 4))
    assert [layer.name for layer in find_layers(model, lambda size: model(torch.rand(size, 4, 6)))] == ["2", "4"]


def test_a_class_token_joined_with_data_is_no_weight():
    token, weight, seen = nn.Parameter(torch.rand(1, 1, 6)), nn.Parameter(torch.rand(4, 6)), []
    x = torch.rand(5, 3, 6)
    with WeightUses([token, weight], lambda name, used, data, output: seen.append((name, used, data))):
        tokens = torch.cat([token.expand(5, -1, -1), x], dim=1)
        functional.linear(tokens, weight)
    assert [name for name, _, _ in seen] == ["cat", "linear"]
    assert seen[1][1] == [weight] and seen[1][2] is tokens
