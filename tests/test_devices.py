"""What must hold on the CPU and on a GPU; each test runs on both, if there is a GPU."""

import copy
import json
from pathlib import Path

import devices_run
import numpy as np
import pytest
import torch
from conftest import Chain, Normed, Recurrent, make_attack, make_classifier, observe
from launching import launch
from torch import nn

from art_clat import AdversarialTrainerCLATPyTorch, Batch, CropAndFlip, LayerOptions, PerformanceOptions
from art_clat.attacks.tensor_attack import TensorAttack
from art_clat.models.tensor_classifier import TensorClassifier

QUIET = {"verbose": False}


@pytest.fixture(autouse=True)
def _float32():
    """Multiply in float32 and reproducibly, unless a test says otherwise."""
    places = {"allow_tf32": [torch.backends.cuda.matmul, torch.backends.cudnn], "deterministic": [torch.backends.cudnn]}
    before = [(place, name, getattr(place, name)) for name, found in places.items() for place in found]
    for place, name, _ in before:
        setattr(place, name, name == "deterministic")
    yield
    for place, name, value in before:
        setattr(place, name, value)


def classifier_on(device, model):
    return make_classifier(model, device_type="gpu" if device == "cuda" else "cpu")


def make_trainer(classifier, **kwargs):
    settings = {"seed": 0, "warmup": 1, "reselect_every": 1, "layers": LayerOptions(freeze_norms=False), **kwargs}
    return AdversarialTrainerCLATPyTorch(classifier, make_attack(classifier, num_random_init=1), **settings)


def state_of(model):
    return {name: value.detach().clone() for name, value in model.state_dict().items()}


@pytest.mark.parametrize("amp", [False, True])
@pytest.mark.parametrize("objective", ["adversarial", "clean"])
def test_freezing(device, normed, data, objective, amp):
    """Not one bit moves outside the chosen layer and its norm: weights, statistics, counters."""
    classifier = classifier_on(device, normed)
    classifier.fit(*data, nb_epochs=1, batch_size=16)  # leaves momentum that would move frozen parameters
    options = {"objective": objective, "selection": ["conv2"], "performance": PerformanceOptions(amp=amp)}
    before = state_of(normed)
    make_trainer(classifier, warmup=0, **options).fit(*data, batch_size=16, nb_epochs=3, **QUIET)
    assert {value.device.type for value in state_of(normed).values()} == {device}
    moved = {name for name, value in state_of(normed).items() if not torch.equal(value, before[name])}
    expected = {"conv2.weight", "bn2.weight", "bn2.bias"}
    assert expected <= moved <= expected | {"bn2.running_mean", "bn2.running_var", "bn2.num_batches_tracked"}


class Interrupted(Exception):
    pass


@pytest.mark.parametrize("at", [4, 10])
def test_resume_after_an_interruption(device, data, tmp_path, at):
    """The weights equal those of a run without interruption, in the first stage and in the second."""
    ends = []
    for interrupted in (False, True):
        for attempt in range(1 + interrupted):
            torch.manual_seed(3)
            trainer = make_trainer(classifier_on(device, Normed()), ratio=0.7, ema_decay=0.8)
            steps = []

            def step(loop, original, *args, steps=steps, stops=interrupted and attempt == 0):
                steps.append(1)
                if stops and len(steps) == at + 1:
                    raise Interrupted
                return original(*args)

            observe(trainer, step=step)
            try:
                folder = tmp_path / str(interrupted)
                trainer.fit(*data, batch_size=12, nb_epochs=3, checkpoint=folder, checkpoint_every=1, **QUIET)
            except Interrupted:
                continue
        assert len(steps) == (12 - at if interrupted else 12)
        ends.append((state_of(trainer.classifier.model), [record.loss for record in trainer.history.epochs]))
    assert all(torch.equal(value, ends[1][0][name]) for name, value in ends[0][0].items())
    assert ends[0][1] == ends[1][1]


@pytest.mark.parametrize("augmentation", [None, CropAndFlip(1)])
def test_reused_perturbations_wherever_they_are_kept(device, data, tmp_path, monkeypatch, augmentation):
    """Beside the network or in the processor's memory; a run that is resumed ends the same."""
    ends = []
    for share, at in ((0.3, None), (0.0, None), (0.3, 8)):
        monkeypatch.setattr("art_clat.training.data.DEVICE_SHARE", share)
        monkeypatch.setattr("art_clat.training.reuse.DEVICE_SHARE", share)
        folder, kept = tmp_path / f"{share} {at}", []
        for attempt in range(1 if at is None else 2):
            torch.manual_seed(3)
            trainer = make_trainer(
                classifier_on(device, Normed()), ratio=0.7, reuse_perturbations=1, augmentation=augmentation
            )
            steps = []

            def step(loop, original, *args, steps=steps, kept=kept, stops=at is not None and attempt == 0, at=at):
                steps.append(1)
                kept.append(loop.meter.reuse.kept.shares.device.type)
                if stops and len(steps) == at + 1:
                    raise Interrupted
                return original(*args)

            observe(trainer, step=step)
            try:
                trainer.fit(*data, batch_size=12, nb_epochs=4, checkpoint=folder, checkpoint_every=1, **QUIET)
            except Interrupted:
                continue
        assert set(kept) == {device if share else "cpu"}
        ends.append((state_of(trainer.classifier.model), trainer.history.strengths))
    for state, strengths in ends[1:]:
        assert all(torch.equal(value, state[name]) for name, value in ends[0][0].items())
        assert strengths == ends[0][1] and len(strengths) == 1


