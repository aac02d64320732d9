"""What users run into: each case ended in a silent wrong result, or in a message that did not help."""

import logging
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torchvision
from art.attacks.evasion import FastGradientMethod, ProjectedGradientDescent
from art.data_generators import NumpyDataGenerator
from art.defences.preprocessor import GaussianAugmentation
from art.estimators.certification.derandomized_smoothing import PyTorchDeRandomizedSmoothing
from art.estimators.certification.randomized_smoothing import PyTorchRandomizedSmoothing
from art.estimators.classification import PyTorchClassifier
from conftest import INPUT_SHAPE, NB_CLASSES, Chain, Recurrent, make_attack, make_classifier, make_data, observe
from torch import nn
from torchvision.transforms import v2

from art_clat import AdversarialTrainerCLATPyTorch, LayerOptions, evaluate_robustness, measure_criticality

QUIET = {"verbose": False}


def make_trainer(classifier, attack=None, **kwargs):
    settings = {"seed": 0, "layers": LayerOptions(freeze_norms=False), **kwargs}
    return AdversarialTrainerCLATPyTorch(classifier, attack or make_attack(classifier), **settings)


def state_of(model):
    return {name: value.clone() for name, value in model.state_dict().items()}


def is_unchanged(model, before):
    return all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def warnings_of(caplog):
    return [record.getMessage() for record in caplog.records if record.levelno >= logging.WARNING]


class TestClassifiersThatDoSomethingElse:
    @staticmethod
    def smoothed(cls, **kwargs):
        model = Chain()
        optimizer = torch.optim.SGD(model.parameters(), 0.1)
        return cls(
            model, nn.CrossEntropyLoss(), INPUT_SHAPE, NB_CLASSES, optimizer=optimizer, clip_values=(0, 1),
            device_type="cpu", **kwargs,
        )  # fmt: skip

    def test_noise_is_not_ignored(self, data):
        classifier = self.smoothed(PyTorchRandomizedSmoothing, sample_size=8, scale=0.1)
        attack = make_attack(classifier)
        message = "`classifier` is a PyTorchRandomizedSmoothing, and `.*` is .*'s own. .* Chain, would be used as it is"
        with pytest.raises(TypeError, match=message):
            make_trainer(classifier, attack)
        with pytest.raises(TypeError, match=message):
            measure_criticality(classifier, *data, attack=attack)

    def test_subclasses(self, data):
        class Named(PyTorchClassifier):
            """Adds a name, and nothing that matters."""

            name = "mine"

            def extra(self):
                return self.name

        class Louder(Named):
            def predict(self, x, **kwargs):
                return 2 * super().predict(x, **kwargs)

        make_trainer(self.smoothed(Named)).fit(*data, nb_epochs=1, **QUIET)
        with pytest.raises(TypeError, match="is a .*Louder, and `predict` is .*Louder's own"):
            make_trainer(self.smoothed(Louder))

    def test_all_of_arts_smoothing(self):
        assert issubclass(PyTorchDeRandomizedSmoothing, PyTorchClassifier)
        for cls in (PyTorchDeRandomizedSmoothing, PyTorchRandomizedSmoothing):
            blank = cls.__new__(cls)
            blank._model = SimpleNamespace(_model=Chain())
            with pytest.raises(TypeError, match=f"`classifier` is a {cls.__name__}"):
                AdversarialTrainerCLATPyTorch(blank, [])


