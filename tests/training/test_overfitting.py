"""Single-step training, and the guard that catches its catastrophic overfitting."""

import logging

import numpy as np
import pytest
import torch
from art.attacks.evasion import ProjectedGradientDescent, SquareAttack
from art.data_generators import NumpyDataGenerator
from art.estimators.classification import PyTorchClassifier
from conftest import Chain, Normed, make_attack, make_classifier, make_data, observe
from sklearn.datasets import load_digits
from torch import nn

from art_clat import AdversarialTrainerCLATPyTorch, History
from art_clat.attacks.tensor_attack import TensorAttack
from art_clat.models.tensor_classifier import TensorClassifier
from art_clat.training import overfitting
from art_clat.training.objectives import SingleStepTraining
from art_clat.training.overfitting import OverfittingGuard, first_samples
from art_clat.utils.batch import Batch
from art_clat.utils.processes import Ranks


class TestOnDigits:
    """ε is so large that single steps soon teach the network to hide its gradient."""

    EPS = 0.4

    def train(self, monkeypatch, *, guarded):
        images, y = torch.tensor(load_digits().images[:500] / 16, dtype=torch.float32), load_digits().target[:500]
        x = nn.functional.interpolate(images[:, None], scale_factor=2).numpy()
        torch.manual_seed(0)
        blocks = []
        for before, after, stride in ((1, 8, 1), (8, 16, 2), (16, 16, 1), (16, 32, 2)):
            blocks += [nn.Conv2d(before, after, 3, stride, padding=1), nn.BatchNorm2d(after), nn.ReLU()]
        model = nn.Sequential(*blocks, nn.Flatten(), nn.Linear(512, 10))
        optimizer = torch.optim.SGD(model.parameters(), 0.02, momentum=0.9)
        settings = {"optimizer": optimizer, "clip_values": (0, 1), "device_type": "cpu"}
        classifier = PyTorchClassifier(model, nn.CrossEntropyLoss(), (1, 16, 16), 10, **settings)
        attack = ProjectedGradientDescent(
            classifier, eps=self.EPS, eps_step=self.EPS / 4, max_iter=10, num_random_init=1, verbose=False
        )
        trainer = AdversarialTrainerCLATPyTorch(classifier, attack, warmup=22, first_stage="fgsm_rs", seed=0)
        monkeypatch.setattr(overfitting, "TRAINED_PER_CHECKED", 20)  # 500 images make few batches
        if not guarded:
            monkeypatch.setattr(OverfittingGuard, "check", lambda *args: None)
        trainer.fit(x, y, batch_size=25, nb_epochs=22, verbose=False)
        np.random.seed(0)
        robust = (classifier.predict(attack.generate(x, y)).argmax(axis=1) == y).mean()
        return robust, trainer.history

    def test_catastrophic_overfitting_is_caught(self, monkeypatch, caplog):
        robust, history = self.train(monkeypatch, guarded=True)
        assert robust > 0.15
        steps = [record.attack_steps for record in history.epochs]
        assert steps[0] == 1 and steps[-1] > 1 and steps == sorted(steps)
        about = [record for record in caplog.records if record.name == overfitting.__name__]
        warnings = [record for record in about if record.levelno >= logging.WARNING]
        assert len(warnings) == 1 and "\n" not in warnings[0].getMessage()
        assert "Catastrophic overfitting in epoch" in warnings[0].getMessage()

    def test_without_the_guard_robustness_is_lost(self, monkeypatch):
        robust, history = self.train(monkeypatch, guarded=False)
        assert robust < 0.08 and history.epochs[-1].train_robust_accuracy > 0.5
        assert {record.attack_steps for record in history.epochs} == {1}


def make_trainer(model=None, **options):
    torch.manual_seed(7)
    classifier = make_classifier(model or Normed())
    settings = {"warmup": 4, "first_stage": "fgsm_rs", "ema_decay": 0.8, "seed": 3, **options}
    return AdversarialTrainerCLATPyTorch(classifier, make_attack(classifier, num_random_init=1), **settings)


def fit(trainer, nb_epochs=5, **kwargs):
    trainer.fit(*make_data(), batch_size=8, nb_epochs=nb_epochs, verbose=False, **kwargs)
    return trainer


def state_of(trainer):
    momentum = trainer.classifier.optimizer.state_dict()["state"]
    buffers = [entry["momentum_buffer"] for entry in momentum.values()]
    return [*trainer.classifier.model.state_dict().values(), *buffers]


def equal(one, other):
    return len(one) == len(other) and all(torch.equal(a, b) for a, b in zip(one, other, strict=True))


@pytest.fixture
def overfits(monkeypatch):
    """The network seems to overfit in epoch 1 with one step, in epoch 3 with two; it is checked every second batch."""
    seen = []

    def accuracies(self, progress):
        fails = (progress.epoch, progress.attack_steps) in ((1, 1), (3, 2))
        seen.append((progress.epoch, progress.attack_steps))
        return (0.9, 0.1) if fails else (0.6, 0.5)

    monkeypatch.setattr(OverfittingGuard, "_accuracies", accuracies)
    monkeypatch.setattr(overfitting, "TRAINED_PER_CHECKED", 16 / 48)
    return seen


