"""Options: shorthand, presets, and their description in checkpoints and histories."""

import json
import threading
from dataclasses import fields

import numpy as np
import pytest
import torch
from conftest import Chain, make_attack, make_classifier

from art_clat import (
    AdversarialTrainerCLATPyTorch,
    Budget,
    LayerOptions,
    PerformanceOptions,
    SelectionOptions,
    list_objectives,
    list_selection_rules,
)
from art_clat.config import TrainerOptions


def make_trainer(chain, **options):
    classifier = make_classifier(chain)
    return AdversarialTrainerCLATPyTorch(classifier, make_attack(classifier), **options)


@pytest.mark.parametrize(
    ("short", "whole"),
    [
        ({"selection": "random"}, {"selection": SelectionOptions("random", None)}),
        ({"selection": ["first"]}, {"selection": SelectionOptions(["first"])}),
        ({"budget": 0.2}, {"budget": Budget(share=0.2)}),
        ({"layers": ["hidden"]}, {"layers": LayerOptions(["hidden"])}),
        (
            {},
            {
                "performance": PerformanceOptions(),
                "layers": LayerOptions(freeze_norms=True),
                "objective": "adversarial",
            },
        ),
        ({"preset": "paper"}, {"objective": "clean", "layers": LayerOptions(freeze_norms=False)}),
        (
            {"preset": "safer"},
            {"objective": "pgd_at", "selection": "sharpness", "weight_perturbation": 0.01, "reselect_every": 10},
        ),
        (
            {"preset": "safer", "selection": "random", "weight_perturbation": 0},
            {"objective": "pgd_at", "selection": "random"},
        ),
    ],
)
def test_shorthand_equals_the_full_options(chain, short, whole):
    assert make_trainer(chain, **short).options == make_trainer(chain, **whole).options


def test_an_objective_has_a_default_weight(chain):
    weights = {name: make_trainer(chain, objective=name).options.criticality_weight for name in list_objectives()}
    assert weights == {
        "adversarial": 0.02, "clean": 0.05, "clean_single_step": 0.05, "relative": 1.0, "pgd_at": 0.0, "trades": 6.0,
        "mart": 5.0, "awp": 0.0, "fgsm_rs": 0.0,
    }  # fmt: skip
    assert make_trainer(chain, objective="clean", criticality_weight=0).options.criticality_weight == 0


def test_every_option_is_described_for_json(chain):
    def rule(candidates):
        return [1.0] * len(candidates.layers)

    options = make_trainer(chain, selection=rule, augmentation=lambda image: image, layers=["first"]).options
    described = options.describe()
    assert described.keys() == {field.name for field in fields(TrainerOptions)}
    assert json.loads(json.dumps(described)) == described
    assert "0x" not in json.dumps(described)  # no address, which another process would not have
    assert described["layers"]["granularity"] == ["first"] and described["budget"]["share"] == 0.05


@pytest.mark.parametrize(
    ("make", "error", "match"),
    [
        (lambda: SelectionOptions(samples=0), ValueError, "`samples` must be a whole number of at least 1, got 0"),
        (lambda: SelectionOptions([]), TypeError, "`selection` must be the name of a rule"),
        (lambda: LayerOptions(predecessor="last"), ValueError, "`predecessor` must be one of 'execution', 'input'"),
        (lambda: LayerOptions("block", freeze_norms=True), ValueError, "`freeze_norms` needs `granularity='layer'`"),
        (lambda: Budget(), ValueError, "takes exactly one of share, count and parameter_share, got none"),
        (lambda: Budget(share=0.1, count=1), ValueError, "got {'share': 0.1, 'count': 1}"),
    ],
)
def test_options_name_the_argument_with_a_bad_value(make, error, match):
    with pytest.raises(error, match=match):
        make()


@pytest.mark.parametrize(
    ("options", "error", "match"),
    [
        ({"performance": {"amp": True}}, TypeError, "`performance` must be a PerformanceOptions, got {'amp': True}"),
        ({"preset": "clat"}, ValueError, "`preset` must be one of 'default', 'paper', 'safer', got 'clat'"),
        ({"objective": "pgd"}, ValueError, "`objective` must be one of 'adversarial', .*, got 'pgd'"),
        ({"first_stage": "adversarial"}, ValueError, "`first_stage` must be one of 'pgd_at', 'trades', 'mart'"),
        ({"selection": "worst"}, ValueError, "`selection` must be one of 'criticality', .*, got 'worst'"),
    ],
)
def test_the_trainer_names_the_argument_with_a_bad_value(chain, options, error, match):
    with pytest.raises(error, match=match):
        make_trainer(chain, **options)


def test_lists_of_names():
    assert list_objectives()[0] == "adversarial" and list_selection_rules()[0] == "criticality"
    assert list_objectives(first_stage=True) == ["pgd_at", "trades", "mart", "awp", "fgsm_rs"]


def test_repr_of_the_trainer(chain):
    text = repr(make_trainer(chain, warmup=3, selection="random", budget=Budget(count=2)))
    assert "warmup=3" in text and "selection='random'" in text and "count=2" in text and len(text) < 200


class CannotBeCopied:
    """An augmentation, and a rule, that hold what no copy can be made of."""

    def __init__(self):
        self.lock = threading.Lock()

    def __call__(self, value):
        return value if isinstance(value, torch.Tensor) else [1.0] * len(value.layers)


def test_what_an_option_holds_is_not_copied(chain, data):
    kept = CannotBeCopied()
    trainer = make_trainer(chain, augmentation=kept, selection=kept, seed=0)
    trainer.fit(*data, nb_epochs=1, batch_size=24, verbose=False)
    described = trainer.history.configuration["trainer"]
    assert "CannotBeCopied" in described["augmentation"] and "CannotBeCopied" in described["selection"]["rule"]


def test_numpys_truth_values_are_recorded(chain, data):
    trainer = make_trainer(chain, seed=0)
    trainer.fit(*data, nb_epochs=np.int64(1), batch_size=np.int64(16), drop_last=np.True_, verbose=np.False_)
    assert json.loads(trainer.history.to_json())["configuration"]["fit"]["drop_last"] is True


def test_arts_attributes_stay_in_force(chain, data):
    trainer = make_trainer(chain, seed=0)
    trainer.ratio = 0.25
    assert trainer.options.ratio == trainer.ratio == 0.25
    with pytest.raises(ValueError, match="`ratio`"):
        trainer.ratio = 2
    trainer.attacks = make_attack(make_classifier(Chain()))
    with pytest.raises(ValueError, match="`attacks`.*another classifier"):
        trainer.fit(*data, nb_epochs=1, verbose=False)
