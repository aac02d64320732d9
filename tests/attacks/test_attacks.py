import numpy as np
import pytest
import torch
from art.attacks.evasion import (
    BasicIterativeMethod,
    DeepFool,
    FastGradientMethod,
    MomentumIterativeMethod,
    ProjectedGradientDescent,
    ProjectedGradientDescentPyTorch,
)
from conftest import Chain, make_attack, make_classifier
from torch import nn

from art_clat.attacks.balls import L1Ball, L2Ball, LinfBall
from art_clat.attacks.tensor_attack import TensorAttack
from art_clat.models.tensor_classifier import TensorClassifier
from art_clat.utils.batch import Batch

NORMS = [np.inf, "inf", 2, 1]
SIZES = {np.inf: 0.1, "inf": 0.1, 2: 0.5, 1: 2.0}


def run(attack, classifier, x, y):
    batch = Batch.whole(torch.tensor(x), torch.tensor(y))
    return TensorAttack(attack, TensorClassifier(classifier))(batch).numpy()


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("cls", [ProjectedGradientDescent, ProjectedGradientDescentPyTorch, FastGradientMethod])
def test_same_adversarial_examples_as_art(chain, data, norm, cls):
    classifier = make_classifier(chain, preprocessing=((0.4, 0.3), (0.2, 0.5)))
    eps = SIZES[norm]
    iterated = {} if cls is FastGradientMethod else {"max_iter": 5, "verbose": False}
    attack = cls(classifier, norm=norm, eps=eps, eps_step=eps / 3, **iterated)
    ours = run(attack, classifier, *data)
    assert np.abs(ours - data[0]).max() > 0.01
    np.testing.assert_allclose(ours, attack.generate(*data), atol=1e-6)


@pytest.mark.parametrize("clip_values", [None, (0.0, 1.0), (np.zeros((2, 6, 6)), np.full((2, 6, 6), 0.6))])
def test_clip_values_as_art_applies_them(chain, data, clip_values):
    classifier = make_classifier(chain, clip_values=clip_values)
    x, y = np.clip(data[0], 0, 0.6), data[1]
    attack = BasicIterativeMethod(classifier, eps=0.3, eps_step=0.1, max_iter=5, verbose=False)
    np.testing.assert_allclose(run(attack, classifier, x, y), attack.generate(x, y), atol=1e-6)


def test_momentum_as_art_accumulates_it(chain, data):
    classifier = make_classifier(chain)
    attack = MomentumIterativeMethod(classifier, eps=0.2, eps_step=0.03, decay=0.7, max_iter=6, verbose=False)
    plain = BasicIterativeMethod(classifier, eps=0.2, eps_step=0.03, max_iter=6, verbose=False)
    ours = run(attack, classifier, *data)
    np.testing.assert_allclose(ours, attack.generate(*data), atol=1e-6)
    assert not np.allclose(ours, run(plain, classifier, *data), atol=1e-3)


def test_gradients_that_are_not_numbers_count_as_zero_as_in_art(data):
    class Poisoned(Chain):
        def forward(self, x):
            return super().forward(x) + (0 * x[:, :1, 0, 0]).sqrt()  # adds 0; its gradient is infinity times 0, NaN

    classifier = make_classifier(Poisoned())
    x, y = data[0].clip(0.2, 0.8), data[1]
    attack = make_attack(classifier, norm=2, eps=0.5, eps_step=0.2)
    ours = run(attack, classifier, x, y)
    assert (ours[:, 0, 0, 0] == x[:, 0, 0, 0]).all() and np.abs(ours - x).max() > 0.05
    np.testing.assert_allclose(ours, attack.generate(x, y), atol=1e-6)


def test_an_epsilon_for_every_pixel(chain, data):
    classifier = make_classifier(chain)
    eps = np.linspace(0.0, 0.2, 36, dtype=np.float32).reshape(1, 1, 6, 6) * np.ones((1, 2, 1, 1), np.float32)
    attack = ProjectedGradientDescent(classifier, eps=eps[0], eps_step=eps[0] / 3 + 1e-3, max_iter=5, verbose=False)
    delta = run(attack, classifier, *data) - data[0]
    assert (np.abs(delta) <= eps + 1e-6).all() and np.abs(delta).max() > 0.1


def test_changing_the_attack_takes_effect(chain, data):
    classifier = make_classifier(chain)
    attack = make_attack(classifier, eps=0.1)
    ours = TensorAttack(attack, TensorClassifier(classifier))
    attack.set_params(eps=0.02)
    assert (ours(Batch.whole(*map(torch.tensor, data))) - torch.tensor(data[0])).abs().max() < 0.021


