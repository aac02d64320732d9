"""What makes training fast, and that it does not change results."""

import copy
import random
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from art.attacks.evasion import ProjectedGradientDescent
from art.estimators.classification import PyTorchClassifier
from conftest import INPUT_SHAPE, Chain, make_attack, make_classifier, make_data, observe
from torch import nn
from torch.utils.flop_counter import FlopCounterMode
from torchvision.transforms import v2

import art_clat.utils.batch
from art_clat import (
    AdversarialTrainerCLATPyTorch,
    Batch,
    Budget,
    LayerOptions,
    PerformanceOptions,
    SelectionOptions,
    create_backbone,
)
from art_clat.attacks.ascent import Ascent
from art_clat.attacks.balls import LinfBall
from art_clat.attacks.tensor_attack import TensorAttack
from art_clat.models.tensor_classifier import TensorClassifier, channels_last
from art_clat.training.augmentation import augment
from art_clat.training.data import ArrayBatches
from art_clat.training.finite import FiniteGuard
from art_clat.training.objectives import AdversarialCLAT, CleanCLAT
from art_clat.utils.processes import Part, Ranks
from art_clat.utils.randomness import reseed

ROOT = Path(__file__).parents[1]
QUIET = {"verbose": False}


def make_trainer(classifier, **kwargs):
    return AdversarialTrainerCLATPyTorch(
        classifier, make_attack(classifier), **{"seed": 0, "layers": LayerOptions(freeze_norms=False), **kwargs}
    )


@pytest.fixture(scope="module")
def resnet():
    """A real network after some steps of training, so that no weight or statistic has its initial value."""
    torch.manual_seed(0)
    model = create_backbone("resnet10t", num_classes=10, input_size=(3, 32, 32), channels=(8, 16, 32, 64), stem_width=8)
    optimizer = torch.optim.SGD(model.parameters(), 0.05, momentum=0.9)
    classifier = PyTorchClassifier(
        model, nn.CrossEntropyLoss(), (3, 32, 32), 10, optimizer=optimizer, clip_values=(0.0, 1.0), device_type="cpu"
    )
    rng = np.random.default_rng(0)
    x, y = rng.random((80, 3, 32, 32), dtype=np.float32), rng.integers(0, 10, 80)
    classifier.fit(x, y, nb_epochs=3, batch_size=16)
    return classifier, x, y


class TestSameResults:
    def test_adversarial_examples_of_a_real_network_equal_arts_bit_for_bit(self, resnet):
        classifier, x, y = resnet
        attack = ProjectedGradientDescent(
            classifier, eps=8 / 255, eps_step=2 / 255, max_iter=10, num_random_init=0, batch_size=32, verbose=False
        )
        ours = TensorAttack(attack, TensorClassifier(classifier))(Batch.whole(torch.tensor(x), torch.tensor(y))).numpy()
        np.testing.assert_array_equal(ours, attack.generate(x, y))

    @pytest.mark.parametrize("which", range(0, 12, 3))
    def test_stopping_early_changes_no_bit_of_features_and_gradients(self, resnet, which):
        classifier, x, _ = resnet
        network = TensorClassifier(classifier)
        classifier.model.eval()
        layers = network.find_layers(torch.tensor(x))
        objective = CleanCLAT(network, [layers[which]], 0.1)
        clean, z = torch.tensor(x[:32]), torch.rand(32, 3, 32, 32)
        results = []
        for stop in (True, False):
            inputs = z.clone().requires_grad_()
            with objective.features.keep(stop=stop):
                network.logits(clean)
            with objective.features.compare(stop=stop):
                network.logits(torch.zeros_like(clean))
            kept = objective.features.total_distance().detach()  # depends on the kept features
            with objective.features.compare(stop=stop):
                network.logits(inputs)
            distance = objective.features.total_distance()
            results.append((kept, distance.detach(), *torch.autograd.grad(distance.sum(), inputs)))
        assert all(map(torch.equal, *results))

    @pytest.mark.parametrize(
        ("shape", "sizes"), [((3, 32, 32), [32, 32, 6]), ((3, 64, 64), [32, 32, 6]), ((1, 8, 8), [70])]
    )
    def test_chunks_are_as_large_as_the_caches_allow(self, shape, sizes):
        batch = Batch.whole(torch.rand(70, *shape), torch.arange(70))
        chunks = batch.chunks()
        assert [len(chunk) for chunk in chunks] == sizes
        assert torch.equal(torch.cat([chunk.x for chunk in chunks]), batch.x)
        assert torch.equal(torch.cat([chunk.y for chunk in chunks]), batch.y)
        assert torch.equal(torch.cat([torch.arange(70)[chunk.part.mine] for chunk in chunks]), batch.y)

    def test_chunks_do_not_change_adversarial_examples(self, chain, data, monkeypatch):
        """Neither with a random start nor with restarts."""
        classifier = make_classifier(chain)
        attack = make_attack(classifier, num_random_init=3, eps=0.3)
        ours = TensorAttack(attack, TensorClassifier(classifier))
        x, y = (torch.tensor(a).repeat(2, *[1] * (a.ndim - 1)) for a in data)  # three chunks of 96
        results = []
        for elements in (0, 10**9):
            torch.manual_seed(5)
            monkeypatch.setattr(art_clat.utils.batch, "CHUNK_ELEMENTS", elements)
            results.append(ours(Batch.whole(x, y)))
        torch.testing.assert_close(*results, atol=1e-6, rtol=0)

    def test_a_part_starts_where_it_would_in_the_whole_batch(self):
        ascent = Ascent(ball=LinfBall(0.1, None), step=0.1, nb_steps=1, random_start=True)
        x = torch.rand(10, *INPUT_SHAPE)
        starts = []
        for parts in ([slice(None)], [slice(0, 4), slice(4, 10)], [torch.tensor([2, 5])]):
            for part in parts:
                torch.manual_seed(3)
                starts.append(ascent.start(x[part], Part(10, part)))
        assert torch.equal(torch.cat(starts[1:3]), starts[0]) and torch.equal(starts[3], starts[0][[2, 5]])


