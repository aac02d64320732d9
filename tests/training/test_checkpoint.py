import copy
import json
import multiprocessing
import os
import pickle
import random
import signal
import sys
import time
from collections import Counter

import numpy as np
import pytest
import torch
from art.attacks.evasion import FastGradientMethod
from conftest import Chain, Normed, make_attack, make_classifier, make_data, observe
from safetensors.torch import load_file
from torch import nn
from torch.optim import lr_scheduler as lr
from torchvision.transforms import v2

from art_clat import AdversarialTrainerCLATPyTorch, LayerOptions, TrainingLoop
from art_clat.training import description
from art_clat.training.history import EpochRecord
from art_clat.training.keeper import Keeper
from art_clat.training.state import pack, unpack
from art_clat.utils import files
from art_clat.utils.files import read, write

QUIET = {"verbose": False}
NB_KILLS = 20


class OtherDropout(Normed):
    def __init__(self):
        super().__init__()
        self.dropout.p = 0.3


class FrozenStem(Normed):
    def __init__(self):
        super().__init__()
        self.conv1.requires_grad_(False)


def two_groups(at):
    def make(parameters):
        parameters = list(parameters)
        return torch.optim.SGD([{"params": parameters[:at]}, {"params": parameters[at:]}], 0.05, momentum=0.9)

    return make


def make_run(
    network=Normed,
    optimizer=None,
    scheduler=None,
    loss=None,
    preprocessing=(0.0, 1.0),
    clip_values=(0.0, 1.0),
    **kwargs,
):
    """A run that draws everything that can be random: order, augmentation, ratio, random start, dropout."""
    torch.manual_seed(7)
    model = network()
    optimizer = (optimizer or (lambda p: torch.optim.SGD(p, 0.05, momentum=0.9, weight_decay=5e-4)))(model.parameters())
    classifier = make_classifier(
        model, optimizer=optimizer, loss=loss, preprocessing=preprocessing, clip_values=clip_values
    )
    attacks = [make_attack(classifier, num_random_init=1), FastGradientMethod(classifier, eps=0.1)]
    settings = {
        "ratio": 0.7, "warmup": 2, "reselect_every": 2, "criticality_weight": 0.1, "budget": 0.4, "seed": 3,
        "augmentation": v2.RandomHorizontalFlip(), "ema_decay": 0.8, "layers": LayerOptions(freeze_norms=False),
        **kwargs,
    }  # fmt: skip
    trainer = AdversarialTrainerCLATPyTorch(classifier, attacks, **settings)
    make_scheduler = scheduler or (lambda o: torch.optim.lr_scheduler.CosineAnnealingLR(o, T_max=8))
    return trainer, make_scheduler(optimizer)


def fit(run, folder=None, nb_epochs=6, data=None, **kwargs):
    trainer, scheduler = run
    settings = {"batch_size": 8, "nb_epochs": nb_epochs, "checkpoint": folder, "checkpoint_every": 2, **QUIET, **kwargs}
    trainer.fit(*(data or make_data()), scheduler=scheduler, **settings)
    return state_of(run)


def state_of(run):
    trainer, scheduler = run
    optimizer = trainer.classifier.optimizer.state_dict()["state"]
    momentum = {
        f"{index}.{key}": torch.as_tensor(value) for index, entry in optimizer.items() for key, value in entry.items()
    }
    return {**trainer.classifier.model.state_dict(), **momentum, "lr": torch.tensor(scheduler.get_last_lr())}


def assert_equal(one, other):
    assert one.keys() == other.keys()
    assert [name for name in one if not torch.equal(one[name], other[name])] == []


def without_seconds(history):
    content = json.loads(history.to_json())
    return [
        {k: v for k, v in entry.items() if k != "seconds"} for entry in [*content["epochs"], *content["selections"]]
    ]


def interrupt(trainer, at):
    """Make the trainer fail in batch `at`."""
    batches = []

    def failing(loop, step, *args):
        batches.append(1)
        if len(batches) == at:
            raise KeyboardInterrupt
        return step(*args)

    observe(trainer, step=failing)


def fit_in_two_goes(network, folder, at):
    """Fit a network, interrupted in batch `at`, and resume with another network."""
    broken = make_run(network)
    interrupt(broken[0], at)
    with pytest.raises(KeyboardInterrupt):
        fit(broken, folder)
    return fit(make_run(network), folder)