class TestAugmentation:
    @pytest.mark.parametrize(
        "transform",
        [
            v2.Compose([v2.RandomHorizontalFlip(), v2.Normalize([0.5, 0.5], [0.2, 0.2])]),
            lambda image: image + 0.6,
            lambda image: 255 * image,
        ],
    )
    def test_that_leaves_the_range_is_refused(self, chain, data, transform):
        before = state_of(chain)
        with pytest.raises(ValueError, match=r"`augmentation` makes images in \[.*\], outside the classifier's"):
            make_trainer(make_classifier(chain), augmentation=transform).fit(*data, nb_epochs=1, **QUIET)
        assert is_unchanged(chain, before)

    def test_of_the_usual_kind_is_not(self, chain, data):
        usual = v2.Compose([v2.RandomCrop(6, padding=1), v2.RandomHorizontalFlip(), v2.RandomErasing()])
        make_trainer(make_classifier(chain), augmentation=usual).fit(*data, nb_epochs=1, **QUIET)
        unbounded = make_classifier(Chain(), clip_values=None)
        make_trainer(unbounded, augmentation=lambda image: 9 * image).fit(*data, nb_epochs=1, **QUIET)


class LoRA(nn.Module):
    """An adapter whose second factor is zero, as PEFT makes it."""

    def __init__(self, width, rank=3):
        super().__init__()
        self.base = nn.Linear(width, width).requires_grad_(False)
        self.A, self.B = nn.Linear(width, rank, bias=False), nn.Linear(rank, width, bias=False)
        nn.init.zeros_(self.B.weight)

    def forward(self, x):
        return self.base(x) + self.B(self.A(x))


class TestFirstBatches:
    @pytest.mark.parametrize("chosen", ["2.A", "2.B"])
    def test_a_layer_that_cannot_move_is_named(self, data, caplog, chosen):
        model = nn.Sequential(nn.Flatten(), nn.Linear(72, 16), LoRA(16), nn.ReLU(), nn.Linear(16, 4))
        trainer = make_trainer(make_classifier(model), selection=[chosen], reselect_every=1)
        trainer.fit(*data, batch_size=8, nb_epochs=3, **QUIET)
        found = [message for message in warnings_of(caplog) if "gradient" in message]
        assert len(found) == (chosen == "2.A")
        assert all("no gradient in the chosen layer(s) 2.A" in message for message in found)

    def test_a_layer_whose_units_are_dead(self, data, caplog):
        class Branches(nn.Module):
            def __init__(self):
                super().__init__()
                self.dead, self.alive, self.head = nn.Linear(72, 8), nn.Linear(72, 8), nn.Linear(8, 4)
                nn.init.constant_(self.dead.bias, -100.0)

            def forward(self, x):
                x = x.flatten(1)
                return self.head(self.dead(x).relu() + self.alive(x).relu())

        for chosen in (["alive"], ["dead", "alive"]):
            caplog.clear()
            trainer = make_trainer(make_classifier(Branches()), selection=chosen, criticality_weight=0.0)
            trainer.fit(*data, nb_epochs=1, **QUIET)
            found = warnings_of(caplog)
            assert len(found) == ("dead" in chosen) and all("layer(s) dead, so" in message for message in found)

    @pytest.mark.parametrize("objective", ["adversarial", "clean", "relative"])
    def test_a_distance_that_rivals_the_cross_entropy(self, chain, data, caplog, objective):
        losses = []

        def step(loop, step, *args):
            losses.append(step(*args))
            return losses[-1]

        before = state_of(chain)
        trainer = make_trainer(make_classifier(chain), objective=objective, criticality_weight=30.0, reselect_every=1)
        observe(trainer, step=step).fit(*data, batch_size=16, nb_epochs=2, **QUIET)
        (message,) = (message for message in warnings_of(caplog) if "distance" in message)
        share = sum(float(30 * loss.criticality_loss) for loss in losses[:3])
        share /= sum(float(loss.cross_entropy) for loss in losses[:3])
        suggested = float(message.split("criticality_weight=")[1].split("`")[0])
        assert suggested == pytest.approx(0.1 * 30 / share, rel=0.06)
        caplog.clear()
        chain.load_state_dict(before)
        trainer = make_trainer(make_classifier(chain), objective=objective, criticality_weight=suggested)
        trainer.fit(*data, batch_size=16, nb_epochs=2, **QUIET)
        assert not warnings_of(caplog)

    def test_a_rivals_second_term_may_be_large(self, chain, data, caplog):
        make_trainer(make_classifier(chain), objective="trades", criticality_weight=500.0).fit(*data, **QUIET)
        assert not warnings_of(caplog)

    def test_the_bar_shows_both_terms(self, chain, data):
        trainer = make_trainer(make_classifier(chain), criticality_weight=0.5)
        trainer.fit(*data, nb_epochs=1, **QUIET)
        (record,) = trainer.history.epochs
        shown = record.summary()
        assert float(shown["cross-entropy"]) == pytest.approx(record.cross_entropy, abs=6e-4)
        assert float(shown["λ·distance"]) == pytest.approx(0.5 * record.criticality_loss, abs=6e-4)


