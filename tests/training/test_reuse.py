"""Attacks that go on from the last epoch's perturbations."""

import itertools
import logging
import multiprocessing
import os
import shutil
import signal
from pathlib import Path

import numpy as np
import pytest
import torch
from art.attacks.evasion import FastGradientMethod, ProjectedGradientDescent
from art.data_generators import NumpyDataGenerator
from conftest import Chain, make_attack, make_classifier, make_data, observe
from test_checkpoint import assert_equal, fit, interrupt, make_run, without_seconds
from torchvision.transforms import v2

from art_clat import AdversarialTrainerCLATPyTorch, CropAndFlip, LayerOptions, ReuseOptions
from art_clat.training import perturbations, strength
from art_clat.training.checkpoint import Checkpoint
from art_clat.training.history import History
from art_clat.training.perturbations import PerturbationFiles

QUIET = {"verbose": False}
EPS = 0.1

START = multiprocessing.get_context("forkserver")
START.set_forkserver_preload(["art_clat", "pytest", "torchvision.transforms.v2"])


@pytest.fixture(autouse=True)
def _one_thread():
    """As in the processes that are killed: sums in another order round differently."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def make_trainer(classifier, attack=None, **kwargs):
    settings = {"seed": 0, "layers": LayerOptions(freeze_norms=False), "reuse_perturbations": 1, **kwargs}
    return AdversarialTrainerCLATPyTorch(classifier, attack or make_attack(classifier, num_random_init=1), **settings)


def watch(trainer):
    """Return what a fit's attacks get and find: batches, perturbed inputs, and the network's weights at that time."""
    seen = []

    def perturb(loop, perturb, batch, number):
        weights = {name: value.clone() for name, value in loop.model.state_dict().items()}
        x_adv = perturb(batch, number)
        seen.append((loop.progress.epoch, batch, x_adv, weights, loop.stage))
        return x_adv

    observe(trainer, perturb=perturb)
    return seen


def project(delta, norm, eps):
    if norm == np.inf:
        return torch.minimum(torch.maximum(delta, -eps), eps)
    lengths = torch.linalg.vector_norm(delta.flatten(1), ord=norm, dim=1).view(-1, 1, 1, 1)
    return torch.where(lengths > eps, delta * eps / lengths, delta)


def direction(gradient, norm):
    if norm == np.inf:
        return gradient.sign()
    if norm == 2:
        return gradient / torch.linalg.vector_norm(gradient.flatten(1), dim=1).view(-1, 1, 1, 1)
    flat = gradient.flatten(1)
    largest = flat.abs().argmax(1, keepdim=True)
    return torch.zeros_like(flat).scatter(1, largest, flat.gather(1, largest).sign()).view_as(gradient)


def climb(loss, x, delta, *, norm, eps, step, steps):
    """Make steps as the option describes them, in plain torch."""
    z = (x + project(delta, norm, eps)).clamp(0, 1)
    for _ in range(steps):
        z = z.detach().requires_grad_(True)
        (gradient,) = torch.autograd.grad(loss(z), z)
        z = x + project((z + step * direction(gradient, norm)).clamp(0, 1) - x, norm, eps)
    return z.detach()


@pytest.mark.parametrize("objective", ["adversarial", "clean", "relative", "pgd_at", "trades", "mart"])
@pytest.mark.parametrize("augmentation", [None, CropAndFlip(2)])
def test_what_an_epoch_finds_begins_where_the_last_one_ended(chain, data, objective, augmentation):
    trainer = make_trainer(
        make_classifier(chain), objective=objective, selection=["second"], augmentation=augmentation, warmup=1
    )
    seen = watch(trainer)
    trainer.fit(*data, batch_size=20, nb_epochs=4, **QUIET)
    eps, kept = torch.tensor(EPS), {}
    for epoch, batch, x_adv, weights, _ in seen:
        model = Chain().requires_grad_(False)
        model.load_state_dict(weights)
        moves = None if augmentation is None else augmentation.moves(batch.index, 6, 6, 0, epoch)
        if epoch >= 2:
            codes = torch.stack([kept[int(i)] for i in batch.index])
            delta = (codes if moves is None else moves.apply(codes)) * (EPS / 127)

            def loss(z, model=model, batch=batch):
                if objective == "clean":
                    one, other = (model.features(images)["second"].flatten(1) for images in (z, batch.x))
                    return (one - other).norm(dim=1).sum()
                if objective == "trades":
                    log_p, log_q = (model(images).log_softmax(1) for images in (batch.x, z))
                    return (log_p.exp() * (log_p - log_q)).sum()
                return torch.nn.functional.cross_entropy(model(z), batch.y, reduction="sum")

            expected = climb(loss, batch.x, delta, norm=np.inf, eps=eps, step=EPS / 2, steps=1)
            assert (x_adv - expected).abs().max() < 1e-6
        if epoch >= 1:
            code = ((x_adv - batch.x) / EPS * 127).round()
            if moves is not None:
                before = torch.stack([kept.get(int(i), torch.zeros(2, 6, 6)) for i in batch.index])
                code = moves.undo(code, before)
            kept |= {int(i): one for i, one in zip(batch.index, code, strict=True)}


@pytest.mark.parametrize(("norm", "eps"), [(2, 0.5), (1, 2.0)])
def test_other_norms(chain, data, norm, eps):
    classifier = make_classifier(chain)
    attack = make_attack(classifier, norm=norm, eps=eps, eps_step=eps / 3, num_random_init=1)
    trainer = make_trainer(classifier, attack, reuse_perturbations=ReuseOptions(2, step_size=eps / 5))
    seen = watch(trainer)
    trainer.fit(*data, batch_size=48, nb_epochs=3, **QUIET)
    (_, first, found, *_), (_, batch, x_adv, weights, _), _ = seen
    shares = dict(zip(first.index.tolist(), ((found - first.x) / eps).half().float() * eps, strict=True))
    model = Chain().requires_grad_(False)
    model.load_state_dict(weights)
    delta = torch.stack([shares[int(i)] for i in batch.index])
    expected = climb(
        lambda z: torch.nn.functional.cross_entropy(model(z), batch.y, reduction="sum"),
        batch.x, delta, norm=norm, eps=torch.tensor(eps), step=eps / 5, steps=2,
    )  # fmt: skip
    assert (x_adv - expected).abs().max() < 1e-5
    assert torch.linalg.vector_norm((x_adv - batch.x).flatten(1), ord=norm, dim=1).max() < eps * 1.0001


def test_an_eps_of_each_element_is_a_mask(chain, data):
    eps = np.full((2, 6, 6), EPS, np.float32)
    eps[0, :3] = 0
    eps[1] *= 0.5
    classifier = make_classifier(chain)
    trainer = make_trainer(
        classifier, make_attack(classifier, eps=eps, eps_step=np.full_like(eps, 0.03), num_random_init=1)
    )
    seen = watch(trainer)
    trainer.fit(*data, batch_size=16, nb_epochs=3, **QUIET)
    for _, batch, x_adv, *_ in seen:
        delta = x_adv - batch.x
        assert torch.isfinite(delta).all() and (delta.abs() <= torch.from_numpy(eps) * 1.0001).all()
        assert (delta[:, 0, :3] == 0).all() and (delta[:, 1].abs() > 0.04).any()


@pytest.mark.parametrize("augmentation", [None, CropAndFlip(1)])
def test_first_stage_and_first_visits_run_the_full_attack(chain, data, augmentation):
    state, found = chain.state_dict(), []
    for reuse in (None, 1, "auto"):
        model = Chain()
        model.load_state_dict(state)
        trainer = make_trainer(make_classifier(model), warmup=2, reuse_perturbations=reuse, augmentation=augmentation)
        seen = watch(trainer)
        trainer.fit(*data, batch_size=16, nb_epochs=4, **QUIET)
        found.append([x_adv for _, _, x_adv, *_ in seen])
    full, reused, auto = found
    assert all(torch.equal(*pair) for pair in zip(full[:9], reused[:9], strict=True))
    assert not torch.equal(full[9], reused[9])
    assert all(torch.equal(*pair) for pair in zip(reused, auto, strict=True))


@pytest.mark.parametrize(("ratio", "drop_last"), [(0.5, False), (1.0, True)])
def test_images_that_an_epoch_does_not_visit_keep_their_perturbation(chain, data, ratio, drop_last, tmp_path):
    trainer = make_trainer(make_classifier(chain), ratio=ratio)
    kept = []

    def end_epoch(loop, end_epoch):
        end_epoch()
        kept.append((loop.meter.reuse.kept.stamps.clone(), loop.meter.reuse.kept.shares.clone()))

    seen = watch(observe(trainer, end_epoch=end_epoch))
    trainer.fit(*data, batch_size=20, nb_epochs=4, drop_last=drop_last, checkpoint=tmp_path, **QUIET)
    waited = 0
    for epoch, (before, after) in enumerate(itertools.pairwise(kept), start=1):
        visited = torch.zeros(48, dtype=torch.bool)
        for _, batch, x_adv, *_ in (one for one in seen if one[0] == epoch):
            visited[batch.index[(x_adv != batch.x).flatten(1).any(1)]] = True
        assert 0 < visited.sum() < 48
        assert torch.equal(before[0][~visited], after[0][~visited]) and (after[0][visited] > before[0][visited]).all()
        assert torch.equal(before[1][~visited], after[1][~visited])
        waited += int((before[0][~visited] > 0).sum())
    assert waited


def test_a_batch_of_new_and_known_images(chain, data):
    """Known images go on from their perturbation, new ones get the full attack."""
    trainer = make_trainer(make_classifier(chain), ratio=0.5)
    seen, kept, numbers = watch(trainer), {}, {True: 0, False: 0}
    trainer.fit(*data, batch_size=16, nb_epochs=4, **QUIET)
    for _, batch, x_adv, weights, _ in seen:
        model = Chain().requires_grad_(False)
        model.load_state_dict(weights)
        perturbed = torch.nonzero((x_adv != batch.x).flatten(1).any(1))[:, 0]
        assert len(perturbed) == 8
        codes = torch.stack([kept.get(int(i), torch.zeros(2, 6, 6)) for i in batch.index])
        expected = climb(
            lambda z, model=model, batch=batch: torch.nn.functional.cross_entropy(model(z), batch.y, reduction="sum"),
            batch.x, codes * (EPS / 127), norm=np.inf, eps=torch.tensor(EPS), step=EPS / 2, steps=1,
        )  # fmt: skip
        same = (x_adv - expected).abs().flatten(1).amax(1) < 1e-6
        for place in perturbed.tolist():
            is_known = int(batch.index[place]) in kept
            assert same[place] == is_known
            numbers[is_known] += 1
        found = ((x_adv - batch.x) / EPS * 127).round()
        kept |= {int(batch.index[place]): found[place] for place in perturbed.tolist()}
    assert min(numbers.values()) > 20


CASES = {
    "plain": {"augmentation": None},
    "moved": {"augmentation": CropAndFlip(1)},
    "to the letter": {"augmentation": CropAndFlip(2), "objective": "clean", "ratio": 1.0},
    "two steps": {"augmentation": None, "reuse_perturbations": ReuseOptions(2, step_size=0.02)},
}


def make_reusing(**kwargs):
    """Two attacks of the same ball take turns, on a share of each batch."""
    trainer, scheduler = make_run(**{"reuse_perturbations": 1, "augmentation": None, **kwargs})
    trainer.attacks = [
        make_attack(trainer.classifier, num_random_init=1),
        FastGradientMethod(trainer.classifier, eps=0.1),
    ]
    return trainer, scheduler


@pytest.mark.parametrize("case", CASES)
def test_resumed_run_ends_like_one_without_a_break(tmp_path, case):
    straight = make_reusing(**CASES[case])
    expected = fit(straight)
    for at in (13, 15, 20, 25, 26, 31, 36):
        broken = make_reusing(**CASES[case])
        interrupt(broken[0], at)
        with pytest.raises(KeyboardInterrupt):
            fit(broken, tmp_path / str(at))
        resumed = make_reusing(**CASES[case])
        assert_equal(fit(resumed, tmp_path / str(at)), expected)
        assert without_seconds(resumed[0].history) == without_seconds(straight[0].history)
        strengths = [trainer.history.strengths for trainer in (resumed[0], straight[0])]
        assert strengths[0] == strengths[1] and len(strengths[0]) == 1


@pytest.mark.parametrize("case", ["plain", "moved"])
def test_an_epoch_at_a_time(case):
    """Perturbations outlive the call of `fit` that found them."""
    straight, parts = make_reusing(**CASES[case]), make_reusing(**CASES[case])
    expected = fit(straight)
    for nb_epochs in range(1, 7):
        found = fit(parts, nb_epochs=nb_epochs, resume=True)
    assert_equal(found, expected)
    assert parts[0].history.strengths == straight[0].history.strengths


def _die(number):
    """Return a function that kills the process when it is called for the n-th time."""
    calls = itertools.count(1)

    def kill():
        if next(calls) == number:
            os.kill(os.getpid(), signal.SIGKILL)

    return kill


def _train_until(folder, place, number):
    """Run in a process of its own, which kills itself at a place in the code."""
    torch.set_num_threads(1)
    kill = _die(number)

    def before(owner, name):
        original = getattr(owner, name)

        def run(*args, **kwargs):
            kill()
            return original(*args, **kwargs)

        setattr(owner, name, run)

    run = make_reusing(**CASES["moved"])
    if place == "in the middle of a batch":
        observe(run[0], step=lambda loop, step, *args: kill() or step(*args))
    elif place == "within the flush":
        original = perturbations._File.stamps

        def stamps(self):
            mapped = original(self)
            kill()
            return mapped

        perturbations._File.stamps = stamps
    elif place == "between flush and checkpoint":
        before(Checkpoint, "save")
    else:
        before(PerturbationFiles, "save")
    torch.save(fit(run, folder, checkpoint_every=1), Path(folder) / "end")


@pytest.mark.parametrize(
    ("place", "number"),
    [
        ("in the middle of a batch", 21),
        ("within the flush", 4),
        ("within the flush", 9),
        ("between flush and checkpoint", 17),
        ("between flush and checkpoint", 20),
        ("between checkpoint and the next flush", 3),
        ("between checkpoint and the next flush", 8),
    ],
)
def test_killed(tmp_path, place, number):
    process = START.Process(target=_train_until, args=(str(tmp_path), place, number))
    process.start()
    process.join(120)
    assert process.exitcode == -signal.SIGKILL
    resumed = fit(make_reusing(**CASES["moved"]), tmp_path, checkpoint_every=1)
    assert_equal(resumed, fit(make_reusing(**CASES["moved"])))


def in_bytes(folder):
    return {path.name: path.read_bytes() for path in Path(folder).iterdir() if path.name != "run.lock"}


def spoil(name):
    def remove(folder):
        (folder / name).unlink()

    def cut(folder):
        path = folder / name
        path.write_bytes(path.read_bytes()[:-1])

    def other(folder):
        other = folder.parent / "other"
        x, y = make_data()
        run = make_reusing(**CASES["moved"])
        fit(run, other, nb_epochs=4, data=(x[::-1].copy(), y[::-1].copy()))
        shutil.copy(other / name, folder / name)

    return {"is missing": remove, "bytes instead of": cut, "is of another run": other}


@pytest.mark.parametrize("why", ["is missing", "bytes instead of", "is of another run", "is of another time"])
def test_a_file_that_does_not_belong_to_the_run_is_named(tmp_path, why):
    folder = tmp_path / "run"
    broken = make_reusing(**CASES["moved"])
    interrupt(broken[0], 30)  # epoch 4, batch 5
    with pytest.raises(KeyboardInterrupt):
        fit(broken, folder)
    if why == "is of another time":
        for name in ("perturbations-0.bin", "perturbations-1.bin"):
            shutil.copy(folder / name, tmp_path)
        longer = make_reusing(**CASES["moved"])
        interrupt(longer[0], 4)  # after the checkpoint of epoch 5, batch 0
        with pytest.raises(KeyboardInterrupt):
            fit(longer, folder)
        for name in ("perturbations-0.bin", "perturbations-1.bin"):
            shutil.copy(tmp_path / name, folder)
    else:
        spoil("perturbations-1.bin")[why](folder)
    before = in_bytes(folder)
    with pytest.raises(ValueError, match=rf"`checkpoint`: .*perturbations-\d.bin, .* {why}"):
        fit(make_reusing(**CASES["moved"]), folder)
    assert in_bytes(folder) == before


def _hold(folder, begun):
    run = make_reusing()
    observe(run[0], step=lambda loop, step, *args: begun.set() or signal.pause())
    fit(run, folder)


def test_a_folder_is_for_one_run_at_a_time(tmp_path):
    inner = []

    def step(loop, step, *args):
        if not inner:
            inner.append(True)
            with pytest.raises(ValueError, match=f"`checkpoint`: another run is writing to {tmp_path}"):
                fit(make_reusing(), tmp_path)
            raise KeyboardInterrupt
        return step(*args)

    run = make_reusing()
    observe(run[0], step=step)
    with pytest.raises(KeyboardInterrupt):
        fit(run, tmp_path)
    begun = START.Event()
    process = START.Process(target=_hold, args=(str(tmp_path), begun))
    process.start()
    assert begun.wait(60)
    with pytest.raises(ValueError, match="another run is writing"):
        fit(make_reusing(), tmp_path)
    os.kill(process.pid, signal.SIGKILL)
    process.join()
    assert_equal(fit(make_reusing(), tmp_path), fit(make_reusing()))


class ThroughGenerate(ProjectedGradientDescent):
    """An attack from elsewhere, which may do anything."""


@pytest.mark.parametrize(
    ("why", "attacks", "kwargs"),
    [
        ("RandomHorizontalFlip, does not say where a pixel went", [{}], {"augmentation": v2.RandomHorizontalFlip()}),
        ("ThroughGenerate is a subclass from elsewhere", [{"class": ThroughGenerate}], {}),
        ("ProjectedGradientDescent has `random_eps=True`", [{"random_eps": True}], {}),
        ("the attacks have different balls", [{}, {"eps": 0.2}], {}),
        ("the attacks have different balls", [{}, {"norm": 2}], {}),
        ("bytes, more than the memory that is free", [{}], {}),
    ],
)
def test_what_cannot_be_reused(chain, data, caplog, monkeypatch, why, attacks, kwargs):
    if "memory" in why:
        monkeypatch.setattr(perturbations, "available_memory", lambda: 100)
    classifier = make_classifier(chain)

    def make(**settings):
        cls = settings.pop("class", ProjectedGradientDescent)
        return cls(classifier, **{"eps": EPS, "eps_step": 0.03, "max_iter": 3, "verbose": False, **settings})

    made = [make(**attack) for attack in attacks]
    with pytest.raises(ValueError, match=f"`reuse_perturbations`: .*{why}"):
        make_trainer(classifier, made, **kwargs).fit(*data, nb_epochs=1, **QUIET)
    with caplog.at_level(logging.INFO, logger="art_clat.training.reuse"):
        make_trainer(classifier, made, reuse_perturbations="auto", **kwargs).fit(*data, nb_epochs=2, **QUIET)
    (record,) = (record for record in caplog.records if record.name == "art_clat.training.reuse")
    assert why in record.getMessage() and "full attack" in record.getMessage()


def test_generators_and_attacks_of_one_step(chain, data, caplog):
    classifier = make_classifier(chain)
    with pytest.raises(ValueError, match="`reuse_perturbations`: .* the batches of a generator do not say which"):
        make_trainer(classifier).fit_generator(NumpyDataGenerator(*data, batch_size=16), nb_epochs=1, **QUIET)
    with caplog.at_level(logging.INFO, logger="art_clat.training.reuse"):
        trainer = make_trainer(classifier, reuse_perturbations="auto")
        trainer.fit_generator(NumpyDataGenerator(*data, batch_size=16), nb_epochs=1, **QUIET)
        one_step = FastGradientMethod(classifier, eps=EPS)
        make_trainer(classifier, one_step, reuse_perturbations="auto").fit(*data, nb_epochs=1, **QUIET)
    messages = [record.getMessage() for record in caplog.records]
    assert "generator" in messages[0] and "has 1 steps, no more than a reused one" in messages[1] and len(messages) == 2


def test_nothing_is_kept_without_a_second_stage(chain, data, tmp_path):
    trainer = make_trainer(make_classifier(chain), warmup=1)
    trainer.fit(*data, nb_epochs=1, checkpoint=tmp_path, **QUIET)
    assert not list(tmp_path.glob("perturbations*")) and trainer.history.strengths == []


def test_a_disk_that_is_too_small_is_named(chain, data, tmp_path, monkeypatch):
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=1000))
    before = {name: value.clone() for name, value in chain.state_dict().items()}
    with pytest.raises(OSError, match=r"`checkpoint`: the perturbations take 8,704 bytes .* and 1,000 are free"):
        make_trainer(make_classifier(chain)).fit(*data, nb_epochs=1, checkpoint=tmp_path, **QUIET)
    assert_equal(chain.state_dict(), before)


@pytest.mark.parametrize("value", [0, -1, True, 1.5])
def test_steps_that_are_none_are_refused(chain, value):
    with pytest.raises(ValueError, match="`reuse_perturbations` must be a whole number of at least 1"):
        make_trainer(make_classifier(chain), reuse_perturbations=value)


def test_other_options_are_refused(chain):
    with pytest.raises(ValueError, match="`reuse_perturbations` must be one of 'auto', got 'always'"):
        make_trainer(make_classifier(chain), reuse_perturbations="always")
    for size in (0, -0.1, float("inf"), float("nan"), "a"):
        with pytest.raises(ValueError, match="`step_size` must be a number above 0, or None"):
            ReuseOptions(step_size=size)


class TestStrength:
    def test_equals_one_that_is_computed_independently(self, chain):
        """All weights stand still, so the loss of every attack is known from the outside."""
        data = make_data(900)
        classifier = make_classifier(chain, lr=1e-12)
        trainer = make_trainer(classifier, reuse_perturbations=3)
        stored = []

        def begin_epoch(loop, end_epoch):
            end_epoch()
            stored.append((loop.meter.reuse.kept.shares.clone(), loop.meter.images))

        observe(trainer, end_epoch=begin_epoch)
        trainer.fit(*data, batch_size=100, nb_epochs=13, **QUIET)
        history = trainer.history
        assert [(record.epoch, record.images) for record in history.strengths] == [(1, 18), (11, 18)]
        for record in history.strengths:
            shares, images = stored[record.epoch - 1]
            attack = dict(norm=np.inf, eps=torch.tensor(EPS))

            def loss(z, images=images):
                return torch.nn.functional.cross_entropy(chain(z), images.y, reduction="sum")

            reached = climb(loss, images.x, shares[images.index] * (EPS / 127), step=EPS / 2, steps=3, **attack)
            torch.manual_seed(5)
            random = (2 * torch.rand_like(images.x) - 1) * EPS
            longest = climb(loss, images.x, random, step=EPS / 4, steps=20, **attack)
            full = climb(loss, images.x, random, step=0.03, steps=4, **attack)
            with torch.no_grad():
                assert record.reused == pytest.approx(float(loss(reached) / loss(longest)), abs=0.003)
                assert record.full == pytest.approx(float(loss(full) / loss(longest)), abs=0.02)  # another start
        assert History.from_json(history.to_json()) == history

    def test_a_weak_attack_is_reported_once(self, chain, caplog, monkeypatch):
        trainer = make_trainer(make_classifier(chain), reuse_perturbations=2)
        trainer.fit(*make_data(900), batch_size=50, nb_epochs=2, **QUIET)
        assert not caplog.records
        monkeypatch.setattr(strength, "MARGIN", -1.0)
        trainer.fit(*make_data(900), batch_size=50, nb_epochs=14, **QUIET)
        (record,) = (one for one in caplog.records if one.name == strength.__name__)
        assert len(trainer.history.strengths) == 2
        assert record.levelno == logging.WARNING and "`reuse_perturbations=3`" in record.getMessage()

    def test_no_image_of_the_sample_has_been_visited(self, chain, data):
        """Of 48 images one is measured, and half of them are not perturbed in an epoch."""
        numbers = []
        for seed in range(4):
            trainer = make_trainer(make_classifier(chain), ratio=0.5, seed=seed)
            trainer.fit(*data, batch_size=16, nb_epochs=3, **QUIET)
            numbers.append([(record.epoch, record.images) for record in trainer.history.strengths])
        assert {tuple(number) for number in numbers} == {((1, 1),), ((2, 1),)}

    def test_validation_runs_the_full_attack(self, chain, data):
        classifier = make_classifier(chain, lr=1e-12)
        attack = make_attack(classifier, num_random_init=0)
        trainer = make_trainer(classifier, attack, reuse_perturbations=ReuseOptions(1, step_size=1e-9))
        trainer.fit(*data, validation_data=data, nb_epochs=3, **QUIET)
        robust = (classifier.predict(attack.generate(*data)).argmax(1) == data[1]).mean()
        assert [record.robust_accuracy for record in trainer.history.epochs] == pytest.approx([robust] * 3)