class TestResume:
    @pytest.mark.parametrize("at", [1, 5, 7, 13, 20, 29, 36])
    def test_resumed_run_ends_like_one_without_a_break(self, tmp_path, at):
        straight = make_run()
        expected = fit(straight, validation_data=make_data(20))
        broken = make_run()
        interrupt(broken[0], at)
        with pytest.raises(KeyboardInterrupt):
            fit(broken, tmp_path, validation_data=make_data(20))
        np.random.rand(at), torch.rand(at), random.random()  # random numbers drawn in between do not matter
        resumed = make_run()
        assert_equal(fit(resumed, tmp_path, validation_data=make_data(20)), expected)
        assert without_seconds(resumed[0].history) == without_seconds(straight[0].history)

    def test_random_starts_follow_from_the_batch_without_an_augmentation(self, tmp_path):
        """The augmentation seeds the generators image by image, and would hide that the attack does not."""
        expected = fit(make_run(augmentation=None))
        broken = make_run(augmentation=None)
        interrupt(broken[0], 6)
        with pytest.raises(KeyboardInterrupt):
            fit(broken, tmp_path)
        assert_equal(fit(make_run(augmentation=None), tmp_path), expected)

    def test_weights_in_another_memory_format(self, tmp_path):
        def network():
            return Normed().to(memory_format=torch.channels_last)

        assert_equal(fit_in_two_goes(network, tmp_path, 20), fit(make_run(network)))

    def test_a_loss_that_is_a_function(self, tmp_path):
        def loss(logits, y):
            return nn.functional.cross_entropy(logits, y if y.ndim == 1 else y.argmax(dim=1))

        expected = fit(make_run(Chain, loss=loss), nb_epochs=2)
        assert_equal(fit(make_run(Chain, loss=loss), tmp_path, nb_epochs=2), expected)

    def test_does_not_train_twice(self, tmp_path):
        broken = make_run()
        interrupt(broken[0], 20)
        with pytest.raises(KeyboardInterrupt):
            fit(broken, tmp_path)
        resumed, steps = make_run(), []
        observe(resumed[0], step=lambda loop, step, *args: steps.append(1) or step(*args))
        fit(resumed, tmp_path)
        assert len(steps) == 36 - 18  # six batches an epoch, saved after every second

    @pytest.mark.parametrize("scheduler", [None, lambda o: lr.CosineAnnealingWarmRestarts(o, 2, T_mult=2)])
    def test_the_same_objects_can_resume(self, tmp_path, scheduler):
        """As in a notebook: the scheduler has changed the learning rate when `fit` is called again."""
        run = make_run(scheduler=scheduler)
        interrupt(run[0], 29)
        with pytest.raises(KeyboardInterrupt):
            fit(run, tmp_path)
        run[0].loop_class = TrainingLoop
        assert_equal(fit(run, tmp_path), fit(make_run(scheduler=scheduler)))

    def test_a_finished_run_is_loaded_and_the_log_says_so(self, tmp_path, caplog):
        caplog.set_level("INFO", "art_clat.training.loop")
        first = make_run()
        expected = fit(first, tmp_path)
        assert "is finished" not in caplog.text
        again = make_run()
        assert_equal(fit(again, tmp_path), expected)
        assert again[0].history == first[0].history
        assert "The run in the checkpoint is finished; the classifier gets its weights." in caplog.text

    def test_a_seed_that_was_drawn_is_kept(self, tmp_path):
        np.random.seed(1)
        expected = fit(make_run(seed=None))
        np.random.seed(1)
        broken = make_run(seed=None)
        interrupt(broken[0], 9)
        with pytest.raises(KeyboardInterrupt):
            fit(broken, tmp_path)
        np.random.seed(2)
        assert_equal(fit(make_run(seed=None), tmp_path), expected)

    @pytest.mark.parametrize(
        "optimizer",
        [
            lambda p: torch.optim.AdamW(p, 1e-3, amsgrad=True),
            lambda p: torch.optim.RMSprop(p, 1e-3, momentum=0.5, centered=True),
            lambda p: torch.optim.SGD([{"params": list(p), "lr": 0.02}], 0.1, nesterov=True, momentum=0.9),
        ],
    )
    def test_any_optimizer(self, tmp_path, optimizer):
        expected = fit(make_run(optimizer=optimizer))
        broken = make_run(optimizer=optimizer)
        interrupt(broken[0], 23)
        with pytest.raises(KeyboardInterrupt):
            fit(broken, tmp_path)
        assert_equal(fit(make_run(optimizer=optimizer), tmp_path), expected)

    @pytest.mark.parametrize(
        "scheduler",
        [
            lambda o: torch.optim.lr_scheduler.MultiStepLR(o, [2, 4, 4]),
            lambda o: torch.optim.lr_scheduler.OneCycleLR(o, 0.1, total_steps=8),
            lambda o: torch.optim.lr_scheduler.CyclicLR(o, 0.01, 0.1, step_size_up=2),
            lambda o: torch.optim.lr_scheduler.LambdaLR(o, lambda epoch: 0.9**epoch),
            lambda o: torch.optim.lr_scheduler.SequentialLR(
                o,
                [torch.optim.lr_scheduler.LinearLR(o, 0.1), torch.optim.lr_scheduler.ExponentialLR(o, 0.5)],
                [2],
            ),
        ],
    )
    def test_any_scheduler(self, tmp_path, scheduler):
        expected = fit(make_run(scheduler=scheduler))
        broken = make_run(scheduler=scheduler)
        interrupt(broken[0], 23)
        with pytest.raises(KeyboardInterrupt):
            fit(broken, tmp_path)
        assert_equal(fit(make_run(scheduler=scheduler), tmp_path), expected)