class TestBeforeARun:
    def test_clat_that_never_begins(self, chain, data, caplog):
        trainer = make_trainer(make_classifier(chain), warmup=3)
        trainer.fit(*data, nb_epochs=3, **QUIET)
        trainer.fit_generator(NumpyDataGenerator(*data, batch_size=16), nb_epochs=2, **QUIET)
        found = warnings_of(caplog)
        assert len(found) == 2 and all("CLAT never begins" in message for message in found)
        assert "`warmup` (3) is not below `nb_epochs` (2)" in found[1]
        trainer.fit(*data, nb_epochs=4, **QUIET)
        for nb_epochs in (1, 1, 1):
            trainer.fit(*data, nb_epochs=nb_epochs, **QUIET)
        assert len(warnings_of(caplog)) == 3  # once for the loop
        trainer = make_trainer(make_classifier(Chain()), warmup=2)
        for nb_epochs in (1, 2, 3):
            trainer.fit(*data, nb_epochs=nb_epochs, resume=True, **QUIET)
        assert len(warnings_of(caplog)) == 3 and [e.stage for e in trainer.history.epochs][-1] == "clat"

    @pytest.mark.parametrize(
        ("norm", "eps", "is_reported"),
        [(np.inf, 8, True), (np.inf, 1.0, True), (np.inf, 0.9, False), (2, 4.3, True), (2, 4.2, False), (1, 36, True),
         (1, 35, False)],
    )  # fmt: skip
    def test_an_eps_in_other_units(self, chain, data, caplog, norm, eps, is_reported):
        """An image has 72 elements: half of what the range amounts to is 4.24 in ℓ2 and 36 in ℓ1."""
        classifier = make_classifier(chain)
        attack = ProjectedGradientDescent(classifier, norm=norm, eps=eps, eps_step=eps / 4, max_iter=2, verbose=False)
        make_trainer(classifier, attack).fit(*data, nb_epochs=2, **QUIET)
        found = [message for message in warnings_of(caplog) if "other units" in message]
        assert len(found) == is_reported
        caplog.clear()
        measure_criticality(classifier, *data, attack=attack)
        assert len(warnings_of(caplog)) == is_reported


class Wrapped(nn.Module):
    """A network that returns its logits in some form."""

    def __init__(self, form, in_training=None):
        super().__init__()
        self.network, self.form, self.in_training = Chain(), form, in_training or form

    def forward(self, x):
        return (self.in_training if self.training else self.form)(self.network(x))


def plain(out):
    return out