class TestWhatIsSaved:
    @pytest.mark.parametrize("stage", ["adversarial training", "adversarial", "clean"])
    def test_no_weight_gradient_in_an_attack(self, normed, data, stage):
        """A backward pass of the attack costs the FLOPs of its forward pass, not twice as much."""
        classifier = make_classifier(normed)
        network = TensorClassifier(classifier)
        x, y = map(torch.tensor, data)
        normed.eval()
        with FlopCounterMode(display=False) as forward, torch.no_grad():
            normed(x)
        with FlopCounterMode(display=False) as counter:
            if stage == "adversarial training":
                TensorAttack(make_attack(classifier, max_iter=4), network)(Batch.whole(x, y))
                passes = 4 * 2
            else:
                cls = AdversarialCLAT if stage == "adversarial" else CleanCLAT
                layers = network.find_layers(x)
                with FlopCounterMode(display=False) as probes:
                    network.find_layers(x)
                counter.flop_counts["Global"].clear()
                attack = TensorAttack(make_attack(classifier, max_iter=4), network)
                cls(network, [layers[-1]], 0.1).perturb(attack, Batch.whole(x, y))
                passes = 4 * 2 + (stage == "clean")
                assert probes.get_total_flops() > 0
        assert counter.get_total_flops() == passes * forward.get_total_flops()

    def test_the_inner_attack_ends_at_the_deepest_chosen_layer(self, chain, data):
        classifier = make_classifier(chain)
        network = TensorClassifier(classifier)
        x, y = map(torch.tensor, data)
        layers = network.find_layers(x)
        ran = []
        handles = [m.register_forward_hook(lambda *_, n=n: ran.append(n)) for n, m in chain.named_children()]
        attack = TensorAttack(make_attack(classifier), network)
        CleanCLAT(network, layers[:2], 0.1).perturb(attack, Batch.whole(x, y))
        for handle in handles:
            handle.remove()
        assert set(ran) == {"first", "second"}
        assert ran.count("second") == 1 + 4  # clean features once, then four steps

    @pytest.mark.parametrize("objective", ["adversarial", "clean"])
    def test_no_graph_below_the_shallowest_chosen_layer(self, chain, data, objective):
        classifier = make_classifier(chain)
        network = TensorClassifier(classifier)
        x, y = map(torch.tensor, data)
        layers = network.find_layers(x)
        for parameter in chain.parameters():
            parameter.requires_grad_(False)
        chain.hidden.requires_grad_(True)
        seen = {}
        for name, module in chain.named_children():
            module.register_forward_hook(
                lambda m, a, out, name=name: seen.setdefault(name, []).append(out.requires_grad)
            )
        cls = AdversarialCLAT if objective == "adversarial" else CleanCLAT
        cls(network, [layers[2]], 0.1).loss(Batch.whole(x, y), x + 0.01).loss.backward()
        assert seen["first"] == seen["second"] == [False, False]
        assert seen["hidden"] == [True, True] and seen["head"] == [True]

    def test_kept_features_are_dropped_before_the_backward_pass(self, chain, data):
        network = TensorClassifier(make_classifier(chain))
        x, y = map(torch.tensor, data)
        for cls in (AdversarialCLAT, CleanCLAT):
            objective = cls(network, network.find_layers(x)[:1], 0.1)
            objective.loss(Batch.whole(x, y), x + 0.01)
            assert objective.features.nb_kept == 0

    def test_labels_are_prepared_once_an_attack(self, chain, data):
        classifier = make_classifier(chain)
        calls, reduce_labels = [], classifier.reduce_labels
        classifier.reduce_labels = lambda y: calls.append(1) or reduce_labels(y)
        x, y = map(torch.tensor, data)
        TensorAttack(make_attack(classifier, max_iter=7), TensorClassifier(classifier))(Batch.whole(x[:32], y[:32]))
        assert len(calls) == 1


