"""Recurrent layers in evaluation mode: cuDNN computes none of them whose gradient may be taken."""

import numpy as np
import pytest
import torch
from conftest import INPUT_SHAPE, NB_CLASSES, Recurrent, make_attack, make_classifier, observe
from torch import nn
from torch.overrides import TorchFunctionMode

from art_clat import AdversarialTrainerCLATPyTorch
from art_clat.layers.recurrent import WithoutCudnn
from art_clat.models.tensor_classifier import TensorClassifier


class Watch(TorchFunctionMode):
    """Records for each function whether cuDNN was on."""

    def __init__(self):
        super().__init__()
        self.seen = {}

    def __torch_function__(self, func, types, args=(), kwargs=None):
        name = getattr(func, "__name__", "")
        self.seen.setdefault(name, set()).add(torch.backends.cudnn.enabled)
        return func(*args, **(kwargs or {}))


LAYERS = {
    "lstm": nn.LSTM,
    "gru": nn.GRU,
    "rnn_tanh": nn.RNN,
    "rnn_relu": lambda *a, **k: nn.RNN(*a, nonlinearity="relu", **k),
}


@pytest.mark.parametrize("function", LAYERS)
@pytest.mark.parametrize("case", ["attack", "evaluation mode", "no gradients", "training mode"])
def test_cudnn_is_off_only_for_recurrent_layers_in_evaluation_mode(function, case, data):
    classifier = TensorClassifier(make_classifier(Recurrent(LAYERS[function])))
    x, y = map(torch.tensor, data)
    classifier.model.train(case == "training mode")
    with Watch() as watch, torch.set_grad_enabled(case != "no gradients"):
        if case == "attack":
            with classifier.attacked():
                classifier.loss_on(y)(x)
        else:
            classifier.loss(x, y)
    assert watch.seen[function] == {case in ("no gradients", "training mode")}
    assert watch.seen["conv2d"] == watch.seen["cross_entropy"] == {True}
    assert torch.backends.cudnn.enabled


def test_cudnn_is_on_again_after_an_error():
    with WithoutCudnn(), pytest.raises(RuntimeError):
        nn.LSTM(4, 5).eval()(torch.rand(2, 3, 7))
    assert torch.backends.cudnn.enabled


def test_the_second_stage_and_the_selection_run_without_cudnn(data):
    """Both take gradients in evaluation mode; ART's own attack on recurrent networks does so in training mode."""
    classifier = make_classifier(Recurrent())
    watch = Watch()
    trainer = AdversarialTrainerCLATPyTorch(
        classifier, make_attack(classifier), selection="gradient_prominence", budget=1.0, seed=0
    )

    def watched(loop, original, *args):
        watch.seen.clear()
        with watch:
            result = original(*args)
        seen.append(watch.seen["lstm"])
        return result

    seen = []
    before = [p.detach().clone() for p in classifier.model.recurrent.parameters()]
    observe(trainer, step=watched, select=watched)
    trainer.fit(*data, batch_size=16, nb_epochs=1, verbose=False)
    assert seen == [{True, False}, {False}, {False}, {False}]  # passes of the selection that need no gradient use cuDNN
    assert not all(map(torch.equal, before, classifier.model.recurrent.parameters()))
    assert np.isfinite(trainer.history.epochs[0].loss)
    assert classifier.predict(np.zeros((1, *INPUT_SHAPE), np.float32)).shape == (1, NB_CLASSES)