class TestOutput:
    @pytest.mark.parametrize(
        ("form", "message"),
        [
            (lambda out: {"logits": out}, "returns dict of logits; .* wrap it"),
            (lambda out: (out, out), "returns tuple of 2; .* wrap it"),
            (lambda out: out[:, :3], r"returns shape \(2, 3\) for 2 inputs; .* `nb_classes=4`"),
            (lambda out: out[:, None], r"returns shape \(2, 1, 4\)"),
            (lambda out: out.double(), r"returns torch.float64; .* `return out.float\(\)`"),
            (lambda out: None, "returns NoneType"),
        ],
    )
    def test_that_is_no_logits(self, data, form, message):
        for model, mode, kwargs in (
            (Wrapped(form), "evaluation", {}),
            (Wrapped(plain, in_training=form), "training", {"warmup": 1}),
        ):
            classifier = make_classifier(model)
            before = state_of(model)
            with pytest.raises(ValueError, match=f"`classifier.model` in {mode} mode {message}"):
                make_trainer(classifier, **kwargs).fit(*data, nb_epochs=2, **QUIET)
            assert is_unchanged(model, before)
        with pytest.raises(ValueError, match=message):
            classifier = make_classifier(Wrapped(form))
            measure_criticality(classifier, *data, attack=make_attack(classifier))

    def test_auxiliary_outputs_in_training(self):
        model = torchvision.models.googlenet(num_classes=4, init_weights=False)
        x, y = np.random.default_rng(0).random((2, 3, 32, 32), dtype=np.float32), np.arange(2)
        classifier = make_classifier(model, input_shape=(3, 32, 32))
        with pytest.raises(ValueError, match=r"in training mode returns GoogLeNetOutputs of 3; .*aux_logits=False"):
            make_trainer(classifier, warmup=1).fit(x, y, nb_epochs=2, **QUIET)
        measure_criticality(classifier, x, y, attack=make_attack(classifier, max_iter=1))  # evaluation mode is fine

    def test_the_look_leaves_no_trace(self, normed, data):
        """Statistics, modes and random numbers are as if nobody had looked in training mode."""
        seen = []
        trainer = make_trainer(make_classifier(normed), warmup=1)
        before = state_of(normed)
        observe(
            trainer, train_epoch=lambda loop, train: seen.append((state_of(normed), torch.get_rng_state())) or train()
        )
        normed.eval()
        trainer.fit(*data, nb_epochs=1, **QUIET)
        assert all(torch.equal(value, before[name]) for name, value in seen[0][0].items())
        assert not normed.training

    @pytest.mark.parametrize(
        ("make", "message"),
        [
            (
                lambda: Chain().double(),
                r"first.weight is torch.float64; .* call `model.float\(\)`",
            ),
            (lambda: Chain().half(), "first.weight is torch.float16"),
            (lambda: nn.Sequential(nn.Flatten(), nn.LazyLinear(8), nn.ReLU(), nn.Linear(8, 4)), "has no values yet"),
            (lambda: torch.jit.script(nn.Sequential(nn.Flatten(), nn.Linear(72, 4))), "is TorchScript"),
        ],
    )
    def test_networks_that_cannot_be_used(self, data, make, message):
        model = make()
        parameters = [p for p in model.parameters() if not torch.nn.parameter.is_lazy(p)]
        classifier = make_classifier(model, optimizer=torch.optim.SGD(parameters, 0.1))
        attack = make_attack(classifier)
        with pytest.raises(ValueError, match=f"`classifier.model`: .*{message}"):
            make_trainer(classifier, attack).fit(*data, nb_epochs=1, **QUIET)
        with pytest.raises(ValueError, match=f"`classifier.model`: .*{message}"):
            measure_criticality(classifier, *data, attack=attack)