class TestBackOff:
    @pytest.mark.parametrize("at", [1, 6, 8, 9, 14, 20, 24, 25, 30])
    def test_a_resumed_run_ends_like_one_without_a_break(self, tmp_path, overfits, at):
        straight = fit(make_trainer())
        broken, steps = make_trainer(), []

        def failing(loop, step, *args):
            steps.append(1)
            if len(steps) == at:
                raise KeyboardInterrupt
            return step(*args)

        with pytest.raises(KeyboardInterrupt):
            fit(observe(broken, step=failing), checkpoint=tmp_path, checkpoint_every=1)
        resumed = fit(make_trainer(), checkpoint=tmp_path, checkpoint_every=1)
        assert equal(state_of(straight), state_of(resumed))
        steps = [record.attack_steps for record in straight.history.epochs]
        assert steps == [record.attack_steps for record in resumed.history.epochs] == [1, 2, 2, 4, None]

    def test_weights_of_the_last_good_check_come_back(self, overfits):
        """Momentum and average begin anew."""
        trainer, weights, averages, momenta = make_trainer(), [], [], []

        def step(loop, original, *args):
            loss = original(*args)
            state = loop.model.state_dict()
            weights.append([tensor.clone() for tensor in state.values()])
            averages.append([loop.keeper.average.state()[name] for name in state])
            momenta.append(len(loop.optimizer.state))
            return loss

        fit(observe(trainer, step=step), nb_epochs=2)
        # Six batches an epoch: checked after batches 1, 3, 5 (good), then after 7, which is caught.
        assert equal(weights[7], weights[5]) and not equal(weights[6], weights[5])
        assert momenta[6] > 0 and momenta[7] == 0
        assert equal(averages[7], weights[7]) and not equal(averages[6], weights[6])

    def test_a_later_step_that_is_not_finite_does_not_bring_bad_weights_back(self, monkeypatch):
        """On a GPU finiteness is checked every fiftieth batch only."""
        answers = iter([(0.6, 0.5)] * 3 + [(0.9, 0.1)] + [(0.6, 0.5)] * 9)
        monkeypatch.setattr(OverfittingGuard, "_accuracies", lambda *args: next(answers))
        monkeypatch.setattr(overfitting, "TRAINED_PER_CHECKED", 8 / 48)
        weights = []

        def step(loop, original, batch, x_adv, number):
            if number == 3:
                torch.nn.init.constant_(loop.model.fc.weight, float("nan"))
            loss = original(batch, x_adv, number)
            weights.append([p.detach().clone() for p in loop.model.parameters()])
            return loss

        trainer = observe(make_trainer(), step=step, look_every=lambda *args: 50)
        with pytest.raises(FloatingPointError):
            fit(trainer)
        assert equal(weights[2], weights[1])
        assert equal(list(trainer.classifier.model.parameters()), weights[1])

    def test_the_history_survives_json(self, overfits):
        trainer = fit(make_trainer())
        assert History.from_json(trainer.history.to_json()).epochs == trainer.history.epochs

    def test_a_later_catch_is_no_second_warning(self, overfits, caplog):
        fit(make_trainer())
        warnings = [record.getMessage() for record in caplog.records if record.levelno == logging.WARNING]
        assert len(warnings) == 1 and "epoch 1, batch 1" in warnings[0] and "90 %" in warnings[0]

    def test_at_eight_steps_the_watch_ends(self, monkeypatch):
        monkeypatch.setattr(OverfittingGuard, "_accuracies", lambda *args: (0.9, 0.04))
        monkeypatch.setattr(overfitting, "TRAINED_PER_CHECKED", 8 / 48)
        seen, perturb = [], SingleStepTraining.perturb

        def spying(self, attack, batch):
            seen.append(self.nb_steps)
            return perturb(self, attack, batch)

        monkeypatch.setattr(SingleStepTraining, "perturb", spying)
        fit(make_trainer(), nb_epochs=2)
        assert seen == [1, 2, 4, *[8] * 9]

    def test_the_stage_ends_with_a_check(self, monkeypatch):
        checked = []
        monkeypatch.setattr(
            OverfittingGuard, "_accuracies", lambda self, p: checked.append((p.epoch, p.attack_steps)) or (0.6, 0.5)
        )
        fit(make_trainer(warmup=2), nb_epochs=3)
        assert checked == [(0, 1), (1, 1)]  # at the beginning and at the end: the next would cost more than 3 %
        checked.clear()
        fit(make_trainer(warmup=2), nb_epochs=1)
        assert checked == [(0, 1), (0, 1)]

    @pytest.mark.parametrize(
        ("accuracies", "caught"),
        [((0.9, 0.24), True), ((0.9, 0.26), False), ((0.3, 0.11), False), ((0.32, 0.11), True)],
    )
    def test_what_counts_as_overfitting(self, monkeypatch, accuracies, caught):
        """Below half of the best so far (0.5), and more than 0.2 below the accuracy under the training attack."""
        answers = iter([(0.6, 0.5), accuracies])
        monkeypatch.setattr(OverfittingGuard, "_accuracies", lambda *args: next(answers))
        trainer = fit(make_trainer(warmup=1), nb_epochs=1)
        assert trainer.history.epochs[-1].attack_steps == (2 if caught else 1)