class TestAugmentation:
    def test_differs_between_images_and_epochs(self, chain, data):
        seen = []

        class Recording(v2.RandomHorizontalFlip):
            def __call__(self, image):
                out = super().__call__(image)
                seen.append(not torch.equal(out, image))
                assert image.shape == INPUT_SHAPE
                return out

        make_trainer(make_classifier(chain), augmentation=Recording()).fit(*data, batch_size=16, nb_epochs=2, **QUIET)
        assert len(seen) == 96 and 10 < sum(seen[:48]) < 38 and seen[:48] != seen[48:]
        assert 0 < sum(seen[:16]) < 16

    def test_reaches_the_attack_and_the_update_but_not_the_measurement(self, chain, data):
        trainer = make_trainer(make_classifier(chain), augmentation=lambda image: torch.full_like(image, 0.25))
        seen, measured = [], []
        observe(
            trainer,
            perturb=lambda loop, perturb, batch, *args: seen.append(batch.x) or perturb(batch, *args),
            select=lambda loop, select: measured.extend(batch.x for batch in loop.sample) or select(),
        )
        trainer.fit(*data, nb_epochs=1, **QUIET)
        assert (torch.cat(seen) == 0.25).all() and not (torch.cat(measured) == 0.25).any()

    @pytest.mark.parametrize(
        "draw",
        [
            v2.RandomHorizontalFlip(),
            lambda image: image * random.random(),
            lambda image: image * np.random.rand(),
            v2.GaussianNoise() if hasattr(v2, "GaussianNoise") else (lambda image: image + torch.randn_like(image)),
        ],
    )
    def test_does_not_depend_on_the_share(self, draw):
        x = torch.rand(9, 3, 4, 4)
        y = torch.arange(9)
        whole = augment(draw, Batch.whole(x, y), 7, 1, 0).x
        share = augment(draw, Batch(x[3:6], y[3:6], Part(9, slice(3, 6))), 7, 1, 0)
        assert torch.equal(share.x, whole[3:6]) and torch.equal(share.y, y[3:6])
        assert not torch.equal(augment(draw, Batch.whole(x, y), 7, 1, 1).x, whole)

    def test_another_shape_is_refused(self, chain, data):
        trainer = make_trainer(make_classifier(chain), augmentation=v2.CenterCrop(4))
        with pytest.raises(ValueError, match=r"`augmentation` makes torch.float32 images of shape \(2, 4, 4\)"):
            trainer.fit(*data, nb_epochs=1, **QUIET)
        with pytest.raises(TypeError, match="`augmentation` must be a transform"):
            make_trainer(make_classifier(chain), augmentation=3)


def weights_after(data, model, **kwargs):
    torch.manual_seed(1)
    classifier = make_classifier(model)
    trainer = make_trainer(classifier, warmup=1, reselect_every=1, **kwargs)
    trainer.fit(*data, batch_size=16, nb_epochs=3, **QUIET)
    return trainer


@pytest.mark.parametrize("reuse", [None, 1])
@pytest.mark.parametrize("steps", [2, 10])
def test_a_selection_takes_at_most_a_third_of_an_epoch(chain, steps, reuse):
    counted = {"select": [], "train_epoch": []}

    def count(name):
        def run(loop, method, *args):
            with FlopCounterMode(display=False) as counter:
                result = method(*args)
            counted[name].append(counter.get_total_flops())
            return result

        return run

    trainer = make_trainer(make_classifier(chain), reselect_every=2, budget=Budget(count=3), reuse_perturbations=reuse)
    trainer.attacks[0].set_params(max_iter=steps)
    observe(trainer, **{name: count(name) for name in counted})
    trainer.fit(*make_data(1200), nb_epochs=3, **QUIET)
    assert 0.1 < counted["select"][1] / counted["train_epoch"][2] < 0.4
    trainer.fit(*make_data(40_000), nb_epochs=1, **QUIET)
    assert [s.measured.nb_samples for s in trainer.history.selections] == [1024]


