import copy
import random

import numpy as np
import pytest
import timm
import torch
from conftest import Chain, Normed, make_attack, make_classifier
from torch import nn

from art_clat import LayerOptions, measure_criticality


def by_hand(features, x, x_adv):
    """Eq. 2 and 3, sample by sample."""
    clean, perturbed = features(torch.tensor(x)), features(torch.tensor(x_adv))
    weakness = {}
    for name in clean:
        norms = [float(((b - a) ** 2).sum().sqrt()) for a, b in zip(clean[name], perturbed[name], strict=True)]
        weakness[name] = sum(norms) / len(norms) / clean[name][0].numel()
    distance = np.sqrt(((x_adv - x).reshape(len(x), -1).astype(float) ** 2).sum(1))
    previous = [distance.mean() / x[0].size, *weakness.values()]
    return weakness, {name: weakness[name] / before for name, before in zip(weakness, previous, strict=False)}


def rms_by_hand(before, after):
    """Mean over the samples of the root mean square of a feature's change."""
    return np.mean([float(((a - b) ** 2).mean().sqrt()) for a, b in zip(after, before, strict=True)])


@pytest.mark.parametrize("predecessor", ["execution", "input"])
def test_the_index_free_of_size_is_a_ratio_of_root_mean_squares(chain, data, predecessor):
    classifier = make_classifier(chain)
    attack = make_attack(classifier)
    measured = measure_criticality(classifier, *data, attack=attack, layers=LayerOptions(predecessor=predecessor))
    x, x_adv = torch.tensor(data[0]), torch.tensor(attack.generate(*data))
    with torch.no_grad():
        clean, perturbed = chain.features(x), chain.features(x_adv)
    change = {name: rms_by_hand(clean[name], perturbed[name]) for name in clean}
    before = [rms_by_hand(x, x_adv), *change.values()]
    if predecessor == "input":
        enters = {"first": torch.relu, "second": nn.functional.gelu, "hidden": torch.relu}
        before[1:] = [rms_by_hand(f(clean[name]), f(perturbed[name])) for name, f in enters.items()]
    for layer, previous in zip(measured, before, strict=False):
        assert layer.rms_criticality == pytest.approx(change[layer.name] / previous, rel=1e-4)


def widened(chain):
    """Copy every channel of the first layer, and halve the weights that see them: the same function."""
    wide = Chain()
    wide.load_state_dict(chain.state_dict())
    wide.first, wide.second = nn.Conv2d(2, 6, 3, padding=1), nn.Conv2d(6, 4, 3, stride=2, padding=1)
    with torch.no_grad():
        wide.first.weight.copy_(chain.first.weight.repeat(2, 1, 1, 1))
        wide.first.bias.copy_(chain.first.bias.repeat(2))
        wide.second.weight.copy_(chain.second.weight.repeat(1, 2, 1, 1) / 2)
        wide.second.bias.copy_(chain.second.bias)
    return wide


def test_copying_channels_changes_the_literal_index_alone(chain, data):
    narrow, wide = (
        measure_criticality(classifier, *data, attack=make_attack(classifier, norm=2, eps=0.5))
        for classifier in (make_classifier(chain), make_classifier(widened(chain)))
    )
    for one, other, factor in zip(narrow, wide, (0.5**0.5, 2**0.5, 1, 1), strict=True):
        assert other.rms_criticality == pytest.approx(one.rms_criticality, rel=1e-4)
        assert other.criticality == pytest.approx(factor * one.criticality, rel=1e-4)


@pytest.mark.parametrize("norm", [np.inf, 2, 1])
def test_equals_a_direct_computation(chain, data, norm):
    classifier = make_classifier(chain)
    attack = make_attack(classifier, norm=norm, eps={np.inf: 0.1, 2: 0.5, 1: 2.0}[norm])
    measured = measure_criticality(classifier, *data, attack=attack, batch_size=20)
    x_adv = attack.generate(*data)
    with torch.no_grad():
        weakness, criticality = by_hand(chain.features, data[0], x_adv)
    assert [layer.name for layer in measured] == list(weakness)
    for layer in measured:
        assert layer.weakness == pytest.approx(weakness[layer.name], rel=1e-6)
        assert layer.criticality == pytest.approx(criticality[layer.name], rel=1e-6)
        assert layer.nb_parameters == sum(p.numel() for p in getattr(chain, layer.name).parameters())


