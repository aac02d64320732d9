"""CLAT on a network that one of ART's own trainers has trained."""

import copy

import numpy as np
import pytest
import torch
from art.defences.trainer import (
    AdversarialTrainerAWPPyTorch,
    AdversarialTrainerFBFPyTorch,
    AdversarialTrainerMadryPGD,
    AdversarialTrainerOAATPyTorch,
    AdversarialTrainerTRADESPyTorch,
)
from conftest import Normed, make_attack, make_classifier

from art_clat import AdversarialTrainerCLATPyTorch, LayerOptions


def madry(classifier):
    return AdversarialTrainerMadryPGD(classifier, nb_epochs=2, batch_size=16, eps=0.1, eps_step=0.05, max_iter=2)


def fbf(classifier):
    return AdversarialTrainerFBFPyTorch(classifier, eps=0.1)


def trades(classifier):
    return AdversarialTrainerTRADESPyTorch(classifier, make_attack(classifier, num_random_init=1), beta=6.0)


def awp(classifier):
    proxy = make_classifier(copy.deepcopy(classifier.model))
    attack = make_attack(classifier)
    return AdversarialTrainerAWPPyTorch(classifier, proxy, attack, mode="PGD", gamma=0.01, beta=6.0, warmup=0)


def oaat(classifier):
    proxy, lpips = (make_classifier(copy.deepcopy(classifier.model)) for _ in range(2))
    params = {
        "epsilon": 0.1, "mixup_epsilon": 0.1, "i_epsilon": 0.05, "alternate_iter_eps": 1.0, "max_iter": 2,
        "alpha": 1.0, "mixup_alpha": 0.2, "beta": 2.0, "beta_final": 3.0, "lpips_weight": 1.0, "i_lpips_weight": 1.0,
        "awp_gamma": 0.005, "awp_warmup": 0, "oaat_warmup": 0, "lr": 0.05, "momentum": 0.9, "weight_decay": 5e-4,
        "lr_schedule": "cosine", "list_swa_epoch": [], "list_swa_tau": [], "load_swa_model_tau": 0.99,
        "swa_save_epoch": 100, "models_path": None, "norm": np.inf,
    }  # fmt: skip
    return AdversarialTrainerOAATPyTorch(classifier, proxy, lpips, [], make_attack(classifier), params)


@pytest.mark.parametrize("make", [madry, fbf, trades, awp, oaat], ids=lambda make: make.__name__)
def test_goes_on_from_there(data, make):
    model = Normed()
    classifier = make_classifier(model)
    before = copy.deepcopy(model.state_dict())
    first = make(classifier)
    x, y = data[0], np.eye(4, dtype=np.float32)[data[1]]  # FBF takes no others
    first.fit(x, y) if make is madry else first.fit(x, y, nb_epochs=2, batch_size=16)
    trained = copy.deepcopy(model.state_dict())
    assert all(not torch.equal(trained[name], before[name]) for name, _ in model.named_parameters())

    trainer = AdversarialTrainerCLATPyTorch(
        classifier, make_attack(classifier), layers=LayerOptions(freeze_norms=False), seed=0
    )
    if make is fbf:
        with pytest.raises(ValueError, match="learning rate 0"):
            trainer.fit(*data, batch_size=16, nb_epochs=1, verbose=False)
        classifier.optimizer.param_groups[0]["lr"] = 0.05
    trainer.fit(*data, batch_size=16, nb_epochs=1, verbose=False)
    (chosen,) = trainer.history.selections[0].chosen
    layer = {f"{chosen}.weight", f"{chosen.replace('conv', 'bn')}.weight", f"{chosen.replace('conv', 'bn')}.bias"}
    moved = {name for name, p in model.named_parameters() if not torch.equal(p, trained[name])}
    assert moved == layer
    assert np.isfinite(trainer.history.epochs[-1].loss)