@pytest.mark.parametrize("mode", ["amp", "tf32", "channels_last", "all"])
@pytest.mark.parametrize("objective", ["adversarial", "clean"])
def test_precision_modes(device, data, mode, objective):
    """Each mode trains as float32 does, except for rounding."""
    torch.manual_seed(1)
    models = [Normed()]
    models.append(copy.deepcopy(models[0]))
    seen = []
    models[1].conv2.register_forward_hook(
        lambda module, args, output: seen.append(
            (output.dtype, output.is_contiguous(memory_format=torch.channels_last))
        )
    )
    options = PerformanceOptions(amp=mode in ("amp", "all"), channels_last=mode in ("channels_last", "all"))
    losses = []
    for model, performance in zip(models, (PerformanceOptions(), options), strict=True):
        reduced = mode in ("tf32", "all") and model is models[1]
        torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = reduced
        trainer = make_trainer(classifier_on(device, model), objective=objective, performance=performance)
        trainer.fit(*data, batch_size=16, nb_epochs=3, **QUIET)
        losses.append([record.loss for record in trainer.history.epochs])
    np.testing.assert_allclose(*losses, rtol=1e-3 if mode == "channels_last" and device == "cpu" else 0.05)
    dtypes = {dtype for dtype, _ in seen}
    assert dtypes == ({torch.float32, torch.bfloat16} if options.amp else {torch.float32})
    assert all(is_last for _, is_last in seen[7:]) == options.channels_last  # after the layers were found
    assert all(p.dtype == torch.float32 and p.is_contiguous() for p in models[1].parameters())


@pytest.mark.parametrize("layer", [nn.LSTM, nn.GRU, nn.RNN])
class TestRecurrentLayers:
    def test_input_gradients_in_evaluation_mode(self, device, data, layer):
        """They equal those of the CPU. The classifier is in training mode before and after."""
        torch.manual_seed(0)
        model = Recurrent(layer).train()
        x, y = map(torch.tensor, data)
        found = []
        for place, network in (("cpu", copy.deepcopy(model)), (device, model)):
            classifier = TensorClassifier(classifier_on(place, network))
            inputs = x.to(place, copy=True).requires_grad_()
            with classifier.attacked():
                (gradient,) = torch.autograd.grad(classifier.loss_on(y.to(place))(inputs), inputs)
            assert network.training and network.recurrent.training
            found.append(gradient.cpu())
        torch.testing.assert_close(*found, rtol=1e-3, atol=1e-6)

    def test_training(self, device, data, layer):
        """Attack, a selection by gradients, and an update in evaluation mode."""
        model = Recurrent(layer)
        trainer = make_trainer(classifier_on(device, model), selection="gradient_prominence", budget=0.4)
        before = state_of(model)
        trainer.fit(*data, validation_data=data, batch_size=16, nb_epochs=3, **QUIET)
        assert [record.stage for record in trainer.history.epochs] == ["adversarial training", "clat", "clat"]
        assert all(np.isfinite([record.loss, record.robust_accuracy]).all() for record in trainer.history.epochs)
        assert not torch.equal(before["recurrent.weight_hh_l0"], model.recurrent.weight_hh_l0)

    def test_the_second_stage_trains_them(self, device, data, layer):
        model = Recurrent(layer)
        trainer = make_trainer(classifier_on(device, model), warmup=0, selection=["recurrent"])
        before = state_of(model)
        trainer.fit(*data, batch_size=16, nb_epochs=1, **QUIET)
        moved = {name for name, value in state_of(model).items() if not torch.equal(value, before[name])}
        assert moved and all(name.startswith("recurrent.") for name in moved)


def test_attack_is_the_cpus(device, data):
    torch.manual_seed(0)
    model, (x, y) = Chain(), map(torch.tensor, data)
    found = []
    for place, network in (("cpu", copy.deepcopy(model)), (device, model)):
        classifier = classifier_on(place, network)
        attack = TensorAttack(make_attack(classifier), TensorClassifier(classifier))
        found.append(attack(Batch.whole(x.to(place), y.to(place))).cpu())
    # Rounding decides the sign of a gradient near zero.
    assert ((found[0] - found[1]).abs() < 1e-5).float().mean() > 0.99


def test_two_processes_on_one_device(device, tmp_path):
    """They compute the same as one process, through gloo, which accepts a GPU's tensors too."""
    done = launch(2, Path(devices_run.__file__), device, tmp_path / "run")
    assert done.returncode == 0, done.stderr[-3000:]
    first, second = (json.loads((tmp_path / f"run-{rank}.json").read_text()) for rank in range(2))
    assert first == second
    alone = devices_run.train(device)
    np.testing.assert_allclose(first["losses"], alone["losses"], rtol=1e-3)
    np.testing.assert_allclose(first["accuracies"], alone["accuracies"], atol=0.021)  # one sample
    np.testing.assert_allclose(first["weakness"], alone["weakness"], rtol=1e-2)
    assert first["chosen"] == alone["chosen"]
    for name, value in alone["state"].items():
        np.testing.assert_allclose(first["state"][name], value, rtol=1e-2, atol=1e-3, err_msg=name)