def _train(folder, begun):
    """Run in a process of its own, to be killed."""
    torch.set_num_threads(1)
    run = make_run()
    begun.set()
    torch.save(fit(run, folder, nb_epochs=8, checkpoint_every=1), os.path.join(folder, "almost the end"))
    os.replace(os.path.join(folder, "almost the end"), os.path.join(folder, "end"))


def test_killed_at_any_instant(tmp_path):
    """SIGKILL at random instants, every other time while a file is being written."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["art_clat", "pytest", "torchvision.transforms.v2"])
    rng, kills, while_writing, runs = random.Random(0), 0, 0, 0

    def start(folder):
        begun = context.Event()
        process = context.Process(target=_train, args=(str(folder), begun))
        process.start()
        begun.wait(120)
        return process

    (tmp_path / "straight").mkdir()
    start(tmp_path / "straight").join()
    expected = torch.load(tmp_path / "straight" / "end")
    while kills < NB_KILLS:
        folder = tmp_path / str(runs)
        folder.mkdir()
        while not (folder / "end").exists():
            process = start(folder)
            due = time.monotonic() + rng.uniform(0, 0.25)

            def is_writing(folder=folder):
                return any(path.name.endswith(".tmp") for path in folder.iterdir())

            while process.is_alive() and (
                time.monotonic() < due or (kills % 2 and not is_writing() and time.monotonic() < due + 1)
            ):
                pass
            if kills < NB_KILLS and process.is_alive():
                os.kill(process.pid, signal.SIGKILL)
                kills += 1
                while_writing += is_writing()
            process.join()
        assert_equal(torch.load(folder / "end"), expected)
        runs += 1
    assert while_writing


@pytest.mark.parametrize("at", ["written in part", "not renamed yet"])
def test_killed_while_writing(tmp_path, monkeypatch, at):
    fit(make_run(Chain), tmp_path, nb_epochs=2)
    before = (tmp_path / "last.safetensors").read_bytes()

    write_bytes = type(tmp_path).write_bytes

    def half(self, data):
        write_bytes(self, data[: len(data) // 2])
        raise KeyboardInterrupt

    def nothing(self, target):
        raise KeyboardInterrupt

    name, function = ("write_bytes", half) if at == "written in part" else ("replace", nothing)
    monkeypatch.setattr(type(tmp_path), name, function)
    with pytest.raises(KeyboardInterrupt):
        write(tmp_path / "last.safetensors", {"x": torch.zeros(3)}, {})
    monkeypatch.undo()
    assert (tmp_path / "last.safetensors").read_bytes() == before
    (tmp_path / "last.safetensors.1.tmp").write_bytes(b"of a killed process")
    fit(make_run(Chain), tmp_path, nb_epochs=2)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["last.safetensors", "run.lock"]


def test_what_is_written_has_reached_the_disk_before_it_gets_its_name(tmp_path, monkeypatch):
    done = []
    replace, fsync = type(tmp_path).replace, os.fsync
    monkeypatch.setattr(
        os, "fsync", lambda fd: done.append(os.path.basename(os.readlink(f"/proc/self/fd/{fd}"))) or fsync(fd)
    )
    monkeypatch.setattr(type(tmp_path), "replace", lambda self, to: done.append("rename") or replace(self, to))
    if not os.path.isdir("/proc/self/fd"):
        pytest.skip("no /proc")
    write(tmp_path / "last.safetensors", {"x": torch.zeros(3)}, {})
    assert done == [f"last.safetensors.{os.getpid()}.tmp", "rename", tmp_path.name]


class TestBest:
    def fit_up_and_down(self, folder=None, **kwargs):
        """A learning rate that grows until everything is lost."""
        run = make_run(
            scheduler=lambda o: torch.optim.lr_scheduler.ExponentialLR(o, 2.0), ratio=1.0, warmup=99, ema_decay=None
        )
        fit(run, folder, nb_epochs=8, validation_data=make_data(), **kwargs)
        return run[0]

    def test_is_kept_beside_the_last(self, tmp_path):
        trainer = self.fit_up_and_down(tmp_path)
        robust = [record.robust_accuracy for record in trainer.history.epochs]
        assert 0 < robust.index(max(robust)) < 7 and trainer.history.best_epoch == robust.index(max(robust))
        model = Normed()
        model.load_state_dict(load_file(tmp_path / "best.safetensors"))
        assert read(tmp_path / "best.safetensors")[1]["epoch"] == trainer.history.best_epoch
        attack, (x, y) = make_attack(make_classifier(model)), make_data()
        clean = (attack.estimator.predict(x).argmax(1) == y).mean()
        assert clean == trainer.history.epochs[trainer.history.best_epoch].clean_accuracy
        last = trainer.classifier.model.state_dict()
        model.load_state_dict(load_file(tmp_path / "last.safetensors"), strict=False)
        assert_equal(model.state_dict(), last)

    @pytest.mark.parametrize("with_checkpoint", [False, True])
    def test_restore_best_ends_the_run_on_it(self, tmp_path, with_checkpoint):
        straight = self.fit_up_and_down(tmp_path / "straight")
        trainer = self.fit_up_and_down(tmp_path / "best" if with_checkpoint else None, restore_best=True)
        assert_equal(trainer.classifier.model.state_dict(), load_file(tmp_path / "straight" / "best.safetensors"))
        assert without_seconds(trainer.history) == without_seconds(straight.history)
        if with_checkpoint:  # once more, with a run that is finished
            again = self.fit_up_and_down(tmp_path / "best", restore_best=True)
            assert_equal(again.classifier.model.state_dict(), trainer.classifier.model.state_dict())

    def test_is_the_first_of_equals(self, chain):
        keeper = Keeper(chain, keeps_best=True)
        for epoch, accuracy in enumerate((0.1, 0.5, 0.5)):
            chain.first.bias.data.fill_(epoch)
            record = EpochRecord(
                epoch=epoch, stage="clat", loss=1.0, cross_entropy=1.0, criticality_loss=0.0, learning_rate=0.1,
                seconds=1.0, train_clean_accuracy=None, train_robust_accuracy=0.5, clean_accuracy=0.6,
                robust_accuracy=accuracy,
            )  # fmt: skip
            keeper.consider(record)
        keeper.restore_best()
        assert (chain.first.bias == 1).all()

    def test_needs_validation_data(self):
        with pytest.raises(ValueError, match="`restore_best` needs `validation_data`"):
            fit(make_run(), restore_best=True)


class TestOtherRuns:
    @pytest.mark.parametrize(
        ("settings", "match"),
        [
            ({"criticality_weight": 0.2}, r"criticality_weight is 0\.1 there, 0\.2 here"),
            ({"seed": 4}, "seed is 3 there, 4 here"),
            ({"augmentation": None}, "augmentation is RandomHorizontalFlip"),
            ({"network": Chain}, r"conv1\.weight is torch\.float32, \(6, 2, 3, 3\) there, None here.*more"),
            ({"optimizer": lambda p: torch.optim.SGD(p, 0.05, momentum=0.8, weight_decay=5e-4)}, r"momentum is 0\.9"),
            ({"optimizer": lambda p: torch.optim.Adam(p, 0.05)}, "the optimizer is SGD there, Adam here"),
            ({"optimizer": lambda p: torch.optim.SGD(p, 0.06, momentum=0.9, weight_decay=5e-4)}, "'lr': '0.05'"),
            ({"scheduler": lambda o: torch.optim.lr_scheduler.StepLR(o, 1)}, "the scheduler is .*CosineAnnealingLR"),
            (
                {"scheduler": lambda o: torch.optim.lr_scheduler.CosineAnnealingLR(o, T_max=9)},
                "the scheduler is .*'T_max': '8'.* there, .*'T_max': '9'",
            ),
            ({"loss": nn.CrossEntropyLoss(label_smoothing=0.1)}, "the loss is .*'label_smoothing': '0.0'"),
            ({"loss": nn.CrossEntropyLoss(weight=torch.ones(4))}, "the loss is .* there, .*'weight'"),
            ({"network": OtherDropout}, "the architecture is"),
            ({"preprocessing": (0.1, 0.5)}, "the preprocessing is"),
            ({"clip_values": (0.0, 2.0)}, "clip_values is"),
            ({"network": FrozenStem}, r"the frozen parameters is \[\] there, \['conv1.weight'\]"),
        ],
    )
    def test_are_refused_with_the_difference(self, tmp_path, settings, match):
        fit(make_run(), tmp_path, nb_epochs=2)
        files = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
        run = make_run(**settings)
        before = copy.deepcopy(state_of(run))
        with pytest.raises(ValueError, match=f"`checkpoint`.*holds another run.*{match}"):
            fit(run, tmp_path, nb_epochs=2)
        assert_equal(state_of(run), before)
        assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == files

    @pytest.mark.parametrize(
        ("settings", "match"),
        [
            ({"batch_size": 16}, "batch_size is 8 there, 16 here"),
            ({"drop_last": True}, "drop_last"),
            ({"validation_data": make_data(4)}, "validation_data is None there"),
            ({"data": make_data(49)}, "the inputs is"),
            ({"data": (make_data()[0], make_data()[1][::-1].copy())}, "the labels is"),
        ],
    )
    def test_other_data_or_arguments(self, tmp_path, settings, match):
        fit(make_run(), tmp_path, nb_epochs=2)
        with pytest.raises(ValueError, match=match):
            fit(make_run(), tmp_path, **{"nb_epochs": 2, **settings})

    @pytest.mark.parametrize(
        ("one", "other", "match"),
        [
            (
                lambda o: lr.SequentialLR(o, [lr.LinearLR(o), lr.ExponentialLR(o, 0.9)], [1]),
                lambda o: lr.SequentialLR(o, [lr.LinearLR(o), lr.ExponentialLR(o, 0.9)], [7]),
                r"the scheduler is .*'_milestones': '\[1\]'.* there, .*'_milestones': '\[7\]'",
            ),
            (
                lambda o: lr.ChainedScheduler([lr.ExponentialLR(o, 0.5)]),
                lambda o: lr.ChainedScheduler([lr.ExponentialLR(o, 0.9)]),
                "the scheduler is .*'gamma': 0.5.* there, .*'gamma': 0.9",
            ),
        ],
    )
    def test_other_schedulers_within_a_scheduler(self, tmp_path, one, other, match):
        fit(make_run(scheduler=one), tmp_path, nb_epochs=2)
        assert fit(make_run(scheduler=one), tmp_path, nb_epochs=2)
        run = make_run(scheduler=other)
        with pytest.raises(ValueError, match=match):
            fit(run, tmp_path, nb_epochs=2)

    def test_settings_of_an_augmentation_without_a_repr(self, tmp_path):
        class Noise:
            def __init__(self, size):
                self.size = size

            def __call__(self, image):
                return image + self.size * torch.rand_like(image)

        fit(make_run(Chain, augmentation=Noise(0.01)), tmp_path, nb_epochs=1)
        assert fit(make_run(Chain, augmentation=Noise(0.01)), tmp_path, nb_epochs=1)
        with pytest.raises(ValueError, match="augmentation is .*'size': '0.01'.* there, .*'size': '0.2'"):
            fit(make_run(Chain, augmentation=Noise(0.2)), tmp_path, nb_epochs=1)

    @pytest.mark.parametrize(
        ("groups", "match"),
        [
            (lambda p: [{"params": p[:1], "momentum": 0.95}, {"params": p[1:]}], "group 1 is .*'momentum': '0.5'"),
            (lambda p: [{"params": p[:1], "momentum": 0.5}, {"params": p[:0:-1]}], "group 2 is .*'in the order'"),
        ],
    )
    def test_other_settings_or_order_within_a_group(self, tmp_path, groups, match):
        def sgd(make):
            return lambda parameters: torch.optim.SGD(make(list(parameters)), 0.05, momentum=0.9)

        def first(p):
            return [{"params": p[:1], "momentum": 0.5}, {"params": p[1:]}]

        fit(make_run(optimizer=sgd(first)), tmp_path, nb_epochs=2)
        with pytest.raises(ValueError, match=match):
            fit(make_run(optimizer=sgd(groups)), tmp_path, nb_epochs=2)

    def test_loss_with_parameters_is_refused(self, tmp_path):
        class Scaled(nn.CrossEntropyLoss):
            def __init__(self):
                super().__init__()
                self.temperature = nn.Parameter(torch.ones(()))

        with pytest.raises(ValueError, match=r"`classifier.loss` has parameters \(temperature\)"):
            fit(make_run(Chain, loss=Scaled()), tmp_path)
        assert not list(tmp_path.iterdir())
        fit(make_run(Chain, loss=Scaled()), nb_epochs=1)

    def test_other_groups_of_parameters(self, tmp_path):
        fit(make_run(optimizer=two_groups(2)), tmp_path, nb_epochs=2)
        with pytest.raises(ValueError, match="optimizer group 1 is .*'parameters': 2.* there, .*'parameters': 3"):
            fit(make_run(optimizer=two_groups(3)), tmp_path, nb_epochs=2)

    def test_another_decay_which_art_keeps_in_the_attack_that_it_wraps(self):
        classifier = make_classifier(Chain())
        attacks = [make_attack(classifier, decay=decay) for decay in (0.5, 0.9)]
        facts = [description.describe(classifier, None, [attack]) for attack in attacks]
        assert facts[0] != facts[1]

    def test_addresses_of_objects_are_no_difference(self):
        class Activated(Chain):
            def __init__(self):
                super().__init__()
                self.activation = lambda x: x

            def extra_repr(self):
                return repr(self.activation)

        models = [Activated(), Activated()]
        assert repr(models[0]) != repr(models[1])
        facts = [description.describe(make_classifier(model), None, []) for model in models]
        assert facts[0] == facts[1]

    def test_best_epoch_of_another_run(self, tmp_path):
        for name, seed in (("here", 3), ("there", 4)):
            fit(make_run(Chain, seed=seed), tmp_path / name, nb_epochs=1, validation_data=make_data(8))
        (tmp_path / "there" / "best.safetensors").replace(tmp_path / "here" / "best.safetensors")
        with pytest.raises(ValueError, match="holds another run: seed is 4 there, 3 here"):
            fit(make_run(Chain), tmp_path / "here", nb_epochs=1, validation_data=make_data(8))

    def test_the_device_is_no_difference(self):
        """ART's preprocessing has it in its `repr`, and every process has another one."""
        facts = []
        for device in ("cuda:0", "cuda:1"):
            (trainer, scheduler) = make_run(preprocessing=(0.1, 0.5))
            trainer.classifier.preprocessing_operations[0]._device = torch.device(device)
            facts.append(description.describe(trainer.classifier, scheduler, []))
        assert facts[0] == facts[1]

    def test_another_attack(self, tmp_path):
        fit(make_run(), tmp_path, nb_epochs=2)
        run = make_run()
        run[0].attacks[0].set_params(eps=0.2)
        with pytest.raises(ValueError, match=r"attack 1 is .*'eps': '0\.1'.* there, .*'eps': '0\.2'"):
            fit(run, tmp_path, nb_epochs=2)