class TestMessages:
    def test_gaussian_augmentation_as_art_makes_it(self, data):
        """It appends noisy copies; accuracy is that of the images themselves."""
        model = Chain()
        classifier = make_classifier(model, preprocessing_defences=GaussianAugmentation(sigma=0.01))
        trainer = make_trainer(classifier, warmup=1)
        trainer.fit(*data, nb_epochs=2, **QUIET)
        for record in trainer.history.epochs:
            assert np.isfinite(record.loss) and 0 <= record.train_robust_accuracy <= 1

    def test_rounding_is_clipped_and_the_array_is_kept(self, chain):
        x, y = make_data()
        x[0, 0, 0, 0] = np.nextafter(np.float32(1), np.float32(2))
        x[1, 0, 0, 0] = -1e-8
        kept, seen = x.copy(), []
        trainer = make_trainer(make_classifier(chain))
        observe(trainer, perturb=lambda loop, perturb, batch, *args: seen.append(batch.x) or perturb(batch, *args))
        trainer.fit(x, y, nb_epochs=1, **QUIET)
        assert torch.cat(seen).max() == 1 and torch.cat(seen).min() == 0
        np.testing.assert_array_equal(x, kept)
        report = evaluate_robustness(chain, x, y, norm="Linf", eps=0.01, autoattack_version=None)
        assert report.clean_accuracy >= report.pgd_accuracy
        x[0, 0, 0, 0] = 1.00001
        for call in (
            lambda: trainer.fit(x, y, nb_epochs=1, **QUIET),
            lambda: evaluate_robustness(chain, x, y, norm="Linf", eps=0.01, autoattack_version=None),
        ):
            with pytest.raises(ValueError, match=r"1\.00001"):
                call()

    @pytest.mark.parametrize(
        ("make", "why"),
        [
            (lambda c: make_attack(c, random_eps=True), "ProjectedGradientDescent has `random_eps=True`"),
            (lambda c: FastGradientMethod(c, minimal=True), "FastGradientMethod has `minimal=True`"),
            (lambda c: FastGradientMethod(c, num_random_init=3), "FastGradientMethod has `num_random_init` above 1"),
            (lambda c: make_attack(c, norm=3), "its norm is 3, not inf, 2 or 1"),
        ],
    )
    def test_an_inner_attack_says_why_it_cannot_be_used(self, chain, make, why):
        classifier = make_classifier(chain)
        with pytest.raises(ValueError, match=f"`objective='clean'` takes the ball .* which it cannot here: {why}"):
            make_trainer(classifier, make(classifier), objective="clean")
        make_trainer(classifier, make(classifier))

    def test_a_recurrent_network_is_the_reason(self):
        classifier = make_classifier(Recurrent())
        with pytest.raises(ValueError, match="cannot here: the network is recurrent"):
            make_trainer(classifier, objective="clean")

    def test_a_loader_is_pointed_to_the_right_call(self, chain, data):
        dataset = torch.utils.data.TensorDataset(*map(torch.tensor, data))
        for given in (torch.utils.data.DataLoader(dataset), dataset):
            with pytest.raises(TypeError, match=rf"`x` is a {type(given).__name__}; .*fit_generator\(PyTorchData"):
                make_trainer(make_classifier(chain)).fit(given, None, nb_epochs=1, **QUIET)

    def test_a_loss_of_each_sample(self, chain, data):
        classifier = make_classifier(chain, loss=nn.CrossEntropyLoss(reduction="none"))
        with pytest.raises(ValueError, match="reduction 'none', one value a sample; .* `reduction='mean'`"):
            make_trainer(classifier).fit(*data, nb_epochs=1, **QUIET)

    def test_clip_values_of_each_channel(self, chain, data):
        low, high = np.zeros(2, np.float32), np.ones(2, np.float32)
        classifier = make_classifier(chain, clip_values=(low, high))
        with pytest.raises(ValueError, match=r"`classifier.clip_values` have the shape \(2,\), .* \(2, 1, 1\)"):
            make_trainer(classifier)
        per_channel = make_classifier(Chain(), clip_values=(low[:, None, None], high[:, None, None]))
        make_trainer(per_channel).fit(*data, nb_epochs=1, **QUIET)

    def test_without_gradients(self, chain, data):
        trained = []
        for context in (torch.enable_grad(), torch.no_grad()):
            torch.manual_seed(0)
            model = Chain()
            with context:
                make_trainer(make_classifier(model), warmup=1).fit(*data, nb_epochs=2, **QUIET)
            trained.append(state_of(model))
        assert all(torch.equal(trained[0][name], trained[1][name]) for name in trained[0])
        classifier = make_classifier(chain)
        attack = make_attack(classifier)
        with torch.inference_mode():
            with pytest.raises(RuntimeError, match=r"`fit` needs gradients, which `torch.inference_mode\(\)`"):
                make_trainer(classifier, attack).fit(*data, nb_epochs=1, **QUIET)
            with pytest.raises(RuntimeError, match="`measure_criticality` needs gradients"):
                measure_criticality(classifier, *data, attack=attack)
