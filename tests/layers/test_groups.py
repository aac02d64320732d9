"""Blocks, and modules that the user names, as layers."""

import pytest
import timm
import torch
from conftest import NB_CLASSES, Normed, make_attack, make_classifier
from torch import nn

from art_clat import (
    AdversarialTrainerCLATPyTorch,
    LayerOptions,
    SelectionOptions,
    create_backbone,
    measure_criticality,
)
from art_clat.layers.discovery import find_layers
from art_clat.layers.freezing import train_only
from art_clat.layers.groups import find_groups

BLOCKS = ["layer1.0", "layer1.1", "layer2.0", "layer2.1", "layer3.0", "layer3.1", "layer4.0", "layer4.1"]


def layers_of(model, granularity, *shape):
    model.eval()
    return find_layers(model, lambda size: model(torch.rand(size, *shape)), granularity=granularity)


class Nested(nn.Module):
    """Two blocks in a list that is never called, a module that never runs, and one that returns a tuple."""

    class Block(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv, self.bn, self.shift = nn.Conv2d(2, 2, 1), nn.BatchNorm2d(2), nn.Parameter(torch.zeros(2, 1, 1))
            self.act = nn.ReLU()

        def forward(self, x):
            return x + self.act(self.bn(self.conv(x)) + self.shift), None

    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(2, 2, 3, padding=1)
        self.blocks = nn.ModuleList([self.Block(), self.Block()])
        self.unused = nn.Linear(3, 3)
        self.head = nn.Linear(2, NB_CLASSES)

    def features(self, x):
        results = [self.stem(x)]
        for block in self.blocks:
            results.append(block(results[-1])[0])
        return [*results, self.head(results[-1].mean((2, 3)))]

    def forward(self, x):
        return self.features(x)[-1]


def test_blocks_of_a_residual_network_hold_every_parameter():
    model = timm.create_model("resnet18", num_classes=10)
    layers = layers_of(model, "block", 3, 64, 64)
    assert [layer.name for layer in layers] == ["conv1...bn1", *BLOCKS, "fc"]
    assert [layer.name for layer in layers if layer.is_head] == ["fc"]
    assert layers[3].output.module is model.layer2[0] and layers[3].shape == (128, 8, 8)
    assert layers[0].output.module is model.bn1 and layers[0].input.module is model.conv1
    parameters = [p for layer in layers for p in layer.parameters()]
    assert len(parameters) == len(set(parameters)) and set(parameters) == set(model.parameters())


def test_blocks_of_a_transformer_hold_tokens_and_positions():
    model = timm.create_model("vit_tiny_patch16_224", img_size=32, depth=2, num_classes=10)
    layers = {layer.name: layer for layer in layers_of(model, "block", 3, 32, 32)}
    assert list(layers) == ["patch_embed", "blocks.0", "blocks.1...norm", "head"]
    assert {model.cls_token, model.pos_embed} < set(layers["patch_embed"].parameters())
    assert layers["blocks.1...norm"].output.module is model.norm
    assert layers["blocks.0"].shape == (5, 192)


def test_blocks_are_found_within_another_network():
    model = create_backbone("resnet10t", num_classes=10, channels=(4, 4, 8, 8), stem_width=4)
    names = [layer.name for layer in layers_of(model, "block", 3, 32, 32)]
    assert "model.layer3" in names and names[-1] == "model.fc"


def test_blocks_are_found_if_a_wrapper_also_holds_a_module_of_the_network():
    class Wrapper(nn.Module):
        def __init__(self):
            super().__init__()
            net = timm.create_model("resnet10t", num_classes=3)
            self.stem = net.conv1
            self.net = net

        def forward(self, x):
            return self.net(x)

    bare = layers_of(Wrapper().net, "block", 3, 32, 32)
    wrapped = layers_of(Wrapper(), "block", 3, 32, 32)
    assert [layer.nb_parameters for layer in wrapped] == [layer.nb_parameters for layer in bare]
    assert [layer.shape for layer in wrapped] == [layer.shape for layer in bare]


def test_modules_by_name_and_by_expression():
    model = Nested()
    layers = layers_of(model, [r"blocks\.\d", "stem"], 2, 6, 6)
    assert [layer.name for layer in layers] == ["stem", "blocks.0", "blocks.1"]
    assert not any(layer.is_head for layer in layers)
    assert set(layers[1].parameters()) == set(model.blocks[0].parameters())
    assert [layer.name for layer in layers_of(model, ["head", "stem"], 2, 6, 6) if layer.is_head] == ["head"]


def test_feature_of_a_module_that_is_never_called_is_that_of_its_last_child():
    model = Nested()
    (layer,) = layers_of(model, ["blocks"], 2, 6, 6)
    assert layer.output.module is model.blocks[1] and layer.input.module is model.blocks[0]
    assert set(layer.parameters()) == set(model.blocks.parameters())


@pytest.mark.parametrize(
    ("granularity", "error", "match"),
    [
        ([], ValueError, "empty list"),
        (["stern"], ValueError, "'stern' matches no module.*Close to it: 'stem'"),
        (["stem", "block"], ValueError, "'block' matches no module.*'blocks'"),
        (["(stem"], ValueError, "neither a module name nor a regular expression"),
        ([r".*\.act"], ValueError, "only modules without parameters, such as 'blocks.0.act'"),
        (["blocks.*"], ValueError, "'blocks.0' is within 'blocks'"),
        (["unused"], ValueError, "'unused' matches, but none of its modules returns a tensor with a batch"),
        ("block", ValueError, "Nested has no `group_matcher`"),
    ],
)
def test_granularity_that_does_not_fit_the_network_is_refused(granularity, error, match):
    with pytest.raises(error, match=match):
        layers_of(Nested(), granularity, 2, 6, 6)


@pytest.mark.parametrize(
    ("granularity", "error", "match"),
    [
        ("layers", ValueError, r"must be 'layer', 'block' or a list.*\['layers'\]"),
        (3, TypeError, "`granularity` must be"),
        ([3], TypeError, "`granularity` must be"),
    ],
)
def test_values_that_are_no_granularity_are_refused(granularity, error, match):
    with pytest.raises(error, match=match):
        LayerOptions(granularity)


def test_trainer_and_measurement_refuse_a_bad_granularity(data):
    classifier = make_classifier(Normed())
    for layers, match in ((["convl"], "'convl' matches no module.*'conv"), ("block", "no `group_matcher`")):
        with pytest.raises(ValueError, match=match):
            AdversarialTrainerCLATPyTorch(classifier, make_attack(classifier), layers=layers)
        with pytest.raises(ValueError, match=match):
            measure_criticality(classifier, *data, attack=make_attack(classifier), layers=layers)
    for options, match in (
        ({"granularity": ["conv1"], "after_norm": True}, "`after_norm` needs"),
        ({"granularity": ["conv1"], "freeze_norms": True}, "`freeze_norms` needs"),
        ({"predecessor": "before"}, "`predecessor` must be one of 'execution', 'input'"),
    ):
        with pytest.raises(ValueError, match=match):
            LayerOptions(**options)


def test_feature_of_a_larger_layer_is_what_it_returns(data):
    model = Nested()
    for block in model.blocks:
        nn.init.normal_(block.bn.running_mean)
    classifier = make_classifier(model)
    attack = make_attack(classifier)
    options = LayerOptions([r"blocks\.\d"], predecessor="input")
    measured = measure_criticality(classifier, *data, attack=attack, layers=options)
    x, x_adv = torch.tensor(data[0]), torch.tensor(attack.generate(*data))
    model.eval()
    with torch.no_grad():
        weakness = [
            ((b - a).flatten(1).norm(dim=1) / a[0].numel()).mean().item()
            for a, b in zip(model.features(x), model.features(x_adv), strict=True)
        ]
    assert [layer.weakness for layer in measured] == pytest.approx(weakness[1:3], rel=1e-4)
    assert [layer.criticality for layer in measured] == pytest.approx(
        [weakness[1] / weakness[0], weakness[2] / weakness[1]], rel=1e-4
    )


@pytest.mark.parametrize("granularity", ["block", [r"layer\d"]])
def test_training_moves_the_chosen_block_and_its_statistics_alone(granularity):
    model = create_backbone("resnet10t", num_classes=4, input_size=(2, 6, 6), channels=(4, 4, 8, 8), stem_width=4)
    if granularity != "block":
        granularity = [rf"model\.{name}" for name in granularity]
    classifier = make_classifier(model)
    x, y = torch.rand(24, 2, 6, 6).numpy(), torch.randint(4, (24,)).numpy()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    modes = [module.training for module in model.modules()]
    trainer = AdversarialTrainerCLATPyTorch(
        classifier, make_attack(classifier), layers=LayerOptions(granularity, predecessor="input"), seed=0
    )
    trainer.fit(x, y, nb_epochs=1, batch_size=12, verbose=False)
    (chosen,) = trainer.history.selections[0].chosen
    moved = {name for name, tensor in model.state_dict().items() if not torch.equal(tensor, before[name])}
    (group,) = [group for group in find_groups(model, granularity) if group.name == chosen]
    inside = {name for name in before if any(name.startswith(f"{module}.") for module in group.modules)}
    assert moved <= inside
    assert {name for name, p in model.named_parameters() if any(p is q for q in group.parameters)} <= moved
    assert sum(name.endswith("running_mean") for name in moved) >= 2
    assert [module.training for module in model.modules()] == modes


@pytest.mark.parametrize("predecessor", ["execution", "input"])
def test_the_trainer_measures_with_its_predecessor(normed, data, predecessor):
    classifier = make_classifier(normed)
    attack = make_attack(classifier)
    expected = measure_criticality(classifier, *data, attack=attack, layers=LayerOptions(predecessor=predecessor))
    trainer = AdversarialTrainerCLATPyTorch(
        classifier,
        attack,
        layers=LayerOptions(predecessor=predecessor),
        selection=SelectionOptions(samples=48),
        seed=0,
    )
    trainer.fit(*data, nb_epochs=1, batch_size=24, verbose=False)
    measured = trainer.history.selections[0].measured
    assert [layer.criticality for layer in measured] == pytest.approx([e.criticality for e in expected], rel=1e-4)


def test_a_checkpoint_of_other_layers_is_refused(normed, data, tmp_path):
    classifier = make_classifier(normed)
    settings = {"nb_epochs": 1, "batch_size": 24, "verbose": False, "checkpoint": tmp_path}
    made = [LayerOptions(), LayerOptions(["conv1", "conv3"]), LayerOptions(predecessor="input")]
    first, *others = (
        AdversarialTrainerCLATPyTorch(classifier, make_attack(classifier), seed=0, layers=layers) for layers in made
    )
    first.fit(*data, **settings)
    for trainer, argument in zip(others, ("granularity", "predecessor"), strict=True):
        with pytest.raises(ValueError, match=f"layers.{argument} is "):
            trainer.fit(*data, **settings)


def test_all_norms_of_a_block_train_and_nothing_else():
    model = timm.create_model("resnet18", num_classes=10)
    layers = layers_of(model, "block", 3, 64, 64)
    train_only(model, [layers[3]])
    training = {name for name, module in model.named_modules() if module.training}
    assert training == {"layer2.0.bn1", "layer2.0.bn2", "layer2.0.downsample.1"}