@pytest.mark.parametrize(("ball", "order", "eps"), [(LinfBall, np.inf, 0.3), (L2Ball, 2, 1.5), (L1Ball, 1, 4.0)])
def test_random_start_is_uniform_in_the_ball(ball, order, eps):
    x = torch.zeros(20_000, 2, 3)
    delta = ball(torch.tensor(eps), None).sample(x).flatten(1)
    radii = torch.linalg.vector_norm(delta, ord=order, dim=1)
    assert radii.max() <= eps * (1 + 1e-5)
    # In d dimensions a share r**d of a unit ball lies within radius r, so half of it within (1/2)**(1/d).
    inside = (radii <= eps * 0.5 ** (1 / 6)).double().mean().item()
    assert abs(inside - 0.5) < 4 * 0.5 / 20_000**0.5
    assert delta.mean(0).abs().max() < 0.02 * eps


@pytest.mark.parametrize("norm", NORMS)
def test_perturbations_stay_in_the_ball_and_the_box(chain, data, norm):
    classifier = make_classifier(chain)
    attack = make_attack(classifier, norm=norm, eps=SIZES[norm], eps_step=SIZES[norm], num_random_init=1)
    x_adv = run(attack, classifier, *data)
    size = np.linalg.norm((x_adv - data[0]).reshape(len(x_adv), -1), ord=float(norm), axis=1)
    assert size.max() <= SIZES[norm] * (1 + 1e-4) and size.min() > 0
    assert x_adv.min() >= 0 and x_adv.max() <= 1


def test_restarts_keep_every_example_that_fools(chain, data):
    with torch.no_grad():
        for parameter in chain.parameters():
            parameter.mul_(4)  # so that a random perturbation can change a prediction
    classifier = make_classifier(chain)
    x, y = data[0], classifier.predict(data[0]).argmax(1)
    fooled = []
    for restarts in (1, 20):
        torch.manual_seed(1)  # so that the single start is the first of the twenty
        attack = make_attack(classifier, eps=0.3, eps_step=1e-4, max_iter=1, num_random_init=restarts)
        x_adv = run(attack, classifier, x, y)
        fooled.append(classifier.predict(x_adv).argmax(1) != y)
    assert (fooled[1] >= fooled[0]).all() and fooled[1].sum() > fooled[0].sum()


def test_any_other_attack_runs_through_its_generate(chain, data):
    classifier = make_classifier(chain)
    attack = DeepFool(classifier, max_iter=5, verbose=True, batch_size=16)
    ours = TensorAttack(attack, TensorClassifier(classifier))
    assert ours.ascent is None
    x_adv = ours(Batch.whole(*map(torch.tensor, data)))
    np.testing.assert_allclose(x_adv.numpy(), attack.generate(*data), atol=1e-6)
    assert attack.verbose is True


def test_a_users_subclass_runs_through_its_generate(chain, data):
    class Nothing(ProjectedGradientDescent):
        def generate(self, x, y=None, **kwargs):
            return x

    classifier = make_classifier(chain)
    np.testing.assert_array_equal(run(Nothing(classifier, eps=0.1, verbose=False), classifier, *data), data[0])


def test_an_attack_on_another_classifier_of_the_same_network_climbs_the_loss_of_that_classifier(chain, data):
    class Margin(nn.Module):
        def forward(self, logits, y):
            return -logits.gather(1, (y if y.ndim == 1 else y.argmax(1))[:, None]).mean()

    classifier, other = make_classifier(chain), make_classifier(chain, loss=Margin(), clip_values=(0.1, 0.9))
    x, y = np.clip(data[0], 0.1, 0.9), data[1]
    attack = make_attack(other)
    expected = attack.generate(x, y=y)
    np.testing.assert_array_equal(run(attack, classifier, x, y), expected)
    assert not np.array_equal(run(make_attack(classifier), classifier, x, y), expected)


@pytest.mark.parametrize("option", [{"random_eps": True}, {"norm": 3}])
def test_options_that_are_not_implemented_run_through_generate(chain, option):
    classifier = make_classifier(chain)
    attack = TensorAttack(make_attack(classifier, **option), TensorClassifier(classifier))
    assert attack.ascent is None


def test_restarts_of_fgm_and_recurrent_networks_run_through_generate(chain):
    restarted = FastGradientMethod(make_classifier(chain), eps=0.1, num_random_init=3)
    recurrent = make_attack(make_classifier(nn.Sequential(nn.Flatten(2), nn.RNN(36, 4))))
    for attack in (restarted, recurrent):
        assert TensorAttack(attack, TensorClassifier(attack.estimator)).ascent is None


def test_the_attack_changes_neither_modes_nor_gradients_nor_inputs(normed, data):
    classifier = make_classifier(normed)
    normed.train()
    normed.bn2.eval()
    state = {name: value.clone() for name, value in normed.state_dict().items()}
    x = torch.tensor(data[0])
    TensorAttack(make_attack(classifier), TensorClassifier(classifier))(Batch.whole(x, torch.tensor(data[1])))
    assert normed.training and normed.bn1.training and not normed.bn2.training
    assert all(p.grad is None for p in normed.parameters())
    assert all(torch.equal(value, state[name]) for name, value in normed.state_dict().items())
    np.testing.assert_array_equal(x.numpy(), data[0])
