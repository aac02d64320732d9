import copy
import logging
import os
import random
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from art.attacks.evasion import (
    AutoProjectedGradientDescent,
    BasicIterativeMethod,
    DeepFool,
    FastGradientMethod,
    ProjectedGradientDescent,
)
from art.data_generators import NumpyDataGenerator, PyTorchDataGenerator
from art.defences.preprocessor import Preprocessor
from art.defences.preprocessor.preprocessor import PreprocessorPyTorch
from art.defences.trainer import AdversarialTrainer, AdversarialTrainerMadryPGD
from art.estimators.classification import HuggingFaceClassifierPyTorch, PyTorchClassifier
from conftest import INPUT_SHAPE, Chain, Normed, make_attack, make_classifier, observe
from torch import nn

from art_clat import AdversarialTrainerCLATPyTorch, Budget, LayerOptions, SelectionOptions, measure_criticality
from art_clat.training.objectives import OBJECTIVES, AdversarialCLAT, CleanCLAT

QUIET = {"verbose": False}


def make_trainer(classifier, attacks=None, **kwargs):
    settings = {"seed": 0, "criticality_weight": 0.1, "layers": LayerOptions(freeze_norms=False), **kwargs}
    return AdversarialTrainerCLATPyTorch(classifier, attacks or make_attack(classifier), **settings)


def snapshot(model):
    return {name: value.clone() for name, value in model.state_dict().items()}


def moved(model, before):
    return {name for name, value in model.state_dict().items() if not torch.equal(value, before[name])}