class TestBadFiles:
    @pytest.fixture
    def folder(self, tmp_path):
        fit(make_run(Chain), tmp_path, nb_epochs=1)
        return tmp_path

    def test_truncated_at_any_length(self, folder):
        path = folder / "last.safetensors"
        whole = path.read_bytes()
        for length in range(len(whole)):
            path.write_bytes(whole[:length])
            with pytest.raises(ValueError, match=r"`checkpoint`: .*last\.safetensors cannot be read"):
                read(path)
        assert path.read_bytes() == whole[:-1]

    def test_any_byte_damaged(self, folder):
        path = folder / "last.safetensors"
        whole = path.read_bytes()
        for place in range(len(whole)):
            path.write_bytes(whole[:place] + bytes([whole[place] ^ 0xFF]) + whole[place + 1 :])
            with pytest.raises(ValueError, match=r"`checkpoint`: .*last\.safetensors cannot be read"):
                read(path)

    def test_fit_refuses_them_and_leaves_them(self, folder):
        path = folder / "last.safetensors"
        path.write_bytes(path.read_bytes()[:-1])
        damaged = path.read_bytes()
        run = make_run(Chain)
        before = copy.deepcopy(state_of(run))
        with pytest.raises(ValueError, match="cannot be read"):
            fit(run, folder, nb_epochs=1)
        assert path.read_bytes() == damaged
        assert_equal(state_of(run), before)

    def test_newer_format(self, folder, monkeypatch):
        monkeypatch.setattr(files, "FORMAT", files.FORMAT + 1)
        write(folder / "last.safetensors", {"x": torch.zeros(3)}, {})
        monkeypatch.undo()
        with pytest.raises(ValueError, match="its format is 2, newer than 1"):
            fit(make_run(Chain), folder, nb_epochs=1)

    def test_runs_of_older_versions_are_refused_as_such(self, folder):
        tensors, content = read(folder / "last.safetensors")
        del content["layout"]
        write(folder / "last.safetensors", tensors, content)
        with pytest.raises(ValueError, match="written by another version of art_clat"):
            fit(make_run(Chain), folder, nb_epochs=1)

    def test_hostile_files_are_never_executed(self, tmp_path):
        target = tmp_path / "executed"

        class Hostile:
            def __reduce__(self):
                return os.mkdir, (str(target),)

        pickle.loads(pickle.dumps(Hostile()))  # it runs code when it is loaded
        target.rmdir()
        for dump in (pickle.dumps, lambda x: _saved_by_torch(x, tmp_path)):
            (tmp_path / "last.safetensors").write_bytes(dump(Hostile()))
            with pytest.raises(ValueError, match="cannot be read"):
                fit(make_run(Chain), tmp_path)
        assert not target.exists()

    @pytest.mark.parametrize("content", [{}, {"description": 3}, [], {"description": {}}])
    def test_files_with_a_checksum_that_hold_something_else(self, tmp_path, content):
        write(tmp_path / "last.safetensors", {"x": torch.zeros(3)}, content)
        with pytest.raises(ValueError, match="`checkpoint`"):
            fit(make_run(Chain), tmp_path)

    def test_a_run_with_a_weight_missing_changes_nothing(self, tmp_path):
        fit(make_run(Chain), tmp_path, nb_epochs=1)
        tensors, content = read(tmp_path / "last.safetensors")
        del tensors["head.bias"]
        write(tmp_path / "last.safetensors", tensors, content)
        run = make_run(Chain)
        before = copy.deepcopy(state_of(run))
        with pytest.raises(ValueError, match="does not hold a run: KeyError"):
            fit(run, tmp_path, nb_epochs=1)
        assert_equal(state_of(run), before)

    def test_json_that_is_nested_without_end(self, tmp_path, monkeypatch):
        monkeypatch.setattr(files.json, "dumps", lambda content: "[" * 100_000)
        write(tmp_path / "last.safetensors", {"x": torch.zeros(3)}, {})
        monkeypatch.undo()
        with pytest.raises(ValueError, match="cannot be read"):
            read(tmp_path / "last.safetensors")

    def test_folder_that_cannot_be_written_to(self, tmp_path):
        (tmp_path / "file").write_text("mine")
        run = make_run(Chain)
        before = copy.deepcopy(state_of(run))
        with pytest.raises(OSError, match="`checkpoint`: cannot write to"):
            fit(run, tmp_path / "file")
        with pytest.raises(OSError, match="`checkpoint`: cannot write to"):
            fit(run, tmp_path / "file" / "below")
        assert_equal(state_of(run), before)
        assert (tmp_path / "file").read_text() == "mine"

    def test_folder_with_a_run_that_cannot_be_written_to_any_more(self, folder, monkeypatch):
        def refuse(self, *args, **kwargs):
            raise PermissionError("read-only file system")

        run = make_run(Chain)
        before = copy.deepcopy(state_of(run))
        monkeypatch.setattr(type(folder), "touch", refuse)
        with pytest.raises(OSError, match="`checkpoint`: cannot write to .*read-only"):
            fit(run, folder, nb_epochs=1)
        assert_equal(state_of(run), before)

    @pytest.mark.parametrize("path", ["", 3, True])
    def test_values_that_are_no_path(self, path):
        with pytest.raises(ValueError, match="`checkpoint` must be the path of a folder"):
            fit(make_run(Chain), path)

    def test_numpys_numbers_are_numbers(self, tmp_path):
        run = make_run(Chain, seed=np.int64(3), warmup=np.int64(1))
        fit(run, tmp_path, nb_epochs=np.int64(2), batch_size=np.int64(8), checkpoint_every=np.int32(2))
        assert_equal(fit(make_run(Chain, warmup=1), tmp_path, nb_epochs=2), state_of(run))

    @pytest.mark.parametrize("content", [{}, {"description": 3}, []])
    def test_best_file_that_holds_something_else(self, folder, content):
        write(folder / "best.safetensors", {"x": torch.zeros(3)}, content)
        with pytest.raises(ValueError, match=r"best\.safetensors does not hold the best epoch"):
            fit(make_run(Chain), folder, nb_epochs=1)

    @pytest.mark.skipif(sys.platform == "win32" or os.geteuid() == 0, reason="root may write anywhere")
    def test_folder_without_permission(self, tmp_path):
        tmp_path.chmod(0o500)
        with pytest.raises(OSError, match="`checkpoint`: cannot write to"):
            fit(make_run(Chain), tmp_path)

    def test_state_that_would_need_pickle(self, tmp_path):
        class Odd(torch.optim.lr_scheduler.StepLR):
            def state_dict(self):
                return {**super().state_dict(), "thing": object()}

        run = make_run(Chain, scheduler=lambda o: Odd(o, 1))
        before = copy.deepcopy(state_of(run))
        with pytest.raises(TypeError, match=r"scheduler\.thing is a object, which cannot be saved without pickle"):
            fit(run, tmp_path)
        assert_equal(state_of(run), before)

    def test_interval(self):
        with pytest.raises(ValueError, match="`checkpoint_every`"):
            fit(make_run(), checkpoint_every=0)


