"""Adversarial weight perturbation, against plain torch."""

import copy

import numpy as np
import pytest
import torch
from conftest import Chain, Normed, make_attack, make_classifier, make_data, observe
from torch import nn

from art_clat import AdversarialTrainerCLATPyTorch, PerformanceOptions
from art_clat.training.stage import Stage
from art_clat.utils.weights import perturbable

EPS, STEP, NB_STEPS = 0.5, 0.2, 3
FIRST = {"warmup": 1, "first_stage": "awp"}
SECOND = {"warmup": 0, "objective": "pgd_at", "selection": ["second", "hidden"]}


def make_trainer(model, *, lr=0.05, attack=None, **options):
    classifier = make_classifier(model, lr=lr)
    # In the Euclidean norm a step does not depend on signs, which rounding could decide.
    settings = {"norm": 2, "eps": EPS, "eps_step": STEP, "max_iter": NB_STEPS}
    return AdversarialTrainerCLATPyTorch(classifier, make_attack(classifier, **settings), seed=0, **options)


def fit(trainer, nb_epochs=1, **kwargs):
    trainer.fit(*make_data(), batch_size=16, nb_epochs=nb_epochs, verbose=False, **kwargs)
    return trainer.classifier.model


def without_dropout():
    model = Normed()
    model.dropout.p = 0.0
    return model


def attacked_by_hand(model, x, y):
    """PGD in the Euclidean norm from the inputs, with the network in evaluation mode."""
    model.eval()
    z = x.clone()
    for _ in range(NB_STEPS):
        z.requires_grad_(True)
        (gradient,) = torch.autograd.grad(nn.functional.cross_entropy(model(z), y), z)
        with torch.no_grad():
            z = (z + STEP * gradient / gradient.flatten(1).norm(dim=1).view(-1, 1, 1, 1)).clamp(0, 1)
            delta = z - x
            length = delta.flatten(1).norm(dim=1).view(-1, 1, 1, 1)
            z = x + delta * torch.clamp(EPS / length, max=1)
    return z.detach()


def trained_by_hand(model, batches, gamma, *, trained, in_training_mode):
    """AWP as its authors wrote it: a proxy of the network climbs, and the difference is scaled tensor by tensor."""
    parameters = {name: p for name, p in model.named_parameters() if name.startswith(trained)}
    optimizer = torch.optim.SGD(parameters.values(), lr=0.05, momentum=0.9, weight_decay=5e-4)
    for x, y in batches:
        x_adv = attacked_by_hand(model, x, y)
        proxy = copy.deepcopy(model).train(in_training_mode)
        nn.functional.cross_entropy(proxy(x_adv), y).backward()
        moves = {}
        for name, parameter in parameters.items():
            if parameter.ndim > 1 and "weight" in name:
                gradient = dict(proxy.named_parameters())[name].grad
                moves[name] = gamma * parameter.detach().norm() * gradient / gradient.norm()
        before = {name: parameter.detach().clone() for name, parameter in parameters.items()}
        with torch.no_grad():
            for name, move in moves.items():
                parameters[name].add_(move)
        model.train(in_training_mode)
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(x_adv), y).backward()
        with torch.no_grad():
            for name in moves:
                parameters[name].copy_(before[name])
        optimizer.step()


@pytest.mark.parametrize(
    ("make", "options", "trained"),
    [
        (without_dropout, FIRST, ("conv", "bn", "fc")),
        (Chain, SECOND, ("second", "hidden")),
    ],
    ids=["first stage", "second stage"],
)
def test_one_epoch_equals_the_authors_procedure(make, options, trained):
    model, gamma, batches = make(), 0.3, []
    by_hand, without = copy.deepcopy(model), copy.deepcopy(model)
    trainer = make_trainer(model, weight_perturbation=gamma, **options)
    observe(trainer, step=lambda loop, step, batch, *args: batches.append((batch.x, batch.y)) or step(batch, *args))
    fit(trainer)
    assert len(batches) == 3
    trained_by_hand(by_hand, batches, gamma, trained=trained, in_training_mode=options is FIRST)
    for name, tensor in by_hand.state_dict().items():
        torch.testing.assert_close(model.state_dict()[name], tensor, rtol=1e-4, atol=1e-6)
    fit(make_trainer(without, **{**options, "first_stage": "pgd_at"}))
    pairs = zip(model.parameters(), without.parameters(), strict=True)
    assert max((one - other).abs().max() for one, other in pairs) > 1e-3  # far above the tolerance


def test_statistics_of_batch_norms_move_once():
    model = Normed().eval()  # as a user may hand it over
    fit(make_trainer(model, warmup=1, first_stage="awp"))
    assert int(model.bn1.num_batches_tracked) == 3


def weights_after(nb_epochs=1, **options):
    torch.manual_seed(1)
    return [p.detach().clone() for p in fit(make_trainer(Normed(), **options), nb_epochs).parameters()]


def equal(one, other):
    return all(torch.equal(a, b) for a, b in zip(one, other, strict=True))