class TestInterfaceOfART:
    def test_is_an_adversarial_trainer(self, chain):
        classifier = make_classifier(chain)
        trainer = make_trainer(classifier)
        assert isinstance(trainer, AdversarialTrainer)
        assert trainer.classifier is classifier is trainer.get_classifier()

    def test_predicts_as_the_classifier(self, chain, data):
        classifier = make_classifier(chain)
        trainer = make_trainer(classifier)
        trainer.fit(*data, nb_epochs=1, **QUIET)
        np.testing.assert_array_equal(trainer.predict(data[0]), classifier.predict(data[0]))

    def test_label_formats_make_no_difference(self, data):
        states = []
        for labels in (data[1], data[1][:, None], np.eye(4, dtype=np.float32)[data[1]], data[1].astype(np.float32)):
            torch.manual_seed(1)
            model = Chain()
            make_trainer(make_classifier(model), warmup=1).fit(data[0], labels, batch_size=16, nb_epochs=3, **QUIET)
            states.append(snapshot(model))
        assert all(not moved_state for state in states[1:] for moved_state in [_differences(states[0], state)])

    def test_inputs_are_left_unmodified(self, chain, data):
        x, y = data[0].copy(), data[1].copy()
        make_trainer(make_classifier(chain), ratio=0.5).fit(
            x, y, validation_data=(x, y), nb_epochs=2, batch_size=16, **QUIET
        )
        np.testing.assert_array_equal(x, data[0])
        np.testing.assert_array_equal(y, data[1])

    @pytest.mark.parametrize("kind", ["numpy", "torch"])
    def test_generators(self, chain, data, kind):
        if kind == "numpy":
            generator = NumpyDataGenerator(*data, batch_size=16)
        else:
            dataset = torch.utils.data.TensorDataset(torch.tensor(data[0]), torch.tensor(data[1]))
            loader = torch.utils.data.DataLoader(dataset, batch_size=16)
            generator = PyTorchDataGenerator(loader, size=48, batch_size=16)
        batches = []
        original = generator.get_batch
        generator.get_batch = lambda: batches.append(1) or original()
        trainer = make_trainer(make_classifier(chain), warmup=1, selection=SelectionOptions(samples=20))
        before = snapshot(chain)
        trainer.fit_generator(generator, nb_epochs=3, validation_data=data, **QUIET)
        assert len(batches) == 3 * 3  # the samples that were measured are trained on too
        assert [record.stage for record in trainer.history.epochs] == ["adversarial training", "clat", "clat"]
        assert trainer.history.selections[0].measured.nb_samples == 32
        assert moved(chain, before)

    def test_a_smaller_last_batch_of_a_generator_is_trained_on(self, chain, data):
        trainer, sizes = make_trainer(make_classifier(chain)), []
        observe(trainer, step=lambda loop, step, batch, *args: sizes.append(len(batch)) or step(batch, *args))
        dataset = torch.utils.data.TensorDataset(torch.tensor(data[0][:35]), torch.tensor(data[1][:35]))
        loader = torch.utils.data.DataLoader(dataset, batch_size=16)
        trainer.fit_generator(PyTorchDataGenerator(loader, size=35, batch_size=16), nb_epochs=1, **QUIET)
        assert sizes == [16, 16, 3]

    def test_an_augmentation_in_place_does_not_change_a_generators_data(self, chain, data):
        x = data[0].copy()
        trainer = make_trainer(make_classifier(chain), augmentation=lambda image: image.mul_(0.5))
        trainer.fit_generator(NumpyDataGenerator(x, data[1], batch_size=16), nb_epochs=1, **QUIET)
        np.testing.assert_array_equal(x, data[0])

    def test_an_augmentation_in_place_does_not_change_the_samples_that_are_measured(self, chain, data):
        means = []

        def rule(candidates):
            means.append(float(torch.cat([batch.x for batch in candidates.batches]).mean()))
            return [1.0] * len(candidates.layers)

        trainer = make_trainer(
            make_classifier(chain),
            selection=SelectionOptions(rule, samples=48),
            augmentation=lambda image: image.mul_(0.5),
            reselect_every=1,
        )
        trainer.fit_generator(NumpyDataGenerator(*data, batch_size=16), nb_epochs=2, **QUIET)
        assert means[0] == means[1] == pytest.approx(data[0].mean(), rel=1e-5)

    def test_flipped_views_are_accepted(self, chain, data):
        x = data[0][:, ::-1]
        assert min(x.strides) < 0
        trainer = make_trainer(make_classifier(chain))
        trainer.fit(x, data[1][::-1], validation_data=(x, data[1]), nb_epochs=1, **QUIET)
        assert len(trainer.history.epochs) == 1

    def test_warm_up_does_not_change_a_frozen_norm(self, normed, data):
        normed.bn2.requires_grad_(False)
        before = snapshot(normed)
        make_trainer(make_classifier(normed), warmup=1).fit(*data, batch_size=16, nb_epochs=1, **QUIET)
        assert not {name for name in moved(normed, before) if name.startswith("bn2")}
        assert {"bn1.running_mean", "bn3.weight", "conv2.weight"} <= set(moved(normed, before))

    def test_validation_counts_every_batch(self, chain, data):
        classifier = make_classifier(chain)
        x, y = np.tile(data[0], (11, 1, 1, 1)), np.tile(data[1], 11)  # of 528 samples, 256 at once
        trainer = make_trainer(classifier)
        trainer.fit(*data, validation_data=(x, y), nb_epochs=1, batch_size=16, **QUIET)
        assert trainer.history.epochs[0].clean_accuracy == (classifier.predict(x).argmax(1) == y).mean()

    def test_models_that_hide_their_layers_or_gradients_are_refused(self, data):
        compiled = make_classifier(torch.compile(Chain(), backend="eager"))
        recomputing = make_classifier(Chain())
        recomputing.model.hidden.grad_checkpointing = True
        for classifier, match in (
            (compiled, "it has been through `torch.compile`"),
            (recomputing, "hidden recomputes"),
        ):
            before = snapshot(classifier.model)
            with pytest.raises(ValueError, match=match):
                make_trainer(classifier, warmup=1).fit(*data, nb_epochs=1, **QUIET)
            assert not moved(classifier.model, before)

    def test_several_attacks_take_turns(self, chain, data):
        classifier = make_classifier(chain)
        attacks = [FastGradientMethod(classifier, eps=0.1), BasicIterativeMethod(classifier, 0.1, 0.05, 2)]
        trainer = make_trainer(classifier, attacks)
        seen = []
        observe(trainer, attack_for=lambda loop, turn, number: seen.append(turn(number).attack) or turn(number))
        trainer.fit(*data, batch_size=16, nb_epochs=2, **QUIET)
        assert seen == attacks * 3

    def test_ratio_is_the_share_that_is_perturbed(self, chain, data):
        classifier = make_classifier(chain)
        trainer = make_trainer(classifier, ratio=0.3)
        shares = []

        def recording(loop, perturb, batch, number):
            x_adv = perturb(batch, number)
            shares.append(int((x_adv != batch.x).flatten(1).any(1).sum()))
            return x_adv

        observe(trainer, perturb=recording)
        trainer.fit(*data, batch_size=16, nb_epochs=1, **QUIET)
        assert shares == [5, 5, 5]

    @pytest.mark.parametrize("kind", ["DeepFool", "APGD, which wraps the classifier it is given"])
    def test_attacks_of_any_kind(self, chain, data, kind):
        classifier = make_classifier(chain)
        if kind == "DeepFool":
            attack = DeepFool(classifier, max_iter=2, verbose=True)
        else:
            attack = AutoProjectedGradientDescent(
                classifier, eps=0.1, eps_step=0.02, max_iter=3, nb_random_init=1, loss_type="cross_entropy"
            )
        trainer = make_trainer(classifier, attack, warmup=1)
        trainer.fit(data[0][:16], data[1][:16], nb_epochs=2, **QUIET)
        assert len(trainer.history.selections) == 1 and attack.verbose is True

    def test_preprocessing_that_is_not_pytorchs(self, chain, data):
        class Rounding(Preprocessor):
            def __call__(self, x, y=None):
                return np.round(x, 1).astype(np.float32), y

        classifier = make_classifier(chain, preprocessing_defences=Rounding())
        assert not classifier.all_framework_preprocessing
        before = snapshot(chain)
        make_trainer(classifier, warmup=1).fit(*data, nb_epochs=2, **QUIET)
        assert moved(chain, before)
        with pytest.raises(ValueError, match="cannot here: the classifier's preprocessing is not PyTorch's"):
            make_trainer(classifier, objective="clean")

    def test_scheduler_steps_once_an_epoch(self, chain, data):
        classifier = make_classifier(chain, lr=0.08)
        scheduler = torch.optim.lr_scheduler.StepLR(classifier.optimizer, 1, gamma=0.5)
        trainer = make_trainer(classifier)
        trainer.fit(*data, nb_epochs=3, scheduler=scheduler, **QUIET)
        assert [record.learning_rate for record in trainer.history.epochs] == [0.08, 0.04, 0.02]

    def test_hugging_face_classifier(self, data):
        transformers = pytest.importorskip("transformers")
        if not transformers.utils.is_torch_available():
            pytest.skip("this version of transformers wants a newer torch")
        config = transformers.ViTConfig(
            hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=32, image_size=6,
            patch_size=3, num_channels=2, num_labels=4,
        )  # fmt: skip
        model = transformers.ViTForImageClassification(config)
        classifier = HuggingFaceClassifierPyTorch(
            model, nn.CrossEntropyLoss(), INPUT_SHAPE, 4, torch.optim.Adam(model.parameters(), 1e-3),
            clip_values=(0.0, 1.0), device_type="cpu",
        )  # fmt: skip
        trainer = make_trainer(classifier, warmup=1)
        before = snapshot(model)
        trainer.fit(*data, nb_epochs=1, **QUIET)
        assert moved(model, before)
        trainer = make_trainer(classifier, objective="clean")
        before = snapshot(model)
        trainer.fit(*data, nb_epochs=1, **QUIET)
        (chosen,) = trainer.history.selections[0].chosen
        assert moved(model, before) == {f"{chosen}.weight", f"{chosen}.bias"}

    def test_any_loss_of_the_classifier(self, chain, data):
        losses = []

        class Recording(nn.Module):
            reduction = "mean"

            def forward(self, logits, y):
                losses.append(1)
                return nn.functional.mse_loss(logits, y)

        classifier = make_classifier(chain, loss=Recording())
        make_trainer(classifier, warmup=1).fit(*data, nb_epochs=2, **QUIET)
        assert losses


def _differences(one, other):
    return {name for name in one if not torch.equal(one[name], other[name])}


