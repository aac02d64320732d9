"""SAFER's rule, and the preset that trains by it."""

import timm
import torch
from conftest import NB_CLASSES, make_attack, make_classifier
from pytest import approx, mark
from torch import nn

from art_clat import AdversarialTrainerCLATPyTorch, Budget, LayerOptions
from art_clat.attacks.tensor_attack import TensorAttack
from art_clat.layers.discovery import find_layers
from art_clat.models.tensor_classifier import TensorClassifier
from art_clat.selection.candidates import Candidates
from art_clat.selection.choice import choose, eligible_layers
from art_clat.selection.rules import as_rule
from art_clat.utils.batch import Batch


class Branches(nn.Module):
    """
    Two layers that see the input twice and compute the same.

    The weights of `sharp` are 50 times as large and cancel, so that a small relative change of them changes a lot.
    """

    def __init__(self):
        super().__init__()
        self.flat, self.sharp, self.head = nn.Linear(144, 6), nn.Linear(144, 6), nn.Linear(12, NB_CLASSES)
        with torch.no_grad():
            weight = 0.1 * torch.randn(6, 72)
            large = 50 * weight.norm() * nn.functional.normalize(torch.randn(6, 72), dim=None)
            self.flat.weight.copy_(torch.cat([weight, weight], dim=1))
            self.sharp.weight.copy_(torch.cat([weight + large, weight - large], dim=1))
            self.sharp.bias.copy_(self.flat.bias)
            half = torch.randn(NB_CLASSES, 6)
            self.head.weight.copy_(torch.cat([half, half], dim=1))

    def forward(self, x):
        twice = torch.cat([x.flatten(1), x.flatten(1)], dim=1)
        return self.head(torch.cat([self.flat(twice).relu(), self.sharp(twice).relu()], dim=1))


def make_candidates(model, data):
    classifier = make_classifier(model)
    network = TensorClassifier(classifier)
    layers = find_layers(model, lambda size: model(torch.tensor(data[0][:size])))
    x, y = torch.tensor(data[0]), torch.tensor(data[1])
    batches = [Batch.whole(a, b) for a, b in zip(x.split(20), y.split(20), strict=True)]
    attack = TensorAttack(make_attack(classifier), network)
    return Candidates(network, layers, eligible_layers(layers, head_eligible=False), batches, attack, 0, 0)


def test_the_sharp_one_of_two_equal_layers_is_chosen(data):
    model = Branches()
    x = torch.tensor(data[0]).flatten(1).repeat(1, 2)
    torch.testing.assert_close(model.sharp(x), model.flat(x), atol=1e-4, rtol=1e-4)  # the same function
    candidates = make_candidates(model, data)
    flat, sharp, head = as_rule("sharpness")(candidates)
    assert sharp > 10 * flat > 0 and head != head  # the head may not be chosen: NaN
    assert [layer.name for layer in choose(as_rule("sharpness"), candidates, Budget(count=1)).layers] == ["sharp"]
    flat, sharp, _ = as_rule("relative_criticality")(candidates)  # which cannot tell them apart
    assert sharp == approx(1.0, rel=1e-2)


def test_the_score_is_the_rise_of_the_loss(chain, data):
    candidates = make_candidates(chain, data)
    scores = as_rule("sharpness")(candidates)
    x_adv, y = torch.cat([x for _, x in candidates.adversarial]), torch.cat([b.y for b, _ in candidates.adversarial])
    weights = {name: getattr(chain, name).weight for name in ("first", "second", "hidden")}
    before = nn.functional.cross_entropy(chain.features(x_adv)["head"], y)
    gradients = dict(zip(weights, torch.autograd.grad(before, list(weights.values())), strict=True))
    for layer, score in zip(candidates.layers[:3], scores, strict=False):
        weight, gradient = weights[layer.name], gradients[layer.name]
        original = weight.detach().clone()
        with torch.no_grad():
            weight += 0.01 * weight.norm() * gradient / gradient.norm()
            after = nn.functional.cross_entropy(chain.features(x_adv)["head"], y)
            weight.copy_(original)
        assert score == approx((after - before).item(), rel=1e-2) and score > 0


def vit(name):
    return timm.create_model(
        name, num_classes=NB_CLASSES, img_size=32, patch_size=8, depth=2, embed_dim=24, num_heads=2
    )


def swin():
    return timm.create_model(
        "swin_tiny_patch4_window7_224",
        num_classes=NB_CLASSES,
        img_size=32,
        window_size=4,
        embed_dim=12,
        depths=(1, 1),
        num_heads=(1, 2),
    )


@mark.parametrize("granularity", ["layer", "block"])
@mark.parametrize(
    "make",
    [lambda: vit("vit_tiny_patch16_224"), lambda: vit("deit_tiny_patch16_224"), swin],
    ids=["vit", "deit", "swin"],
)
def test_the_preset_trains_transformers(make, granularity):
    model = make()
    x, y = torch.rand(24, 3, 32, 32).numpy(), torch.randint(0, NB_CLASSES, (24,)).numpy()
    classifier = make_classifier(model, input_shape=(3, 32, 32))
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    trainer = AdversarialTrainerCLATPyTorch(
        classifier, make_attack(classifier), preset="safer", layers=LayerOptions(granularity), seed=0
    )
    trainer.fit(x, y, batch_size=8, nb_epochs=1, verbose=False)
    (selection,) = trainer.history.selections
    assert selection.rule == "sharpness" and len(selection.chosen) == 1
    scores = dict(zip((layer.name for layer in selection.measured), selection.scores, strict=True))
    assert scores[selection.chosen[0]] == max(score for score in scores.values() if score == score) > 0
    moved = [name for name, parameter in model.named_parameters() if not torch.equal(parameter, before[name])]
    trained = sum(before[name].numel() for name in moved)
    assert 0 < trained <= selection.trainable_parameters < selection.total_parameters
    if granularity == "layer":
        assert all(name.startswith(selection.chosen[0] + ".") for name in moved)
