import copy

import pytest
import torch
from conftest import INPUT_SHAPE, ForeignBatchNorm, make_attack, make_classifier
from torch import nn

from art_clat.attacks.tensor_attack import TensorAttack
from art_clat.layers.discovery import find_layers
from art_clat.models.tensor_classifier import TensorClassifier
from art_clat.training.objectives import (
    MART,
    OBJECTIVES,
    TRADES,
    AdversarialCLAT,
    AdversarialTraining,
    CleanCLAT,
    RelativeCLAT,
    SingleStepCLAT,
    find_objective,
    list_objectives,
    register_objective,
)
from art_clat.utils.batch import Batch

CHOSEN = ("second", "hidden")
WEIGHT = 0.3


@pytest.fixture
def case(chain, data):
    network = TensorClassifier(make_classifier(chain))
    layers = find_layers(chain, lambda size: chain(torch.rand(size, *INPUT_SHAPE)))
    chosen = [layer for layer in layers if layer.name in CHOSEN]
    x, y = torch.tensor(data[0]), torch.tensor(data[1])
    x_adv = (x + 0.1 * torch.randn_like(x)).clamp(0, 1)
    return network, chosen, x, x_adv, y


def distance_by_hand(chain, x, x_adv):
    clean, perturbed = chain.features(x), chain.features(x_adv)
    per_sample = [sum((p - c).flatten().norm() for p, c in pairs) for pairs in _by_sample(clean, perturbed)]
    return torch.stack(per_sample)


def _by_sample(clean, perturbed):
    for i in range(len(clean["head"])):
        yield [(perturbed[name][i], clean[name][i]) for name in CHOSEN]