class TestTheMethod:
    """Compare with a training loop written by hand, which computes features without hooks."""

    @pytest.mark.parametrize("objective", ["adversarial", "clean"])
    def test_one_epoch_of_the_second_stage(self, chain, data, objective):
        x, y = torch.tensor(data[0]), torch.tensor(data[1])
        reference = copy.deepcopy(chain)
        classifier = make_classifier(chain)
        attack = make_attack(classifier, num_random_init=0)
        measured = measure_criticality(classifier, *data, attack=attack)
        assert measured[-1].is_head  # and so not eligible
        name = max(list(measured)[:-1], key=lambda layer: layer.criticality).name

        perturbed = []
        trainer = make_trainer(classifier, attack, objective=objective, criticality_weight=0.2)

        def recording(loop, perturb, batch, number):
            perturbed.append((batch.x, batch.y, perturb(batch, number)))
            return perturbed[-1][-1]

        observe(trainer, perturb=recording)
        trainer.fit(*data, batch_size=len(x), nb_epochs=2, **QUIET)

        parameters = list(getattr(reference, name).parameters())
        optimizer = torch.optim.SGD(parameters, lr=0.05, momentum=0.9, weight_decay=5e-4)
        for x, y, x_adv in perturbed:
            if objective == "adversarial":  # the perturbation is PGD's on the cross-entropy of the network as it is
                expected = _pgd(reference, x, y)
                torch.testing.assert_close(x_adv, expected, atol=1e-6, rtol=0)
            clean, adversarial = reference.features(x), reference.features(x_adv)
            logits = (adversarial if objective == "adversarial" else clean)["head"]
            distance = (adversarial[name] - clean[name]).flatten(1).norm(dim=1).mean()
            optimizer.zero_grad()
            (nn.functional.cross_entropy(logits, y) + 0.2 * distance).backward()
            optimizer.step()
        assert trainer.history.selections[0].chosen == (name,)
        for key, value in reference.state_dict().items():
            torch.testing.assert_close(chain.state_dict()[key], value, atol=1e-5, rtol=1e-4)

    def test_warm_up_is_arts_adversarial_training(self, data):
        """With one batch an epoch and no random start, ART's trainer of Madry et al. does the same to 1e-5."""
        ours, theirs = (Normed().apply(lambda m: setattr(m, "p", 0.0)) for _ in range(2))  # no dropout
        theirs.load_state_dict(ours.state_dict())
        classifier = make_classifier(ours)
        trainer = make_trainer(classifier, make_attack(classifier, max_iter=3), warmup=4)
        trainer.fit(*data, batch_size=48, nb_epochs=4, **QUIET)
        madry = AdversarialTrainerMadryPGD(
            make_classifier(theirs), nb_epochs=4, batch_size=48, eps=0.1, eps_step=0.03, max_iter=3, num_random_init=0
        )
        madry.fit(*data)
        for key, value in theirs.state_dict().items():
            torch.testing.assert_close(ours.state_dict()[key], value, atol=1e-5, rtol=1e-4)

    def test_head_that_the_optimizer_does_not_hold_is_noticed_before_the_warm_up(self, chain, data):
        optimizer = torch.optim.SGD([p for n, p in chain.named_parameters() if "head" not in n], lr=0.1)
        make_trainer(make_classifier(chain, optimizer=optimizer)).fit(*data, nb_epochs=1, **QUIET)
        trainer = make_trainer(make_classifier(chain, optimizer=optimizer), warmup=1)
        with pytest.raises(ValueError, match=r"1 layer.*head"):
            trainer.fit(*data, **QUIET)

    def test_warm_up_epochs_are_counted_as_awp_does(self, chain, data):
        trainer = make_trainer(make_classifier(chain), warmup=2, reselect_every=3)
        trainer.fit(*data, nb_epochs=7, **QUIET)
        assert [r.stage for r in trainer.history.epochs] == ["adversarial training"] * 2 + ["clat"] * 5
        assert [s.epoch for s in trainer.history.selections] == [2, 5]

    def test_the_layers_are_chosen_again(self, data):
        """A layer made critical between two selections is trained after the second."""
        model = Chain()
        classifier = make_classifier(model, lr=1e-4)
        trainer = make_trainer(classifier, reselect_every=1)

        def after_a_change(loop, select):
            if loop.progress.epoch == 1:
                with torch.no_grad():
                    weakest = min(trainer.history.selections[0].measured[:-1], key=lambda layer: layer.criticality)
                    getattr(model, weakest.name).weight.mul_(100)
            return select()

        observe(trainer, select=after_a_change)
        trainer.fit(*data, nb_epochs=2, **QUIET)
        first, second = trainer.history.selections
        assert first.chosen != second.chosen

    @pytest.mark.parametrize("objective", ["adversarial", "clean", "clean_single_step"])
    def test_learns(self, normed, data, objective):
        classifier = make_classifier(normed, lr=0.1)
        trainer = make_trainer(classifier, warmup=15, objective=objective, budget=0.5, criticality_weight=0.01)
        trainer.fit(*data, validation_data=data, batch_size=16, nb_epochs=25, **QUIET)
        last = trainer.history.epochs[-1]
        assert last.clean_accuracy > 0.65
        if objective == "adversarial":  # the "clean" objective may lose robust accuracy
            assert last.robust_accuracy > 0.5

    def test_a_larger_weight_brings_a_smaller_feature_distance(self, data):
        distances = []
        for weight in (0.0, 5.0):
            torch.manual_seed(2)
            trainer = make_trainer(make_classifier(Chain()), criticality_weight=weight, reselect_every=100)
            trainer.fit(*data, batch_size=16, nb_epochs=10, **QUIET)
            distances.append(trainer.history.epochs[-1].criticality_loss)
        assert distances[1] < 0.5 * distances[0]


def _pgd(network, x, y, eps=0.1, step=0.03, steps=4):
    z = x.clone()
    for _ in range(steps):
        z.requires_grad_(True)
        (gradient,) = torch.autograd.grad(nn.functional.cross_entropy(network.features(z)["head"], y), z)
        z = (x + ((z + step * gradient.sign()).clamp(0, 1) - x).clamp(-eps, eps)).detach()
    return z