def test_which_stage_it_applies_to():
    first = {"warmup": 1}
    assert equal(weights_after(**first), weights_after(**first, weight_perturbation=0.1))
    assert not equal(weights_after(**first), weights_after(**first, first_stage="awp"))
    awp = {"warmup": 1, "first_stage": "awp"}
    assert equal(weights_after(**awp), weights_after(**awp, weight_perturbation=0.01))
    assert not equal(weights_after(**awp), weights_after(**awp, weight_perturbation=0.02))
    second = {"warmup": 0, "objective": "pgd_at"}
    assert not equal(weights_after(**second), weights_after(**second, weight_perturbation=0.1))
    assert equal(weights_after(**second, weight_perturbation=0.01), weights_after(warmup=0, objective="awp"))


@pytest.mark.parametrize(("gamma", "passes"), [(0.0, 6), (0.1, 12)])
def test_costs_nothing_when_it_is_zero(monkeypatch, gamma, passes):
    calls, loss = [], Stage.loss
    monkeypatch.setattr(Stage, "loss", lambda *args: calls.append(1) or loss(*args))
    fit(make_trainer(Normed(), warmup=0, weight_perturbation=gamma), nb_epochs=2)
    assert len(calls) == passes


def test_which_tensors_move():
    from timm.layers import LayerScale

    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.pos_embed = nn.Parameter(torch.zeros(1, 4, 3))
            self.attention = nn.MultiheadAttention(4, 2)
            self.norm, self.scale, self.conv = nn.LayerNorm(4), LayerScale(4), nn.Conv2d(1, 2, 3)

    model = Model()
    names = {parameter: name for name, parameter in model.named_parameters()}
    moved = {names[parameter] for parameter in perturbable(model)}
    assert moved == {"attention.in_proj_weight", "attention.out_proj.weight", "conv.weight"}


class Fails(Normed):
    """Raises in the `at`-th pass in training mode."""

    def __init__(self, at):
        super().__init__()
        self.at, self.passes = at, 0

    def forward(self, x):
        self.passes += self.training
        if self.training and self.passes == self.at:
            raise KeyboardInterrupt
        return super().forward(x)


@pytest.mark.parametrize("at", [1, 2])
def test_weights_are_put_back_after_an_exception(at):
    model = Fails(at)
    before = copy.deepcopy(model.state_dict())
    buffers = dict(model.named_buffers())
    with pytest.raises(KeyboardInterrupt):
        fit(make_trainer(model, warmup=1, first_stage="awp", weight_perturbation=0.5))
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, before[name]), name
    assert all(model.get_buffer(name) is buffer for name, buffer in buffers.items())
    assert all(p.grad is None for p in model.parameters())


@pytest.mark.parametrize("stage", [{"warmup": 1, "first_stage": "awp"}, {"warmup": 0}])
def test_too_large_is_named_and_undone(stage):
    model = Normed()
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(FloatingPointError, match=r"not finite in epoch 0, batch 0.*`weight_perturbation` \(1e\+38\)"):
        fit(make_trainer(model, weight_perturbation=1e38, **stage))
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items() if "num_" not in name)


@pytest.mark.parametrize("value", [-0.01, np.nan, np.inf, "0.01", True])
def test_bad_values(value):
    with pytest.raises(ValueError, match="`weight_perturbation` must be a finite number of at least 0"):
        make_trainer(Normed(), weight_perturbation=value)


def test_parameters_that_the_optimizer_does_not_hold():
    model = Normed()
    classifier = make_classifier(model, optimizer=torch.optim.SGD(model.conv1.parameters(), lr=0.1))
    trainer = AdversarialTrainerCLATPyTorch(classifier, make_attack(classifier), warmup=1, first_stage="awp")
    with pytest.raises(ValueError, match=r"`classifier.optimizer` does not hold the parameters of .* bn1"):
        fit(trainer)


def test_a_weight_whose_gradient_is_zero_stays():
    model = Normed()
    with torch.no_grad():
        model.fc.weight.zero_()  # no gradient reaches the convolutions
    fit(make_trainer(model, warmup=1, first_stage="awp", lr=1e-3))
    assert all(torch.isfinite(p).all() for p in model.parameters())


@pytest.mark.parametrize("stage", [{"warmup": 2, "first_stage": "awp"}, {"warmup": 0}])
def test_resumes_to_the_bit(tmp_path, stage):
    def make():
        torch.manual_seed(5)
        return make_trainer(Normed(), weight_perturbation=0.1, ema_decay=0.8, **stage)

    straight = fit(make(), 2)
    broken, steps = make(), []

    def failing(loop, step, *args):
        steps.append(1)
        if len(steps) == 5:
            raise KeyboardInterrupt
        return step(*args)

    with pytest.raises(KeyboardInterrupt):
        fit(observe(broken, step=failing), 2, checkpoint=tmp_path, checkpoint_every=1)
    resumed = fit(make(), 2, checkpoint=tmp_path)
    assert equal(straight.state_dict().values(), resumed.state_dict().values())


def test_with_mixed_precision_and_channels_last():
    performance = PerformanceOptions(amp=True, channels_last=True)
    options = {"warmup": 1, "first_stage": "awp", "weight_perturbation": 0.05}
    exact = weights_after(2, **options)
    rounded = weights_after(2, **options, performance=performance)
    for one, other in zip(exact, rounded, strict=True):
        torch.testing.assert_close(one, other, rtol=0.05, atol=0.02)
        assert one.stride() == other.stride()