class TestOptions:
    @pytest.mark.parametrize("objective", ["adversarial", "clean"])
    def test_channels_last_is_the_same_but_for_rounding(self, normed, data, objective):
        models = [normed, copy.deepcopy(normed)]
        formats = []
        models[1].conv2.register_forward_hook(
            lambda m, a, out: formats.append(out.is_contiguous(memory_format=torch.channels_last))
        )
        trainers = [
            weights_after(data, m, performance=PerformanceOptions(channels_last=flag), objective=objective)
            for m, flag in zip(models, (False, True), strict=True)
        ]
        losses = [[record.loss for record in trainer.history.epochs] for trainer in trainers]
        np.testing.assert_allclose(*losses, rtol=1e-3)
        assert all(formats[6:])  # after the layers were found
        assert all(p.is_contiguous() for p in models[1].parameters())

    def test_channels_last_applies_to_the_momentum_too(self, normed, data):
        classifier = make_classifier(normed)
        network, state = TensorClassifier(classifier), classifier.optimizer.state
        network.loss(*map(torch.tensor, data))[0].backward()
        classifier.optimizer.step()
        before = state[normed.conv2.weight]["momentum_buffer"].clone()
        with channels_last(normed, classifier.optimizer):
            assert state[normed.conv2.weight]["momentum_buffer"].is_contiguous(memory_format=torch.channels_last)
        momentum = state[normed.conv2.weight]["momentum_buffer"]
        assert momentum.is_contiguous() and torch.equal(momentum, before)

    def test_channels_last_set_by_the_user_is_kept(self, normed, data):
        normed.to(memory_format=torch.channels_last)
        weights_after(data, normed, performance=PerformanceOptions(channels_last=True))
        assert normed.conv2.weight.is_contiguous(memory_format=torch.channels_last)

    def test_channels_last_is_undone_after_an_exception(self, normed, data):
        def stop(image):
            raise KeyboardInterrupt

        with pytest.raises(KeyboardInterrupt):
            weights_after(data, normed, performance=PerformanceOptions(channels_last=True), augmentation=stop)
        assert all(p.is_contiguous() for p in normed.parameters())

    @pytest.mark.parametrize("objective", ["adversarial", "clean"])
    def test_amp_trains_in_bfloat16_and_measures_in_float32(self, normed, data, objective):
        types, other = [], copy.deepcopy(normed)
        normed.conv2.register_forward_hook(lambda m, a, out: types.append((normed.training, out.dtype)))
        trainer = weights_after(data, normed, performance=PerformanceOptions(amp=True), objective=objective)
        assert {dtype for _, dtype in types} == {torch.float32, torch.bfloat16}
        assert {dtype for training, dtype in types if training} == {torch.bfloat16}  # the warm-up's updates
        assert all(p.dtype == torch.float32 for p in normed.parameters())
        validated = []

        def validating(loop, validate):
            types.clear()
            accuracies = validate()
            validated.extend(dtype for _, dtype in types)
            return accuracies

        again = observe(make_trainer(trainer.classifier, performance=PerformanceOptions(amp=True)), validate=validating)
        again.fit(*data, validation_data=data, nb_epochs=1, **QUIET)
        assert set(validated) == {torch.float32}
        reference = weights_after(data, other, objective=objective)
        losses = [[record.loss for record in t.history.epochs] for t in (trainer, reference)]
        np.testing.assert_allclose(*losses, rtol=0.05)
        assert losses[0] != losses[1]

    def test_selection_is_in_float32_under_amp(self, normed, data):
        types = []
        trainer = make_trainer(make_classifier(normed), performance=PerformanceOptions(amp=True))

        def recording(loop, select):
            handle = normed.conv2.register_forward_hook(lambda m, a, out: types.append(out.dtype))
            chosen = select()
            handle.remove()
            return chosen

        observe(trainer, select=recording)
        trainer.fit(*data, nb_epochs=1, **QUIET)
        assert set(types) == {torch.float32}

    def test_compile_runs_attacks_through_the_compiled_network(self, chain, data, monkeypatch):
        compiled = []

        def fake(function, **kwargs):
            compiled.append(0)

            def run(x):
                compiled[0] += 1
                return function(x)

            return run

        monkeypatch.setattr(torch, "compile", fake)
        other = copy.deepcopy(chain)
        selection = SelectionOptions(samples=48)
        trainer = weights_after(data, chain, performance=PerformanceOptions(compile=True), selection=selection)
        plain = weights_after(data, other, selection=selection)
        assert compiled == [3 * 3 * 4 + 2 * 3 * 4]  # epochs × batches × steps, and two selections
        assert [r.loss for r in trainer.history.epochs] == [r.loss for r in plain.history.epochs]

    @pytest.mark.skipif(sys.platform == "win32", reason="needs a C++ compiler")
    def test_compile_for_real(self, data):
        torch.manual_seed(0)
        models = [Chain() for _ in range(2)]
        models[1].load_state_dict(models[0].state_dict())
        trainers = [
            weights_after(data, model, performance=PerformanceOptions(compile=flag))
            for model, flag in zip(models, (False, True), strict=True)
        ]
        np.testing.assert_allclose(*[[r.loss for r in t.history.epochs] for t in trainers], rtol=1e-3)