def _saved_by_torch(thing, folder):
    torch.save(thing, folder / "x.pt")
    return (folder / "x.pt").read_bytes()


def test_every_kind_of_tensor_comes_back(tmp_path):
    kinds = (torch.float32, torch.bfloat16, torch.float64, torch.int64, torch.bool, torch.uint8)
    tensors = {str(kind): torch.tensor([[0, 1], [1, 2]], dtype=kind) for kind in kinds}
    tensors |= {"scalar": torch.tensor(2.5), "empty": torch.zeros(0, 3)}
    content = {"numbers": [0.1, 1e-300, float("inf"), -0.0, 2**62], "text": "ε"}
    write(tmp_path / "x", tensors, content)
    back, text = read(tmp_path / "x")
    assert_equal(back, tensors)
    assert all(back[name].dtype == tensors[name].dtype for name in tensors) and text == content


def test_state_comes_back_with_the_types_it_had():
    state = {"betas": (0.9, 0.999), 3: [1, (2,)], "steps": Counter({4: 2}), "buffer": torch.ones(2), "none": None}
    tensors = {}
    back = unpack(json.loads(json.dumps(pack(state, tensors, "state"))), tensors)
    assert torch.equal(back.pop("buffer"), state.pop("buffer"))
    assert back == state and isinstance(back["betas"], tuple) and isinstance(back[3][1], tuple)
    assert isinstance(back["steps"], Counter)


def test_shared_weights_are_saved_once(tmp_path):
    class Tied(Chain):
        def __init__(self):
            super().__init__()
            self.again = self.first

    assert_equal(fit_in_two_goes(Tied, tmp_path, 15), fit(make_run(Tied)))