@pytest.mark.parametrize("after_norm", [False, True])
def test_equals_a_direct_computation_before_and_after_a_norm(normed, data, after_norm):
    def features(x):
        def layer(x, conv, bn):
            conv_out = nn.functional.conv2d(x, conv.weight, padding=1)
            scale = bn.weight / (bn.running_var + bn.eps).sqrt()
            bn_out = (conv_out - bn.running_mean.view(-1, 1, 1)) * scale.view(-1, 1, 1) + bn.bias.view(-1, 1, 1)
            return (bn_out if after_norm else conv_out), bn_out.relu()

        one, x = layer(x, normed.conv1, normed.bn1)
        two, y = layer(x, normed.conv2, normed.bn2)
        three, z = layer(x + y, normed.conv3, normed.bn3)
        return {"conv1": one, "conv2": two, "conv3": three, "fc": normed.fc(z.mean((2, 3)))}

    classifier = make_classifier(normed)
    attack = make_attack(classifier)
    measured = measure_criticality(classifier, *data, attack=attack, layers=LayerOptions(after_norm=after_norm))
    x_adv = attack.generate(*data)
    with torch.no_grad():
        weakness, criticality = by_hand(features, data[0], x_adv)
    assert [layer.weakness for layer in measured] == pytest.approx(list(weakness.values()), rel=1e-5)
    assert [layer.criticality for layer in measured] == pytest.approx(list(criticality.values()), rel=1e-5)


def test_predecessor_is_the_tensor_that_enters_the_layer(normed, data):
    entered = {name: [] for name in ("conv1", "conv2", "conv3", "fc")}

    def run(x):
        x = normed.conv1(entering("conv1", x))
        x = normed.bn1(x).relu()
        x = x + normed.bn2(normed.conv2(entering("conv2", x))).relu()
        x = normed.bn3(normed.conv3(entering("conv3", x))).relu()
        return normed.fc(entering("fc", x.mean((2, 3))))

    def entering(name, x):
        entered[name].append(x)
        return x

    classifier = make_classifier(normed, preprocessing=(0.4, 0.25))
    attack = make_attack(classifier)
    by_order = measure_criticality(classifier, *data, attack=attack)
    by_input = measure_criticality(
        classifier, *data, attack=attack, layers=LayerOptions(predecessor="input"), batch_size=20
    )
    x_adv = attack.generate(*data)
    normed.eval()
    with torch.no_grad():
        for batch in (data[0], x_adv):
            run((torch.tensor(batch) - 0.4) / 0.25)
    assert [layer.weakness for layer in by_input] == pytest.approx([layer.weakness for layer in by_order], rel=1e-6)
    for layer in by_input:
        clean, perturbed = entered[layer.name]
        weakness = ((perturbed - clean).flatten(1).norm(dim=1) / clean[0].numel()).mean().item()
        assert layer.criticality == pytest.approx(layer.weakness / weakness, rel=1e-4)
    assert by_input[2].criticality != pytest.approx(by_order[2].criticality, rel=0.1)  # what enters conv3 is a sum


def test_after_the_norm_the_scale_before_it_does_not_matter(data):
    torch.manual_seed(3)
    model = Normed()
    scaled = copy.deepcopy(model)
    with torch.no_grad():
        scaled.conv2.weight.mul_(0.1)
        scaled.bn2.running_mean.mul_(0.1)
        scaled.bn2.running_var.mul_(0.01)
        scaled.bn2.eps *= 0.01
    figures = {}
    for after_norm in (False, True):
        for network in (model, scaled):
            classifier = make_classifier(network)
            measured = measure_criticality(
                classifier, *data, attack=make_attack(classifier), layers=LayerOptions(after_norm=after_norm)
            )
            figures.setdefault(after_norm, []).append([layer.criticality for layer in measured])
    assert figures[True][0] == pytest.approx(figures[True][1], rel=1e-4)
    assert figures[False][0][1] == pytest.approx(10 * figures[False][1][1], rel=1e-4)


def test_does_not_depend_on_where_the_normalisation_lives(chain, data):
    outside = make_classifier(copy.deepcopy(chain), preprocessing=(0.4, 0.25))

    class Inside(nn.Module):
        def __init__(self):
            super().__init__()
            self.chain = copy.deepcopy(chain)

        def forward(self, x):
            return self.chain((x - 0.4) / 0.25)

    inside = make_classifier(Inside())
    first, second = (measure_criticality(c, *data, attack=make_attack(c)) for c in (outside, inside))
    assert [a.criticality for a in first] == pytest.approx([b.criticality for b in second], rel=1e-5)