@pytest.mark.parametrize("reading", ["adversarial", "clean"])
def test_loss_and_gradient_are_those_of_the_equations(chain, case, reading):
    network, chosen, x, x_adv, y = case
    objective = (AdversarialCLAT if reading == "adversarial" else CleanCLAT)(network, chosen, WEIGHT)
    on = x_adv if reading == "adversarial" else x
    cross_entropy = nn.functional.cross_entropy(chain.features(on)["head"], y)
    distance = distance_by_hand(chain, x, x_adv).mean()
    expected = cross_entropy + WEIGHT * distance
    parameters = list(chain.parameters())
    expected_gradients = torch.autograd.grad(expected, parameters)
    got = objective.loss(Batch.whole(x, y), x_adv)
    torch.testing.assert_close(got.loss, expected)
    torch.testing.assert_close(got.cross_entropy, cross_entropy.detach())
    torch.testing.assert_close(got.criticality_loss, distance.detach())
    torch.testing.assert_close(got.logits, chain.features(on)["head"].detach())
    for ours, reference in zip(torch.autograd.grad(got.loss, parameters), expected_gradients, strict=True):
        torch.testing.assert_close(ours, reference, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("reading", ["adversarial", "clean"])
@pytest.mark.parametrize("norm", [nn.BatchNorm2d, ForeignBatchNorm])
def test_statistics_are_those_of_the_pass_with_the_cross_entropy(normed, data, reading, norm):
    """At λ = 0 the "adversarial" objective is adversarial training of the chosen layers, BatchNorm and all."""
    normed.bn2 = norm(6)
    network = TensorClassifier(make_classifier(normed))
    chosen = [
        layer
        for layer in find_layers(normed, lambda size: normed(torch.rand(size, *INPUT_SHAPE)))
        if layer.name != "fc"
    ]
    x, y = torch.tensor(data[0]), torch.tensor(data[1])
    x_adv = (x + 0.1 * torch.randn_like(x)).clamp(0, 1)
    normed.dropout.eval()
    reference = copy.deepcopy(normed)
    buffers = dict(normed.named_buffers())
    loss = nn.functional.cross_entropy(reference(x_adv if reading == "adversarial" else x), y)
    objective = (AdversarialCLAT if reading == "adversarial" else CleanCLAT)(network, chosen, 0.0)
    got = objective.loss(Batch.whole(x, y), x_adv).loss
    expected = torch.autograd.grad(loss, list(reference.parameters()))
    for one, other in zip(torch.autograd.grad(got, list(normed.parameters())), expected, strict=True):
        torch.testing.assert_close(one, other)
    for name, buffer in reference.named_buffers():
        assert normed.get_buffer(name) is buffers[name]
        torch.testing.assert_close(buffers[name], buffer)


def test_inner_attack_of_eq_5_ascends_the_feature_distance_not_the_loss(chain, case):
    network, chosen, x, _, y = case
    attack = TensorAttack(make_attack(network.estimator, eps=0.1, eps_step=0.02, max_iter=20), network)
    objective = CleanCLAT(network, chosen, WEIGHT)
    x_adv = objective.perturb(attack, Batch.whole(x, y))
    assert (x_adv - x).abs().max() <= 0.1 + 1e-6
    with torch.no_grad():
        on_features = distance_by_hand(chain, x, x_adv)
        on_output = distance_by_hand(chain, x, attack(Batch.whole(x, y)))
        at_random = distance_by_hand(chain, x, (x + 0.1 * torch.randn_like(x).sign()).clamp(0, 1))
        loss = [nn.functional.cross_entropy(chain(z), y) for z in (x_adv, attack(Batch.whole(x, y)))]
    assert on_features.mean() > 1.05 * on_output.mean()
    assert (on_features > at_random).all()
    assert loss[0] < loss[1]


@pytest.mark.parametrize("cls", [AdversarialTraining, TRADES, MART])
def test_whole_networks_are_trained_on_the_preprocessing_of_training(case, monkeypatch, cls):
    network, chosen, x, x_adv, y = case
    loss, fits = network.loss, []
    monkeypatch.setattr(network, "loss", lambda *args, fit=False: fits.append(fit) or loss(*args, fit=fit))
    for layers, fit in ((None, True), (chosen, False)):
        fits.clear()
        cls(network, layers, 1.0).loss(Batch.whole(x, y), x_adv)
        assert fits == [fit] * len(fits) and fits


@pytest.mark.parametrize("single_step", [False, True])
def test_inner_attack_of_eq_5_has_no_momentum(case, single_step):
    network, chosen, x, _, y = case
    found = []
    for decay in (None, 0.9):
        torch.manual_seed(0)
        attack = TensorAttack(make_attack(network.estimator, decay=decay, norm=2, eps=0.5, eps_step=0.2), network)
        cls = SingleStepCLAT if single_step else CleanCLAT
        found.append(cls(network, chosen, WEIGHT).perturb(attack, Batch.whole(x, y)))
    assert torch.equal(*found)


def test_inner_attack_of_eq_5_ignores_the_labels(case):
    network, chosen, x, _, y = case
    attack = TensorAttack(make_attack(network.estimator), network)
    objective = CleanCLAT(network, chosen, WEIGHT)
    results = []
    for labels in (y, (y + 1) % 4):
        torch.manual_seed(5)
        results.append(objective.perturb(attack, Batch.whole(x, labels)))
    assert torch.equal(*results)


def test_single_step_goes_to_the_edge_of_the_ball(case):
    network, chosen, x, _, y = case
    attack = TensorAttack(make_attack(network.estimator, eps=0.1, eps_step=0.001), network)
    calls = []
    handle = network.model.first.register_forward_hook(lambda *_: calls.append(1))
    x_adv = SingleStepCLAT(network, chosen, WEIGHT).perturb(attack, Batch.whole(x, y))
    handle.remove()
    assert len(calls) == 2  # the clean features, and one step
    inside = (x_adv > 0) & (x_adv < 1)
    assert ((x_adv - x).abs()[inside] > 0.099).double().mean() > 0.6


@pytest.mark.parametrize("objective", [AdversarialTraining, AdversarialCLAT])
def test_objectives_without_inner_loss_use_the_ordinary_attack(case, objective):
    network, chosen, x, _, y = case
    attack = TensorAttack(make_attack(network.estimator), network)
    made = objective(network, None if objective is AdversarialTraining else chosen, WEIGHT)
    assert torch.equal(made.perturb(attack, Batch.whole(x, y)), attack(Batch.whole(x, y)))


def test_the_classifiers_preprocessing_and_loss_are_used(chain, data):
    loss = nn.CrossEntropyLoss(label_smoothing=0.2)
    network = TensorClassifier(make_classifier(chain, loss=loss, preprocessing=(0.4, 0.25)))
    x, y = torch.tensor(data[0]), torch.tensor(data[1])
    expected = loss(chain.features((x - 0.4) / 0.25)["head"], y)
    torch.testing.assert_close(AdversarialTraining(network, None, 0.0).loss(Batch.whole(x, y), x).loss, expected)


def test_relative_distance_is_divided_by_the_length_of_the_clean_feature(chain, case):
    network, chosen, x, x_adv, y = case
    got = RelativeCLAT(network, chosen, WEIGHT).loss(Batch.whole(x, y), x_adv)
    clean, perturbed = chain.features(x), chain.features(x_adv)
    ratios = [
        ((perturbed[name][i] - clean[name][i]).norm() / clean[name][i].norm()) for name in CHOSEN for i in range(len(x))
    ]
    distance = torch.stack(ratios).sum() / len(x)
    expected = nn.functional.cross_entropy(perturbed["head"], y) + WEIGHT * distance
    torch.testing.assert_close(got.criticality_loss, distance.detach())
    parameters = list(chain.parameters())
    for ours, reference in zip(
        torch.autograd.grad(got.loss, parameters), torch.autograd.grad(expected, parameters), strict=True
    ):
        torch.testing.assert_close(ours, reference, atol=1e-5, rtol=1e-4)


def test_trades_is_clean_cross_entropy_and_divergence(chain, case):
    network, _, x, x_adv, y = case
    got = TRADES(network, None, 6.0).loss(Batch.whole(x, y), x_adv)
    clean, perturbed = chain.features(x)["head"], chain.features(x_adv)["head"]
    divergence = nn.functional.kl_div(perturbed.log_softmax(1), clean.softmax(1), reduction="batchmean")
    torch.testing.assert_close(got.loss, nn.functional.cross_entropy(clean, y) + 6 * divergence)
    torch.testing.assert_close(got.criticality_loss, divergence.detach())
    torch.testing.assert_close(got.logits, clean.detach())


def test_trades_climbs_the_divergence_from_near_the_input(chain, case):
    network, _, x, _, y = case
    attack = TensorAttack(make_attack(network.estimator, eps=0.1, eps_step=0.02, max_iter=20), network)

    def divergence(z):
        p, q = chain.features(x)["head"].softmax(1), chain.features(z)["head"].log_softmax(1)
        return nn.functional.kl_div(q, p, reduction="batchmean").item()

    trades = TRADES(network, None, 6.0).perturb(attack, Batch.whole(x, y))
    assert (trades - x).abs().max() <= 0.1 + 1e-6 and trades.min() >= 0 and trades.max() <= 1
    noise = (x + 0.1 * torch.randn_like(x).sign()).clamp(0, 1)
    assert divergence(trades) > 2 * divergence(noise)
    wrong = (y + 1) % 4  # the labels do not matter
    torch.manual_seed(0)
    one = TRADES(network, None, 6.0).perturb(attack, Batch.whole(x, y))
    torch.manual_seed(0)
    assert torch.equal(TRADES(network, None, 6.0).perturb(attack, Batch.whole(x, wrong)), one)
    attack = TensorAttack(make_attack(network.estimator, eps=0.1, eps_step=0.0001, max_iter=1), network)
    assert (TRADES(network, None, 6.0).perturb(attack, Batch.whole(x, y)) - x).abs().max() < 0.01


def test_mart_by_hand(chain, case):
    network, _, x, x_adv, y = case
    with torch.no_grad():
        chain.head.weight.mul_(20)  # so that the divergence counts
    got = MART(network, None, 5.0).loss(Batch.whole(x, y), x_adv)
    p, q = chain.features(x)["head"].softmax(1), chain.features(x_adv)["head"].softmax(1)
    total = 0
    for clean, perturbed, label in zip(p, q, y, strict=True):
        others = [perturbed[k] for k in range(4) if k != label]
        total += -perturbed[label].log() - (1 - max(others)).log()
        total += 5 * (clean * (clean / perturbed).log()).sum() * (1 - clean[label])
    torch.testing.assert_close(got.loss, total / len(x))
    one_hot = MART(network, None, 5.0).loss(Batch.whole(x, nn.functional.one_hot(y, 4).float()), x_adv)
    torch.testing.assert_close(one_hot.loss, got.loss)


@pytest.mark.parametrize("name", list_objectives())
def test_every_objective_trains_the_chosen_layers(chain, case, name):
    network, chosen, x, _, y = case
    attack = TensorAttack(make_attack(network.estimator), network)
    objective = find_objective(name)(network, chosen, 0.5)
    x_adv = objective.perturb(attack, Batch.whole(x, y))
    got = objective.loss(Batch.whole(x, y), x_adv)
    assert 0 < (x_adv - x).abs().max() <= 0.1 + 1e-6
    torch.testing.assert_close(
        got.loss.detach(), got.cross_entropy + (0.5 * got.criticality_loss if name != "pgd_at" else 0)
    )
    on = x_adv if objective.logits_are_adversarial else x
    torch.testing.assert_close(got.logits, chain.features(on)["head"].detach())
    assert all(g.abs().sum() > 0 for g in torch.autograd.grad(got.loss, chosen[0].parameters()))


def test_a_registered_objective(case):
    network, chosen, *_ = case

    @register_objective("doubled, for a test")
    class Doubled(AdversarialCLAT):
        default_weight = 0.3

    try:
        assert isinstance(find_objective("doubled, for a test")(network, chosen, 0.1), Doubled)
        assert "doubled, for a test" in list_objectives() and "doubled, for a test" not in list_objectives(
            first_stage=True
        )
        with pytest.raises(ValueError, match="already"):
            register_objective("doubled, for a test")(type("Other", (Doubled,), {}))
    finally:
        del OBJECTIVES["doubled, for a test"]
