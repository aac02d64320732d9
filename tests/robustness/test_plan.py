import numpy as np
import pytest
import torch
from conftest import Chain
from torch import nn

from art_clat import evaluate_robustness
from art_clat.robustness.autoattack import Ensemble
from art_clat.robustness.plan import Settings, make_plan
from art_clat.robustness.target import Target


def settings(**changes):
    return Settings(
        **{
            "norm": "Linf", "eps": 0.1, "autoattack_version": "standard", "pgd_max_iter": 5, "pgd_eps_step": 0.02,
            "pgd_restarts": 3, "batch_size": 4, "seed": 0, **changes,
        }
    )  # fmt: skip


@pytest.fixture
def target():
    return Target.of(Chain().eval(), "classifier_or_model")


def test_each_step_has_a_cost_and_those_it_runs_on(target):
    autoattack = Ensemble(
        target.model, norm="Linf", eps=0.1, version="standard", nb_classes=4, seed=0, device=target.device
    )
    plan = make_plan(target, settings(), source=target, autoattack=autoattack)
    assert [(step.name, step.after) for step in plan] == [
        ("clean", None), ("pgd", "clean"), ("transfer", "clean"),
        ("apgd-ce", "clean"), ("apgd-t", "apgd-ce"), ("fab-t", "apgd-t"), ("square", "fab-t"),
    ]  # fmt: skip
    assert [step.name for step in plan if step.of_autoattack] == list(autoattack.names)
    # Of four classes, three can be targets. APGD and FAB take 100 steps, Square 5000 queries.
    assert [step.cost for step in plan] == [1, 3 * 5 * 3, 3 * 5, 3 * 100, 3 * 3 * 100, 4 * 3 * 100, 5000]


def test_what_is_left_out_is_not_planned(target):
    plan = make_plan(target, settings(autoattack_version=None), source=None, autoattack=None)
    assert [step.name for step in plan] == ["clean", "pgd"]


def test_costs_are_those_of_the_forward_passes(target):
    """As PGD really runs: a pass with a gradient counts for three, and the look at what is left is not counted."""
    inputs = []
    target.model.register_forward_pre_hook(lambda module, args: inputs.append((len(args[0]), torch.is_grad_enabled())))
    always_right = torch.zeros(4, dtype=torch.long)
    with torch.no_grad():
        target.model.head.weight.zero_()
        target.model.head.bias.copy_(torch.tensor([9.0, 0, 0, 0]))
        plan = make_plan(target, settings(autoattack_version=None), source=None, autoattack=None)
        plan[1].attack(torch.rand(4, 2, 6, 6), always_right)
    assert 3 * sum(n for n, with_gradient in inputs if with_gradient) == 4 * plan[1].cost


@pytest.mark.parametrize("change", [{"pgd_restarts": 0}, {"batch_size": 1.5}, {"seed": -1}, {"pgd_eps_step": np.nan}])
def test_settings_out_of_range(change):
    with pytest.raises(ValueError, match=f"`{next(iter(change))}`"):
        settings(**change)


def test_numpys_numbers_are_settings(tmp_path):
    """They go into the folder's description, which is JSON."""
    x, y = np.random.default_rng(0).random((6, 3, 6, 6)).astype(np.float32), np.arange(6) % 4
    model = nn.Sequential(nn.Flatten(), nn.Linear(108, 4))
    settings = {"norm": "Linf", "eps": 0.1, "autoattack_version": None, "checkpoint": tmp_path}
    numbers = {"pgd_max_iter": 2, "pgd_restarts": 1, "batch_size": 4, "seed": 3}
    one = evaluate_robustness(model, x, y, **settings, **{name: np.int64(value) for name, value in numbers.items()})
    again = evaluate_robustness(model, x, y, **settings, **numbers)  # the same evaluation
    np.testing.assert_array_equal(one.pgd, again.pgd)