def test_does_not_depend_on_batches_or_label_format(chain, data):
    classifier = make_classifier(chain)
    attack = make_attack(classifier)
    one_hot = np.eye(4, dtype=np.float32)[data[1]]
    whole = measure_criticality(classifier, *data, attack=attack, batch_size=48)
    parts = measure_criticality(classifier, data[0], one_hot, attack=attack, batch_size=7)
    assert [a.criticality for a in whole] == pytest.approx([b.criticality for b in parts], rel=1e-5)


def test_without_labels_the_predictions_are_attacked(chain, data):
    classifier = make_classifier(chain)
    attack = make_attack(classifier)
    predicted = classifier.predict(data[0]).argmax(axis=1)
    assert measure_criticality(classifier, data[0], attack=attack) == measure_criticality(
        classifier, data[0], predicted, attack=attack
    )


@pytest.mark.parametrize("fails", [False, True])
def test_network_and_random_generators_come_back_as_they_were(normed, data, fails):
    classifier = make_classifier(normed)
    normed.train()
    normed.bn2.eval()
    normed.conv1.weight.requires_grad_(False)
    users = normed.conv3.register_forward_hook(lambda *_: None)
    attack = make_attack(classifier, num_random_init=1)
    random.seed(1)
    state = {name: value.clone() for name, value in normed.state_dict().items()}
    generators = (random.getstate(), torch.get_rng_state().tolist(), np.random.get_state()[1].tolist())
    if fails:
        calls = []

        def interrupt(*_):
            calls.append(1)
            if len(calls) == 4:
                raise KeyboardInterrupt

        handle = normed.fc.register_forward_hook(interrupt)
        with pytest.raises(KeyboardInterrupt):
            measure_criticality(classifier, *data, attack=attack)
        handle.remove()
    else:
        measure_criticality(classifier, *data, attack=attack)
    assert (random.getstate(), torch.get_rng_state().tolist(), np.random.get_state()[1].tolist()) == generators
    assert [m.training for m in (normed, normed.bn1, normed.bn2)] == [True, True, False]
    assert [name for name, p in normed.named_parameters() if not p.requires_grad] == ["conv1.weight"]
    assert [len(m._forward_hooks) for m in normed.modules()].count(1) == 1 and users.id in normed.conv3._forward_hooks
    assert all(torch.equal(value, state[name]) for name, value in normed.state_dict().items())
    assert all(p.grad is None for p in normed.parameters())


def test_costs_one_attack_and_one_forward_pass_of_both_batches_together(chain, data):
    classifier = make_classifier(chain)
    passes = []
    chain.first.register_forward_hook(lambda *_: passes.append(1))
    measure_criticality(classifier, *data, attack=make_attack(classifier, max_iter=4), batch_size=16)
    assert len(passes) == 4 + 3 * (4 + 1)  # a look at the output, finding the layers and the heads, and three batches


def test_attack_that_moves_nothing_is_refused(chain, data):
    classifier = make_classifier(chain)
    with pytest.raises(ValueError, match="moved no input"):
        measure_criticality(classifier, *data, attack=make_attack(classifier, max_iter=0))


def test_table_and_bar_chart(chain, data, tmp_path):
    classifier = make_classifier(chain)
    measured = measure_criticality(classifier, *data, attack=make_attack(classifier))
    lines = str(measured).splitlines()
    assert len(lines) == 5 and lines[-1].endswith("(head)")
    assert all(f"{layer.criticality:.4g}" in line for layer, line in zip(measured, lines[1:], strict=True))
    ax = measured.plot()
    assert [bar.get_y() + bar.get_height() for bar in ax.patches] == pytest.approx(
        [layer.criticality for layer in measured]
    )
    ax.figure.savefig(tmp_path / "bars.png")


def test_measures_a_transformer(data):
    model = timm.create_model("vit_tiny_patch16_224", img_size=6, patch_size=3, depth=2, num_classes=4, in_chans=2)
    classifier = make_classifier(model)
    measured = measure_criticality(classifier, *data, attack=make_attack(classifier))
    assert len(measured) == 10 and all(layer.weakness > 0 for layer in measured)
