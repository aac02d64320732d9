"""Things that users do and that work: they stay so."""

import numpy as np
import pytest
import torch
from art.defences.preprocessor import MixupPyTorch
from conftest import INPUT_SHAPE, NB_CLASSES, Chain, make_attack, make_classifier, make_data
from torch import nn
from torch.nn.utils import parametrizations

from art_clat import AdversarialTrainerCLATPyTorch, LayerOptions, evaluate_robustness, measure_criticality


class ChannelsLastInputs(nn.Module):
    """Takes images of shape (n, height, width, channels)."""

    def __init__(self):
        super().__init__()
        self.network = Chain()

    def forward(self, x):
        return self.network(x.permute(0, 3, 1, 2))


def normed_weights(kind):
    model = Chain()
    for name in ("first", "second", "hidden"):
        kind(getattr(model, name))
    return model


def with_dropout():
    return nn.Sequential(
        nn.Conv2d(2, 4, 3, padding=1), nn.ReLU(), nn.Dropout2d(0.2), nn.Conv2d(4, 4, 3), nn.ReLU(), nn.Flatten(),
        nn.Dropout(0.3), nn.Linear(64, NB_CLASSES),
    )  # fmt: skip


def channels_last_data():
    x, y = make_data()
    return x.transpose(0, 2, 3, 1).copy(), y


def soft_data():
    x, y = make_data()
    return x, (0.8 * np.eye(NB_CLASSES)[y] + 0.2 / NB_CLASSES).astype(np.float32)


MASK = np.full(INPUT_SHAPE, 0.1, np.float32)
MASK[:, :2] = 0

CASES = {
    "NHWC": (ChannelsLastInputs, {"input_shape": (6, 6, 2), "channels_first": False}, channels_last_data, {}),
    "standardisation of each channel": (
        Chain,
        {"preprocessing": (np.array([0.2, 0.4])[:, None, None], np.array([0.3, 0.2])[:, None, None])},
        make_data,
        {},
    ),
    "eps as a mask": (Chain, {}, make_data, {"eps": MASK, "eps_step": np.full_like(MASK, 0.03)}),
    "soft labels": (Chain, {"loss": nn.CrossEntropyLoss()}, soft_data, {}),
    "class weights": (Chain, {"loss": nn.CrossEntropyLoss(weight=torch.tensor([1.0, 2.0, 0.5, 1.0]))}, make_data, {}),
    "DataParallel": (lambda: nn.DataParallel(Chain()), {}, make_data, {}),
    "weight norm": (lambda: normed_weights(parametrizations.weight_norm), {}, make_data, {}),
    "spectral norm": (lambda: normed_weights(parametrizations.spectral_norm), {}, make_data, {}),
    "MixUp": (Chain, {"preprocessing_defences": MixupPyTorch(num_classes=NB_CLASSES)}, make_data, {}),
    "dropout": (with_dropout, {}, make_data, {}),
}


@pytest.mark.parametrize("case", CASES)
def test_the_chosen_layer_moves_and_nothing_else(case):
    make_model, of_classifier, data, of_attack = CASES[case]
    torch.manual_seed(0)
    model = make_model()
    classifier = make_classifier(model, **of_classifier)
    attack = make_attack(classifier, **of_attack)
    x, y = data()
    measured = measure_criticality(classifier, x, y, attack=attack)
    assert len(measured) > 2 and all(np.isfinite(layer.criticality) for layer in measured)
    trainer = AdversarialTrainerCLATPyTorch(classifier, attack, warmup=1, layers=LayerOptions(), seed=0)
    trainer.fit(x, y, validation_data=(x, y), nb_epochs=1, batch_size=16, verbose=False)
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    trainer = AdversarialTrainerCLATPyTorch(classifier, attack, layers=LayerOptions(), seed=0)
    trainer.fit(x, y, validation_data=(x, y), nb_epochs=2, batch_size=16, verbose=False)
    (chosen,) = trainer.history.selections[0].chosen
    moved = [name for name, parameter in model.named_parameters() if not torch.equal(parameter, before[name])]
    assert moved and all(name.startswith(f"{chosen}.") for name in moved)
    assert all(np.isfinite(record.loss) for record in trainer.history.epochs)
    assert all(record.robust_accuracy <= record.clean_accuracy + 0.1 for record in trainer.history.epochs)


def test_a_mask_keeps_pixels_as_they_are():
    model = Chain()
    classifier = make_classifier(model)
    attack = make_attack(classifier, eps=MASK, eps_step=np.full_like(MASK, 0.03))
    seen = []
    trainer = AdversarialTrainerCLATPyTorch(classifier, attack, warmup=1, seed=0)

    class Recording(trainer.loop_class):
        def perturb(self, batch, number):
            x_adv = super().perturb(batch, number)
            seen.append(x_adv - batch.x)
            return x_adv

    trainer.loop_class = Recording
    trainer.fit(*make_data(), nb_epochs=2, batch_size=16, verbose=False)
    delta = torch.cat(seen)
    assert (delta[:, :, :2] == 0).all() and (delta[:, :, 2:].abs().amax((1, 2, 3)) > 0.05).all()


def test_a_network_in_data_parallel_is_evaluated():
    report = evaluate_robustness(
        nn.DataParallel(Chain()), *make_data(), norm="Linf", eps=0.05, autoattack_version=None, pgd_max_iter=2
    )
    assert report.pgd_accuracy <= report.clean_accuracy