class TestAverage:
    def test_is_validated_and_is_what_the_network_ends_with(self, normed, data):
        trainer = make_trainer(make_classifier(normed), warmup=2, ema_decay=0.6)
        seen, validated = [], []

        def state():
            return {name: tensor.detach().clone() for name, tensor in normed.state_dict().items()}

        observe(
            trainer,
            step=lambda loop, step, *args: (step(*args), seen.append(state()))[0],
            validate=lambda loop, validate: (validated.append(state()), validate())[1],
        )
        average = state()
        trainer.fit(*data, validation_data=data, batch_size=16, nb_epochs=3, **QUIET)
        assert len(seen) == 9
        for number, weights in enumerate(seen):
            decay = min(0.6, (1 + number) / (10 + number))
            average = {
                name: decay * average[name] + (1 - decay) * weights[name] if weights[name].is_floating_point()
                else weights[name]
                for name in weights
            }  # fmt: skip
            if number % 3 == 2:
                torch.testing.assert_close(validated[number // 3], average)
        torch.testing.assert_close(state(), average)

    def test_does_not_influence_training(self, data):
        losses = []
        for ema_decay in (None, 0.9):
            torch.manual_seed(1)
            trainer = make_trainer(make_classifier(Normed()), warmup=1, ema_decay=ema_decay)
            trainer.fit(*data, validation_data=data, batch_size=16, nb_epochs=2, **QUIET)
            losses.append([record.loss for record in trainer.history.epochs])
        assert losses[0] == losses[1]


class TestPresets:
    """The preset decides what the user leaves open."""

    def test_default_freezes_norms(self, normed, data):
        classifier = make_classifier(normed)
        trainer = AdversarialTrainerCLATPyTorch(classifier, make_attack(classifier), selection=["conv2"], seed=0)
        before = snapshot(normed)
        trainer.fit(*data, nb_epochs=1, **QUIET)
        assert moved(normed, before) == {"conv2.weight"} and trainer.options.objective == "adversarial"

    def test_paper_trains_norms_on_clean_cross_entropy(self, normed, data):
        classifier = make_classifier(normed)
        trainer = AdversarialTrainerCLATPyTorch(
            classifier, make_attack(classifier), preset="paper", selection=["conv2"], seed=0
        )
        before = snapshot(normed)
        trainer.fit(*data, nb_epochs=1, **QUIET)
        assert {"bn2.weight", "bn2.running_mean"} < moved(normed, before) and trainer.options.objective == "clean"

    def test_the_users_values_take_precedence(self, normed):
        classifier = make_classifier(normed)
        trainer = AdversarialTrainerCLATPyTorch(
            classifier,
            make_attack(classifier),
            preset="paper",
            objective="pgd_at",
            layers=LayerOptions(freeze_norms=True),
        )
        assert trainer.options.objective == "pgd_at" and trainer.options.layers.freeze_norms

    def test_norms_of_larger_layers_are_trained(self, normed):
        classifier = make_classifier(normed)
        trainer = AdversarialTrainerCLATPyTorch(classifier, make_attack(classifier), layers=["conv2"])
        assert not trainer.options.layers.freeze_norms

    def test_unknown_preset(self, normed):
        classifier = make_classifier(normed)
        with pytest.raises(ValueError, match="`preset` must be one of 'default', 'paper', 'safer', got 'clean'"):
            AdversarialTrainerCLATPyTorch(classifier, make_attack(classifier), preset="clean")


class TestArgumentsArrive:
    @pytest.mark.parametrize("first_stage", ["pgd_at", "trades", "mart"])
    def test_first_stage(self, chain, data, first_stage):
        trainer = make_trainer(make_classifier(chain), warmup=1, first_stage=first_stage)
        seen = []
        observe(trainer, step=lambda loop, step, *args: seen.append(loop.stage.objective) or step(*args))
        trainer.fit(*data, batch_size=48, nb_epochs=2, **QUIET)
        assert [type(objective) for objective in seen] == [OBJECTIVES[first_stage], AdversarialCLAT]

    @pytest.mark.parametrize(("budget", "count"), [(0.5, 2), (Budget(count=3), 3), (Budget(parameter_share=0.34), 2)])
    def test_budget_and_selection(self, chain, data, budget, count):
        trainer = make_trainer(make_classifier(chain), budget=budget, selection="first")
        trainer.fit(*data, batch_size=48, nb_epochs=1, **QUIET)
        assert trainer.history.selections[0].chosen == ("first", "second", "hidden")[:count]

    def test_a_budget_that_pays_for_nothing_is_refused(self, chain, data):
        trainer = make_trainer(make_classifier(chain), warmup=5, budget=Budget(parameter_share=0.01))
        before = snapshot(chain)
        with pytest.raises(ValueError, match=r"`budget` .* pays for no layer: the smallest that may be chosen, first"):
            trainer.fit(*data, nb_epochs=1, **QUIET)
        assert not moved(chain, before)

    @pytest.mark.parametrize("selection", ["all", ["hidden"]])
    def test_the_budget_does_not_limit_layers_that_are_always_chosen(self, chain, data, selection):
        classifier = make_classifier(chain)
        trainer = make_trainer(classifier, selection=selection, budget=Budget(parameter_share=0.001))
        trainer.fit(*data, nb_epochs=1, **QUIET)
        assert trainer.history.selections[0].chosen == (
            ("first", "second", "hidden") if selection == "all" else ("hidden",)
        )

    def test_an_objective_is_made_of_chosen_layers_only(self, chain, data, monkeypatch):
        class Deepest(CleanCLAT):
            def __init__(self, classifier, layers, weight):
                super().__init__(classifier, [layers[-1]], weight)

        monkeypatch.setitem(OBJECTIVES, "deepest", Deepest)
        classifier = make_classifier(chain)
        make_trainer(classifier, objective="deepest", selection=["first", "second"]).fit(*data, nb_epochs=1, **QUIET)
        with pytest.raises(ValueError, match="objective='deepest'"):
            make_trainer(classifier, DeepFool(classifier, verbose=False), objective="deepest")

    def test_a_layer_that_no_input_reaches(self, data):
        class Query(Chain):
            def __init__(self):
                super().__init__()
                self.query, self.key = nn.Parameter(torch.rand(1, 3)), nn.Linear(3, 8)

            def forward(self, x):
                scale = self.key(self.query.expand(len(x), -1))
                x = nn.functional.relu_(self.first(x))
                x = nn.functional.gelu(self.second(x))
                return self.head(self.hidden(x.flatten(1)) * scale)

        model = Query()
        before = snapshot(model)
        make_trainer(make_classifier(model), objective="clean", selection="first", budget=Budget(count=1)).fit(
            *data, nb_epochs=1, **QUIET
        )
        assert moved(model, before) == {"key.weight", "key.bias"}

    def test_unknown_layer_names_are_refused_before_the_warm_up(self, chain, data):
        trainer = make_trainer(make_classifier(chain), warmup=5, selection=["first", "secnd"])
        before = snapshot(chain)
        with pytest.raises(ValueError, match=r"`selection` names secnd, .* can be are first, second, hidden\."):
            trainer.fit(*data, nb_epochs=1, **QUIET)
        assert not moved(chain, before)

    def test_single_step_and_after_norm(self, normed, data):
        classifier = make_classifier(normed)
        trainer = make_trainer(classifier, objective="clean_single_step", layers=LayerOptions(after_norm=True))
        seen = []
        observe(trainer, step=lambda loop, step, *args: seen.append(loop.stage.objective) or step(*args))
        trainer.fit(*data, batch_size=48, nb_epochs=1, **QUIET)
        (objective,) = seen
        assert objective.single_step
        assert isinstance(objective.features.layers[0].output.module, nn.BatchNorm2d)

    @pytest.mark.parametrize("freeze_norms", [False, True])
    def test_freeze_norms(self, normed, data, freeze_norms):
        """Weights and running statistics of a chosen layer's norm."""
        trainer = make_trainer(
            make_classifier(normed), selection=["conv2"], layers=LayerOptions(freeze_norms=freeze_norms)
        )
        before = snapshot(normed)
        trainer.fit(*data, batch_size=16, nb_epochs=1, **QUIET)
        norm = {"bn2.weight", "bn2.bias", "bn2.running_mean", "bn2.running_var", "bn2.num_batches_tracked"}
        assert moved(normed, before) == {"conv2.weight"} | (set() if freeze_norms else norm)
        trained = normed.conv2.weight.numel() + (0 if freeze_norms else 12)
        assert trainer.history.selections[0].trainable_parameters == trained

    def test_drop_last(self, chain, data):
        sizes = []
        trainer = make_trainer(make_classifier(chain))
        observe(trainer, step=lambda loop, step, batch, *args: sizes.append(len(batch)) or step(batch, *args))
        trainer.fit(*data, batch_size=20, nb_epochs=1, **QUIET)
        trainer.fit(*data, batch_size=20, nb_epochs=1, drop_last=True, **QUIET)
        assert sizes == [20, 20, 8, 20, 20]

    def test_any_attack_gets_each_input_with_its_label(self, chain, data):
        """Even if only a share of the batch is perturbed."""
        classifier = make_classifier(chain)
        label_of = {x.tobytes(): y for x, y in zip(*data, strict=True)}
        seen = []

        class Recording(ProjectedGradientDescent):
            def generate(self, x, y=None, **kwargs):
                seen.extend(label_of[one.tobytes()] == label.argmax() for one, label in zip(x, y, strict=True))
                return super().generate(x, y, **kwargs)

        attack = Recording(classifier, eps=0.1, eps_step=0.05, max_iter=2, verbose=False)
        trainer = make_trainer(classifier, attack, ratio=0.5, warmup=1, selection=SelectionOptions(samples=48))
        trainer.fit(*data, batch_size=16, nb_epochs=2, **QUIET)
        assert len(seen) == 2 * 24 + 48 and all(seen)

    def test_first_attack_measures_and_validates(self, chain, data):
        classifier = make_classifier(chain)
        first, second = make_attack(classifier, eps=0.15, eps_step=0.05), FastGradientMethod(classifier, eps=0.01)
        trainer = make_trainer(classifier, [first, second], selection=SelectionOptions(samples=48))
        with torch.no_grad():
            for parameter in chain.parameters():
                parameter.mul_(4)  # so that only the stronger attack fools
        expected = measure_criticality(classifier, *data, attack=first)
        trainer.fit(*data, validation_data=data, nb_epochs=1, **QUIET)
        measured = trainer.history.selections[0].measured
        assert [x.criticality for x in measured] == pytest.approx([x.criticality for x in expected], rel=1e-4)
        robust = (classifier.predict(first.generate(*data)).argmax(1) == data[1]).mean()
        assert trainer.history.epochs[0].robust_accuracy == pytest.approx(robust)
        assert robust < (classifier.predict(second.generate(*data)).argmax(1) == data[1]).mean()

    def test_selection_sample_is_drawn_at_random_once(self, chain, data):
        x = np.sort(data[0].reshape(48, -1), axis=0).reshape(data[0].shape)  # the first are the darkest
        trainer = make_trainer(make_classifier(chain), selection=SelectionOptions(samples=12), reselect_every=1)
        samples = []
        observe(
            trainer,
            select=lambda loop, select: samples.append(torch.cat([batch.x for batch in loop.sample])) or select(),
        )
        trainer.fit(x, data[1], nb_epochs=2, batch_size=16, **QUIET)
        assert len(samples[0]) == 12 and torch.equal(*samples)
        assert samples[0].mean() > x[:12].mean() + 0.02

    def test_history_holds_means_over_samples(self, chain, data):
        """With batches of 40 and 8 samples, and weights that do not move."""
        classifier = make_classifier(chain, lr=1e-12)
        for objective, index in (("adversarial", 1), ("clean", 0)):
            attack = make_attack(classifier)
            trainer = make_trainer(classifier, attack, objective=objective)
            trainer.fit(*data, batch_size=40, nb_epochs=1, **QUIET)
            record = trainer.history.epochs[0]
            inputs = (data[0], attack.generate(*data))[index]
            losses = classifier.compute_loss(inputs, data[1])
            accuracy = (classifier.predict(inputs).argmax(1) == data[1]).mean()
            assert record.cross_entropy == pytest.approx(losses.mean(), rel=1e-5)
            assert record.loss == pytest.approx(record.cross_entropy + 0.1 * record.criticality_loss, rel=1e-5)
            assert (record.train_clean_accuracy, record.train_robust_accuracy)[index] == pytest.approx(accuracy)
            assert (record.train_clean_accuracy, record.train_robust_accuracy)[1 - index] is None

    def test_generator_batches_that_were_measured_keep_their_order(self, chain, data):
        generator = NumpyDataGenerator(*data, batch_size=16)
        seen = []
        trainer = make_trainer(make_classifier(chain), selection=SelectionOptions(samples=40))
        observe(trainer, step=lambda loop, step, batch, *args: seen.append(batch.x) or step(batch, *args))
        trainer.fit_generator(generator, nb_epochs=1, **QUIET)
        np.testing.assert_array_equal(torch.cat(seen).numpy(), data[0])

    def test_second_stage_uses_the_preprocessing_of_prediction(self, chain, data):
        class BrighterInTraining(PreprocessorPyTorch):
            def __init__(self):
                super().__init__(is_fitted=True, apply_fit=True, apply_predict=False)
                self._device = torch.device("cpu")
                self.calls = 0

            def forward(self, x, y=None):
                self.calls += 1
                return x + 0.1, y

        defence = BrighterInTraining()
        classifier = make_classifier(chain, preprocessing_defences=defence)
        trainer = make_trainer(classifier, warmup=1)
        trainer.fit(*data, batch_size=48, nb_epochs=3, **QUIET)
        assert defence.calls == 1  # the one update of the warm-up, and no attack


class TestFrozenMeansFrozen:
    @pytest.mark.parametrize("objective", ["adversarial", "clean"])
    @pytest.mark.parametrize("make", [torch.optim.SGD, torch.optim.AdamW, torch.optim.RMSprop])
    def test_not_one_bit_outside_the_chosen_layers(self, normed, data, objective, make):
        options = {"lr": 0.01, "weight_decay": 0.1, **({} if make is torch.optim.AdamW else {"momentum": 0.9})}
        classifier = make_classifier(normed, optimizer=make(normed.parameters(), **options))
        make_trainer(classifier, warmup=2).fit(*data, batch_size=16, nb_epochs=2, **QUIET)  # momentum everywhere
        normed.fc.weight.grad = torch.ones_like(normed.fc.weight)  # and an old gradient
        before = snapshot(normed)
        trainer = make_trainer(classifier, objective=objective)
        trainer.fit(*data, batch_size=16, nb_epochs=2, **QUIET)
        (chosen,) = trainer.history.selections[0].chosen
        norm = chosen.replace("conv", "bn")
        names = ("weight", "bias", "running_mean", "running_var", "num_batches_tracked")
        assert moved(normed, before) == {f"{chosen}.weight", *(f"{norm}.{name}" for name in names)}

    def test_old_momentum_does_not_move_a_layer(self, data):
        """A layer chosen again starts without the momentum it had before it was frozen."""
        torch.manual_seed(4)
        model = Chain()
        classifier = make_classifier(model)
        trainer = make_trainer(classifier, reselect_every=1)
        turns = iter(["first", "second", "first"])
        momentum = {}

        def in_turn(loop, select):
            select()
            turn = next(turns)
            return [layer for layer in loop.layers if layer.name == turn]

        def recording(loop, train_epoch):
            held = {n for n, p in model.named_parameters() if p in classifier.optimizer.state}
            momentum[loop.progress.epoch] = held
            train_epoch()

        observe(trainer, select=in_turn, train_epoch=recording)
        trainer.fit(*data, nb_epochs=3, **QUIET)
        assert momentum == {0: set(), 1: set(), 2: set()}

    def test_a_layer_that_stays_chosen_keeps_its_momentum(self, chain, data):
        classifier = make_classifier(chain)
        trainer = make_trainer(classifier, reselect_every=1)
        momentum = []

        def recording(loop, train_epoch):
            momentum.append({n for n, p in chain.named_parameters() if p in classifier.optimizer.state})
            train_epoch()

        observe(trainer, train_epoch=recording)
        trainer.fit(*data, nb_epochs=2, **QUIET)
        first, second = (set(s.chosen) for s in trainer.history.selections)
        assert first == second
        assert momentum == [set(), {f"{name}.{kind}" for name in first for kind in ("weight", "bias")}]

    def test_share_of_the_parameters_in_log_and_history(self, normed, data, caplog):
        normed.conv1.weight.requires_grad_(False)
        trainer = make_trainer(make_classifier(normed), budget=0.75)
        with caplog.at_level(logging.INFO, logger="art_clat"):
            trainer.fit(*data, nb_epochs=1, **QUIET)
        (record,) = trainer.history.selections
        total = sum(p.numel() for p in normed.parameters())
        trained = sum(getattr(normed, name).weight.numel() for name in record.chosen if name != "conv1")
        trained += 12 * len(record.chosen)
        assert (record.trainable_parameters, record.total_parameters) == (trained, total)
        (line,) = [
            r.message for r in caplog.records if r.name == "art_clat.training.loop" and r.levelno == logging.INFO
        ]
        assert f"{trained:,} of {total:,} parameters ({100 * trained / total:.2f} %)" in line
        assert all(name in line for name in record.chosen)


class TestGuest:
    @pytest.mark.parametrize("failure", [None, RuntimeError, KeyboardInterrupt])
    @pytest.mark.parametrize("stage", ["adversarial training", "clat"])
    def test_the_model_is_restored(self, normed, data, failure, stage):
        classifier = make_classifier(normed)
        normed.train()
        normed.bn2.eval()
        normed.conv1.weight.requires_grad_(False)
        handle = normed.fc.register_forward_hook(lambda *_: None)
        random.seed(3)

        def state():
            return (
                [m.training for m in classifier._model.modules()],
                [p.requires_grad for p in normed.parameters()],
                [list(m._forward_hooks) for m in normed.modules()],
                [list(m._forward_pre_hooks) for m in normed.modules()],
                random.getstate(),
                torch.get_rng_state().tolist(),
                np.random.get_state()[1].tolist(),
            )

        before = state()
        assert any(before[2])
        trainer = make_trainer(classifier, warmup=0 if stage == "clat" else 5)
        if failure is None:
            trainer.fit(*data, validation_data=data, batch_size=16, nb_epochs=2, **QUIET)
        else:
            step = classifier.optimizer.step
            calls = []

            def failing():
                calls.append(1)
                if len(calls) == 2:
                    raise failure
                step()

            classifier.optimizer.step = failing
            with pytest.raises(failure):
                trainer.fit(*data, validation_data=data, batch_size=16, nb_epochs=2, **QUIET)
        assert state() == before
        assert all(p.grad is None for p in normed.parameters())
        handle.remove()

    def test_equal_seeds_give_equal_results_bit_for_bit(self, data):
        states, histories = [], []
        for seed in (7, 7, 8):
            torch.manual_seed(1)
            model = Normed()
            classifier = make_classifier(model)
            torch.manual_seed(len(states))  # the global generators do not matter
            np.random.seed(len(states))
            trainer = make_trainer(classifier, make_attack(classifier, num_random_init=1), seed=seed, warmup=1)
            trainer.fit(*data, batch_size=16, nb_epochs=3, **QUIET)
            states.append(snapshot(model))
            histories.append([(r.loss, r.cross_entropy, r.criticality_loss) for r in trainer.history.epochs])
        assert not _differences(states[0], states[1]) and histories[0] == histories[1]
        assert _differences(states[0], states[2])

    def test_without_a_seed_numpys_generator_decides(self, data):
        states = []
        for seed in (1, 1, 2):
            torch.manual_seed(1)
            model = Normed()
            np.random.seed(seed)
            make_trainer(make_classifier(model), seed=None).fit(*data, batch_size=16, nb_epochs=1, **QUIET)
            states.append(snapshot(model))
        assert not _differences(states[0], states[1])
        assert _differences(states[0], states[2])

    def test_validation_does_not_influence_training(self, data):
        states = []
        for validation_data in (None, data):
            torch.manual_seed(1)
            model = Normed()
            classifier = make_classifier(model)
            trainer = make_trainer(classifier, make_attack(classifier, num_random_init=1), warmup=1)
            trainer.fit(*data, validation_data=validation_data, batch_size=16, nb_epochs=3, **QUIET)
            states.append(snapshot(model))
        assert not _differences(*states)

    def test_validation_accuracies_are_those_of_art(self, normed, data):
        classifier = make_classifier(normed)
        attack = make_attack(classifier)
        trainer = make_trainer(classifier, attack)
        trainer.fit(*data, validation_data=(data[0][:30], data[1][:30]), nb_epochs=1, **QUIET)
        record = trainer.history.epochs[-1]
        x, y = data[0][:30], data[1][:30]
        assert record.clean_accuracy == pytest.approx((classifier.predict(x).argmax(1) == y).mean())
        robust = (classifier.predict(attack.generate(x, y)).argmax(1) == y).mean()
        assert record.robust_accuracy == pytest.approx(robust)


class TestNonFinite:
    @pytest.mark.parametrize("warmup", [0, 5])
    def test_stops_with_the_last_finite_weights(self, normed, data, warmup):
        classifier = make_classifier(normed, lr=1e25)
        trainer = make_trainer(classifier, warmup=warmup)
        with pytest.raises(FloatingPointError, match=r"epoch 0, batch \d.*learning rate \(now 1e\+25\)"):
            trainer.fit(*data, batch_size=8, nb_epochs=3, **QUIET)
        assert all(torch.isfinite(value).all() for value in normed.state_dict().values())

    def test_a_step_that_overflows_is_undone(self, normed, data):
        classifier = make_classifier(normed, lr=float("inf"))
        before = snapshot(normed)
        with pytest.raises(FloatingPointError, match="not finite in epoch 0, batch 0"):
            make_trainer(classifier).fit(*data, batch_size=48, nb_epochs=1, **QUIET)
        assert not moved(normed, before)
        assert not classifier.optimizer.state  # the momentum has overflowed too

    def test_a_large_but_finite_gradient_passes(self, chain, data):
        class Huge(nn.CrossEntropyLoss):
            def forward(self, logits, y):
                return 1e22 * super().forward(logits, y)

        classifier = make_classifier(chain, loss=Huge(), lr=1e-23)
        before = snapshot(chain)
        make_trainer(classifier, warmup=1).fit(*data, nb_epochs=1, **QUIET)
        assert moved(chain, before)

    def test_a_gradient_that_is_not_finite_does_not_reach_the_weights(self, chain, data):
        class Steep(nn.Module):
            reduction = "mean"

            def forward(self, logits, y):
                return logits.mean().abs() + 0 * (logits.mean() - logits.mean()).abs().sqrt()  # gradient: NaN

        classifier = make_classifier(chain, loss=Steep())
        attack = FastGradientMethod(classifier, eps=0.0)
        before = snapshot(chain)
        trainer = make_trainer(classifier, attack, warmup=1)
        observe(trainer, perturb=lambda loop, perturb, batch, number: batch.x)
        with pytest.raises(FloatingPointError, match="step is not finite"):
            trainer.fit(*data, nb_epochs=1, **QUIET)
        assert not moved(chain, before)

    def test_a_mask_that_is_infinite_from_the_beginning_is_ignored(self, data):
        class Masked(Normed):
            def __init__(self):
                super().__init__()
                self.register_buffer("mask", torch.full((3,), -torch.inf))

        model = Masked()
        make_trainer(make_classifier(model), warmup=1, ema_decay=0.9).fit(*data, nb_epochs=2, **QUIET)
        assert torch.equal(model.mask, torch.full((3,), -torch.inf))


class TestBadInput:
    @pytest.mark.parametrize(
        ("argument", "value"),
        [
            ("ratio", 0), ("ratio", 1.5), ("ratio", float("nan")), ("budget", 0),
            ("budget", 1.01), ("criticality_weight", -0.1), ("criticality_weight", float("nan")),
            ("warmup", -1), ("warmup", 1.5),
            ("reselect_every", 0), ("objective", "both"), ("first_stage", "clean"), ("samples", 0),
            ("seed", -1), ("selection", "worst"), ("ema_decay", 1.0), ("ema_decay", 0),
            ("seed", 2**32), ("budget", "5%"),
        ],
    )  # fmt: skip
    def test_arguments(self, chain, argument, value):
        with pytest.raises(ValueError, match=f"`{argument}`"):
            if argument == "samples":
                make_trainer(make_classifier(chain), selection=SelectionOptions(samples=value))
            else:
                make_trainer(make_classifier(chain), **{argument: value})

    def test_classifiers(self, chain):
        with pytest.raises(TypeError, match="`classifier` must be an ART PyTorchClassifier"):
            AdversarialTrainerCLATPyTorch(chain, [])
        without = PyTorchClassifier(chain, nn.CrossEntropyLoss(), INPUT_SHAPE, 4)
        with pytest.raises(ValueError, match="`classifier` has no optimizer"):
            make_trainer(without)
        empty = nn.Sequential(nn.Flatten(), nn.BatchNorm1d(72))
        with pytest.raises(ValueError, match="no weighted layer"):
            make_trainer(make_classifier(empty))

    def test_attacks(self, chain):
        classifier = make_classifier(chain)
        with pytest.raises(ValueError, match="`attacks`.*bound to another classifier"):
            AdversarialTrainerCLATPyTorch(classifier, make_attack(make_classifier(Chain())))
        with pytest.raises(ValueError, match="`attacks`.*targeted"):
            AdversarialTrainerCLATPyTorch(classifier, make_attack(classifier, targeted=True))
        with pytest.raises(ValueError, match="`attacks` is empty"):
            AdversarialTrainerCLATPyTorch(classifier, [])
        with pytest.raises(TypeError, match="`attacks` must be an ART EvasionAttack"):
            AdversarialTrainerCLATPyTorch(classifier, [chain])
        with pytest.raises(ValueError, match="cannot here: DeepFool is not of the PGD family"):
            AdversarialTrainerCLATPyTorch(classifier, DeepFool(classifier), objective="clean")

    @pytest.mark.parametrize(
        ("change", "match"),
        [
            (lambda x, y: (x[:0], y[:0]), "`x` is empty"),
            (lambda x, y: (x, y[:-1]), "differ in length: 48 and 47"),
            (lambda x, y: ((255 * x).astype(np.uint8), y), "floating point, got uint8"),
            (lambda x, y: (np.where(x == x.max(), np.nan, x), y), "NaN or infinity, in 1 of 48"),
            (lambda x, y: (np.where(x == x.max(), np.inf, x), y), "NaN or infinity"),
            (lambda x, y: (x * 255, y), "outside the classifier's clip_values"),
            (lambda x, y: (x - 0.5, y), "outside the classifier's clip_values"),
            (lambda x, y: (x[:, :, :5], y), "shape"),
            (lambda x, y: (x, y + 1), "`y` holds labels from 1 to 4"),
            (lambda x, y: (x, y - 1), "`y` holds labels from -1"),
            (lambda x, y: (x, y + 0.5), "not whole numbers"),
            (lambda x, y: (x, np.eye(5)[y]), "`y` has shape"),
            (lambda x, y: (x, 2 * np.eye(4)[y]), "not class probabilities"),
            (lambda x, y: (x, y.astype(str)), "must hold numbers"),
            (lambda x, y: (x.astype(np.float64) * 1e300, y), "NaN or infinity"),
        ],
    )
    def test_data(self, normed, data, change, match):
        trainer = make_trainer(make_classifier(normed))
        bad = change(*data)
        before = snapshot(normed)
        with pytest.raises(ValueError, match=match):
            trainer.fit(*bad, nb_epochs=1, **QUIET)
        with pytest.raises(ValueError, match=match.replace("`x`", "").replace("`y`", "")):
            trainer.fit(*data, validation_data=bad, nb_epochs=1, **QUIET)
        if len(bad[0]) and len(bad[0]) == len(bad[1]):
            with pytest.raises(
                ValueError, match=match.replace("`x`", "").replace("`y`", "").replace(" in 1 of 48", "")
            ):
                trainer.fit_generator(NumpyDataGenerator(*bad, batch_size=16), nb_epochs=1, **QUIET)
        assert not moved(normed, before)

    def test_options_of_fit(self, chain, data):
        trainer = make_trainer(make_classifier(chain))
        before = snapshot(chain)
        with pytest.raises(TypeError, match="learning_rate; accepted are callbacks, .*drop_last, verbose"):
            trainer.fit(*data, learning_rate=0.1)
        with pytest.raises(ValueError, match="`batch_size`"):
            trainer.fit(*data, batch_size=0)
        with pytest.raises(ValueError, match="`nb_epochs`"):
            trainer.fit(*data, nb_epochs=0)
        with pytest.raises(ValueError, match="`drop_last` leaves no batch"):
            trainer.fit(*data, batch_size=100, drop_last=True)
        with pytest.raises(TypeError, match="`scheduler` must be"):
            trainer.fit(*data, scheduler=object())
        other = torch.optim.SGD(Chain().parameters(), 0.1)
        with pytest.raises(ValueError, match="`scheduler` belongs to another optimizer"):
            trainer.fit(*data, scheduler=torch.optim.lr_scheduler.StepLR(other, 1))
        with pytest.raises(TypeError, match="`generator` must be an ART DataGenerator"):
            trainer.fit_generator(iter([data]))
        assert not moved(chain, before)

    def test_one_input_instead_of_a_batch(self, chain, data):
        with pytest.raises(ValueError, match=r"one input of shape \(2, 6, 6\); a batch is needed"):
            make_trainer(make_classifier(chain)).fit(data[0][0], data[1][:1], **QUIET)

    def test_optimizers(self, chain, data):
        with pytest.raises(ValueError, match="LBFGS"):
            make_trainer(make_classifier(chain, optimizer=torch.optim.LBFGS(chain.parameters())))
        chain.head.weight.grad = torch.ones_like(chain.head.weight)
        other = torch.optim.SGD(Chain().parameters(), 0.1)
        with pytest.raises(ValueError, match="belongs to another model"):
            make_trainer(make_classifier(chain, optimizer=other)).fit(*data, **QUIET)
        assert chain.head.weight.grad is not None  # nothing was touched

    def test_batch_of_one_sample_that_a_batch_norm_cannot_take(self, data):
        model = nn.Sequential(nn.Flatten(), nn.Linear(72, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 4))
        trainer = make_trainer(make_classifier(model))
        with pytest.raises(ValueError, match="drop_last=True"):
            trainer.fit(*data, batch_size=47, nb_epochs=1, **QUIET)
        trainer.fit(*data, batch_size=47, nb_epochs=1, drop_last=True, **QUIET)

    def test_optimizer_that_does_not_hold_a_layer(self, chain, data):
        optimizer = torch.optim.SGD([*chain.first.parameters(), *chain.head.parameters()], lr=0.1)
        trainer = make_trainer(make_classifier(chain, optimizer=optimizer))
        before = snapshot(chain)
        with pytest.raises(ValueError, match="does not hold the parameters of 2 layer.*second, hidden"):
            trainer.fit(*data, **QUIET)
        assert not moved(chain, before)
        for layer in (chain.second, chain.hidden):
            layer.requires_grad_(False)
        trainer.fit(*data, nb_epochs=1, **QUIET)
        assert trainer.history.selections[0].chosen == ("first",)

    def test_network_that_is_nothing_but_a_head(self, data):
        model = nn.Sequential(nn.Flatten(), nn.Linear(72, 4))
        with pytest.raises(ValueError, match="head_eligible"):
            make_trainer(make_classifier(model)).fit(*data, **QUIET)
        trainer = make_trainer(make_classifier(model), layers=LayerOptions(head_eligible=True))
        trainer.fit(*data, nb_epochs=1, **QUIET)
        assert trainer.history.selections[0].chosen == ("1",)


def test_log_lines_are_not_written_into_the_progress_bar(tmp_path):
    script = tmp_path / "train.py"
    script.write_text(
        "import logging\n"
        "from conftest import Chain, make_attack, make_classifier, make_data\n"
        "from art_clat import AdversarialTrainerCLATPyTorch\n"
        "logging.basicConfig(level=logging.INFO, format='%(message)s')\n"
        "classifier = make_classifier(Chain())\n"
        "trainer = AdversarialTrainerCLATPyTorch(classifier, make_attack(classifier), warmup=1, seed=0)\n"
        "trainer.fit(*make_data(), nb_epochs=2, batch_size=16)\n"
    )
    paths = os.pathsep.join([str(Path(__file__).parent), os.environ.get("PYTHONPATH", "")])
    command = [sys.executable, "-W", "ignore", str(script)]
    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "PYTHONPATH": paths})
    assert done.returncode == 0, done.stderr
    lines = done.stderr.replace("\r", "\n").splitlines()
    assert any(line.startswith("CLAT, epoch 1: training 1 of 4 layers") for line in lines)
    assert any("epoch/s" in line for line in lines)
    assert not any("CLAT, epoch" in line and "epoch/s" in line for line in lines)