def test_the_guard_does_not_influence_a_healthy_run(monkeypatch):
    monkeypatch.setattr(overfitting, "TRAINED_PER_CHECKED", 16 / 48)
    checks, accuracies = [], OverfittingGuard._accuracies
    monkeypatch.setattr(OverfittingGuard, "_accuracies", lambda *args: checks.append(1) or accuracies(*args))
    guarded = state_of(fit(make_trainer()))
    assert len(checks) == 13
    monkeypatch.setattr(OverfittingGuard, "begin", lambda *args: None)
    assert equal(guarded, state_of(fit(make_trainer())))


def test_checks_cost_three_percent(monkeypatch):
    """Counted in passes of samples through the network; a backward pass for the weights counts one more."""
    passes = {"training": 0, "check": 0}
    model = Normed()
    where = ["training"]
    model.register_forward_hook(lambda m, args, output: passes.__setitem__(where[-1], passes[where[-1]] + len(output)))
    accuracies = OverfittingGuard._accuracies

    def counted(*args):
        where.append("check")
        try:
            return accuracies(*args)
        finally:
            where.pop()

    monkeypatch.setattr(OverfittingGuard, "_accuracies", counted)
    trainer = make_trainer(model, warmup=1)
    x, y = make_data(64 * 160 * 4)
    trainer.fit(x, y, batch_size=512, nb_epochs=1, verbose=False)
    assert passes["check"] == 5 * 64 * 13  # at the beginning, three times within the epoch, at its end
    # Forward and backward: two passes a step of an attack, three of the update.
    check = passes["check"] / 13 * 24 * 4 / 5
    assert check <= 0.0301 * passes["training"] / 2 * 5


def test_a_single_step_by_hand(chain, data):
    classifier = make_classifier(chain)
    network = TensorClassifier(classifier)
    attack = TensorAttack(make_attack(classifier, eps=0.1), network)
    x, y = torch.tensor(data[0]), torch.tensor(data[1])
    torch.manual_seed(5)
    x_adv = SingleStepTraining(network, None, 0.0).perturb(attack, Batch.whole(x, y))
    torch.manual_seed(5)
    start = (x + 0.1 * (2 * torch.rand_like(x) - 1)).clamp(0, 1).requires_grad_(True)
    (gradient,) = torch.autograd.grad(nn.functional.cross_entropy(chain.features(start)["head"], y), start)
    by_hand = x + ((start.detach() + 0.125 * gradient.sign()).clamp(0, 1) - x).clamp(-0.1, 0.1)
    assert (x_adv - by_hand).abs().max() < 1e-6


def test_few_steps_have_the_same_reach(chain, data):
    classifier = make_classifier(chain)
    attack = TensorAttack(make_attack(classifier, eps=0.1, eps_step=0.5, max_iter=40), TensorClassifier(classifier))
    x, y = torch.tensor(data[0]), torch.tensor(data[1])
    losses = []
    for nb_steps in (1, 2, 4, 8):
        x_adv = attack.in_few_steps(Batch.whole(x, y), nb_steps, reach=1.25)
        assert (x_adv - x).abs().max() <= 0.1 + 1e-6 and x_adv.min() >= 0 and x_adv.max() <= 1
        losses.append(nn.functional.cross_entropy(chain(x_adv), y).item())
    assert losses[0] > nn.functional.cross_entropy(chain(x), y).item()
    assert max(losses) < 1.2 * min(losses)


def test_an_attack_without_a_ball_is_refused(chain):
    classifier = make_classifier(chain)
    with pytest.raises(ValueError, match="`first_stage='fgsm_rs'` takes the ball and the steps"):
        AdversarialTrainerCLATPyTorch(classifier, SquareAttack(classifier), warmup=1, first_stage="fgsm_rs")


def test_generators_and_the_second_stage(data):
    trainer = make_trainer(Chain(), objective="fgsm_rs", warmup=1, ratio=0.5)
    trainer.fit_generator(NumpyDataGenerator(*data, batch_size=16), nb_epochs=2, verbose=False)
    assert [record.attack_steps for record in trainer.history.epochs] == [1, 1]


@pytest.mark.parametrize("size", [1, 2, 3])
def test_first_samples_of_all_processes(size):
    x, y = torch.arange(50.0), torch.arange(50)
    whole = []
    for rank in range(size):
        parts = [Ranks(rank, size).part(len(chunk)) for chunk in x.split(20)]
        batches = [Batch(a[p.mine], b[p.mine], p) for a, b, p in zip(x.split(20), y.split(20), parts, strict=True)]
        kept = first_samples(batches, 27)
        assert [batch.part.total for batch in kept] == [20, 7]
        offsets = (0, 20)
        for batch, offset in zip(kept, offsets, strict=True):
            assert torch.equal(batch.x, x[offset + torch.arange(batch.part.total)[batch.part.mine]])
            whole += batch.x.tolist()
    assert sorted(whole) == list(range(27))