class TestFiniteGuard:
    def test_checks_every_few_batches_and_restores_the_last_finite_state(self):
        model = nn.Linear(2, 2)
        guard = FiniteGuard(model, every=3)
        seen = []
        for batch in range(1, 9):
            if batch == 6:
                with pytest.raises(FloatingPointError):
                    guard.before_step(torch.tensor(1.0))
                break
            guard.before_step(torch.tensor(1.0))
            with torch.no_grad():
                model.weight.add_(1)
            seen.append(model.weight.detach().clone())
            if batch == 5:
                with torch.no_grad():
                    model.weight[0, 0] = float("nan")
            guard.after_step()
        assert torch.equal(model.weight, seen[2])

    def test_checks_when_told(self):
        model = nn.Linear(2, 2)
        guard = FiniteGuard(model, every=100)
        guard.before_step(torch.tensor(float("nan")))
        with torch.no_grad():
            model.bias.fill_(float("inf"))
        with pytest.raises(FloatingPointError):
            guard.after_step(look=True)
        assert torch.isfinite(model.bias).all()

    def test_no_value_is_fetched_between_two_checks(self, chain, data, monkeypatch):
        """On a GPU every fetch waits: no `.item()`, `.tolist()` or `bool` of a tensor within an epoch."""
        equal, fetched = torch.equal, []
        monkeypatch.setattr(
            torch, "equal", lambda *args: fetched.append("equal") or equal(*args)
        )  # ART reads labels this way
        classifier = make_classifier(chain, preprocessing=(0.1, 0.5))
        trainer = make_trainer(classifier, warmup=1, ratio=0.5)
        fetched.clear()
        originals = {name: getattr(torch.Tensor, name) for name in ("item", "tolist", "__bool__", "__float__", "numpy")}

        def inside(loop, step, *args):
            for name, original in originals.items():
                monkeypatch.setattr(
                    torch.Tensor, name, lambda self, *a, o=original, n=name: fetched.append(n) or o(self, *a)
                )
            return step(*args)

        counts = []
        observe(
            trainer,
            look_every=lambda loop, every: 1000,
            step=inside,
            perturb=lambda loop, perturb, *args: counts.append(len(fetched)) or perturb(*args),
        )
        trainer.fit(*data, batch_size=8, nb_epochs=1, **QUIET)
        assert len(counts) == 6 and counts[-1] == counts[0]  # nothing more than before the epoch


class TestRandomness:
    def test_counters_make_different_streams(self):
        drawn = set()
        for counters in ((3,), (3, 0), (3, 0, 0), (3, 1), (3, 0, 1), (4,)):
            reseed(torch.device("cpu"), *counters)
            drawn.add((torch.rand(1).item(), np.random.rand()))
        assert len(drawn) == 6

    def test_order_differs_between_epochs_and_follows_from_the_seed(self, chain, data):
        orders = []
        for _ in range(2):
            trainer, seen = make_trainer(make_classifier(copy.deepcopy(chain))), []
            observe(
                trainer, perturb=lambda loop, perturb, batch, *args, s=seen: s.append(batch.x) or perturb(batch, *args)
            )
            trainer.fit(*data, batch_size=16, nb_epochs=2, **QUIET)
            orders.append(torch.cat(seen))
        assert torch.equal(*orders) and not torch.equal(orders[0][:48], orders[0][48:])
        assert torch.equal(orders[0][:48].sort(0).values, torch.tensor(data[0]).sort(0).values)

    def test_an_epoch_can_begin_in_the_middle(self, data):
        batches = ArrayBatches(*map(torch.tensor, data), batch_size=10, drop_last=False, device=torch.device("cpu"))
        torch.manual_seed(1)
        whole = [batch.x for batch in batches.epoch(0, Ranks())]
        torch.manual_seed(1)
        rest = [batch.x for batch in batches.epoch(3, Ranks())]
        assert len(whole) == batches.nb_batches == 5 and all(map(torch.equal, whole[3:], rest))
