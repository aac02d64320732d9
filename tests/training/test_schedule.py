"""Schedulers of torch and timm: when they are stepped, resumed to the bit, and whether they fit the run."""

import re
from unittest import mock

import numpy as np
import pytest
import timm.scheduler as timm_schedulers
import torch
from conftest import Chain, make_attack, make_classifier, make_data
from test_checkpoint import assert_equal, interrupt
from test_going_on import fit, make, outcome
from torch.optim import lr_scheduler as lr

from art_clat import AdversarialTrainerCLATPyTorch, Callback
from art_clat.config import FitOptions
from art_clat.training.schedule import Schedule

NB_BATCHES = 3  # of 16 of 48 samples


class Rates(Callback):
    """Records the learning rate of every batch."""

    def __init__(self):
        self.rates = []

    def on_batch_begin(self, event):
        self.rates.append(event.classifier.optimizer.param_groups[0]["lr"])


def rates_of(scheduler, nb_epochs, **kwargs):
    run, rates = make(scheduler), Rates()
    fit(run, nb_epochs, callbacks=[rates], **kwargs)
    return rates.rates, run


def expected_rates(scheduler, nb_steps):
    """Step a scheduler of torch by itself."""
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(()))], 0.05, momentum=0.9)
    made, rates = scheduler(optimizer), []
    for _ in range(nb_steps):
        rates.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        made.step()
    return rates


PER_BATCH = {
    "OneCycleLR": lambda o: lr.OneCycleLR(o, 0.1, total_steps=4 * NB_BATCHES),
    "CosineAnnealingLR": lambda o: lr.CosineAnnealingLR(o, 4 * NB_BATCHES),
    "CyclicLR": lambda o: lr.CyclicLR(o, 0.01, 0.1, step_size_up=5),
    "SequentialLR": lambda o: lr.SequentialLR(o, [lr.LinearLR(o, 0.1), lr.CosineAnnealingLR(o, 8)], [4]),
}


class TestStepping:
    @pytest.mark.parametrize("scheduler", PER_BATCH.values(), ids=PER_BATCH)
    def test_once_a_batch(self, scheduler, caplog):
        rates, run = rates_of(scheduler, 4, scheduler_step="batch")
        assert rates == expected_rates(scheduler, 4 * NB_BATCHES)
        assert [record.learning_rate for record in run[0].history.epochs] == rates[NB_BATCHES - 1 :: NB_BATCHES]
        assert not caplog.records
        assert run[0].history.configuration["fit"]["scheduler_step"] == "batch"

    def test_once_an_epoch(self):
        scheduler = lambda o: lr.ExponentialLR(o, 0.5)  # noqa: E731
        assert rates_of(scheduler, 3)[0] == list(np.repeat(expected_rates(scheduler, 3), NB_BATCHES))

    @pytest.mark.parametrize("t_in_epochs", [True, False])
    @pytest.mark.parametrize("step", ["epoch", "batch"])
    def test_timms_own_unit(self, t_in_epochs, step):
        length = 4 if t_in_epochs else 4 * NB_BATCHES

        def scheduler(optimizer):
            return timm_schedulers.CosineLRScheduler(
                optimizer, length, lr_min=1e-3, warmup_t=2, warmup_lr_init=1e-3, t_in_epochs=t_in_epochs
            )

        if t_in_epochs and step == "batch":
            with pytest.raises(ValueError, match="CosineLRScheduler counts epochs. Make it with `t_in_epochs=False`"):
                rates_of(scheduler, 4, scheduler_step=step)
            return
        rates, run = rates_of(scheduler, 4, scheduler_step=step)
        counts = [number // NB_BATCHES if t_in_epochs else number for number in range(4 * NB_BATCHES)]
        assert rates == [run[1]._get_lr(count)[0] for count in counts]

    @pytest.mark.parametrize("every", [1, 2])
    def test_plateau_waits_for_the_robust_accuracy(self, every):
        rates, run = rates_of(lambda o: lr.ReduceLROnPlateau(o, mode="max", patience=0), 6, validate_every=every)
        records, rate, best = run[0].history.epochs, 0.05, -np.inf
        for record in records:
            assert record.learning_rate == pytest.approx(rate, rel=1e-12)
            if record.robust_accuracy is not None:
                rate = rate if record.robust_accuracy > best * (1 + 1e-4) else 0.1 * rate
                best = max(best, record.robust_accuracy)
        assert len(set(rates)) > 1  # it did wait in vain
        assert [r.epoch for r in records if r.robust_accuracy is not None] == list(range(every - 1, 6, every))

    def test_generators(self):
        from art.data_generators import NumpyDataGenerator

        classifier = make_classifier(Chain())
        trainer = AdversarialTrainerCLATPyTorch(classifier, make_attack(classifier))
        scheduler, rates = lr.OneCycleLR(classifier.optimizer, 0.1, total_steps=6), Rates()
        trainer.fit_generator(
            NumpyDataGenerator(*make_data(), batch_size=16), 2, scheduler, callbacks=[rates], verbose=False,
            scheduler_step="batch", validation_data=make_data(8), validate_every=2,
        )  # fmt: skip
        assert rates.rates == expected_rates(lambda o: lr.OneCycleLR(o, 0.1, total_steps=6), 6)
        assert [record.robust_accuracy is None for record in trainer.history.epochs] == [True, False]


def timm_plateau(optimizer):
    """timm 1.0.9 passes an argument that torch no longer has."""

    class Plateau(lr.ReduceLROnPlateau):
        def __init__(self, *args, verbose=False, **kwargs):
            super().__init__(*args, **kwargs)

    with mock.patch.object(lr, "ReduceLROnPlateau", Plateau):
        return timm_schedulers.PlateauLRScheduler(
            optimizer, decay_rate=0.5, patience_t=0, warmup_t=1, warmup_lr_init=0.01, noise_range_t=2
        )


RESUMED = {
    **{f"{name} by batch": (scheduler, {"scheduler_step": "batch"}) for name, scheduler in PER_BATCH.items()},
    "plateau": (lambda o: lr.ReduceLROnPlateau(o, mode="max", patience=0, cooldown=1), {}),
    "timm, epochs": (lambda o: timm_schedulers.StepLRScheduler(o, 2, 0.5, noise_range_t=(1, 3)), {}),
    "timm, batches": (
        lambda o: timm_schedulers.TanhLRScheduler(
            o, 12, lr_min=1e-3, warmup_t=5, warmup_lr_init=1e-3, t_in_epochs=False
        ),
        {},
    ),
    "timm, plateau": (timm_plateau, {}),
    "clipped": (lambda o: None, {"max_grad_norm": 0.3}),
}


@pytest.mark.parametrize(("scheduler", "settings"), RESUMED.values(), ids=RESUMED)
class TestResume:
    @pytest.mark.parametrize("at", [5, 9])
    def test_to_the_same_bits(self, tmp_path, scheduler, settings, at):
        straight = make(scheduler)
        expected = fit(straight, 4, **settings)
        run = make(scheduler)
        interrupt(run[0], at)
        with pytest.raises(KeyboardInterrupt):
            fit(run, 4, checkpoint=tmp_path, checkpoint_every=1, **settings)
        resumed = make(scheduler)
        assert_equal(fit(resumed, 4, checkpoint=tmp_path, checkpoint_every=1, **settings), expected)
        rates = [[record.learning_rate for record in run[0].history.epochs] for run in (resumed, straight)]
        assert rates[0] == rates[1]

    def test_an_epoch_at_a_time(self, scheduler, settings):
        expected, run = fit(make(scheduler), 4, **settings), make(scheduler)
        for nb_epochs in range(1, 5):
            given = fit(run, nb_epochs, resume=True, **settings)
        assert_equal(given, expected)


class TestGradientClipping:
    def step(self, norm):
        """The gradients of a single step without momentum."""
        torch.manual_seed(3)
        model = Chain()
        before = {name: p.detach().clone() for name, p in model.named_parameters()}
        classifier = make_classifier(model, optimizer=torch.optim.SGD(model.parameters(), 1.0))
        trainer = AdversarialTrainerCLATPyTorch(classifier, make_attack(classifier), warmup=1, seed=0)
        trainer.fit(*make_data(), batch_size=48, nb_epochs=1, verbose=False, max_grad_norm=norm)
        return {name: before[name] - p.detach() for name, p in model.named_parameters()}, trainer

    def test_scales_the_whole_gradient_to_the_norm(self):
        raw, _ = self.step(None)
        norm = torch.cat([g.flatten() for g in raw.values()]).norm()
        clipped, trainer = self.step(0.25 * norm.item())
        for name in raw:
            torch.testing.assert_close(clipped[name], 0.25 * raw[name], rtol=1e-3, atol=1e-6)
        assert trainer.history.configuration["fit"]["max_grad_norm"] == 0.25 * norm.item()
        assert_equal(self.step(2 * norm.item())[0], raw)

    @pytest.mark.parametrize("value", [0, -1.0, float("inf"), float("nan"), "1", True])
    def test_values(self, value):
        with pytest.raises(ValueError, match="`max_grad_norm` must be a finite number above 0"):
            fit(make(), 1, max_grad_norm=value)


class TestRefused:
    @pytest.mark.parametrize(
        ("scheduler", "settings", "error", "match"),
        [
            (lambda o: lr.ReduceLROnPlateau(o), {}, ValueError, "`scheduler` .*rises.*Make it with `mode='max'`"),
            (
                lambda o: lr.ReduceLROnPlateau(o, mode="max"), {"validation_data": None}, ValueError,
                "needs `validation_data`",
            ),
            (
                lambda o: lr.ReduceLROnPlateau(o, mode="max"), {"scheduler_step": "batch"}, ValueError,
                "`scheduler_step='batch'`: the validation .* follows an epoch",
            ),
            (
                lambda o: (timm_schedulers.StepLRScheduler(o, 1), 10), {}, TypeError,
                "got tuple. Pass the first of the two that timm's `create_scheduler_v2` returns",
            ),
            (lambda o: None, {"scheduler_step": "batch"}, ValueError, "`scheduler_step='batch'` needs a `scheduler`"),
            (lambda o: lr.StepLR(o, 1), {"scheduler_step": "step"}, ValueError, "`scheduler_step` must be one of"),
            (lambda o: None, {"validation_data": None, "validate_every": 2}, ValueError, "`validate_every=2` needs"),
            (lambda o: None, {"validate_every": 0}, ValueError, "`validate_every` must be"),
        ],
    )  # fmt: skip
    def test_before_anything_is_trained(self, scheduler, settings, error, match):
        run = make(scheduler)
        before = outcome(run[0])
        with pytest.raises(error, match=match):
            fit(run, 2, **settings)
        assert_equal(outcome(run[0]), before)

    def test_of_another_optimizer(self):
        other = torch.optim.SGD(Chain().parameters(), 0.1)
        with pytest.raises(ValueError, match="belongs to another optimizer"):
            fit((make("none")[0], timm_schedulers.StepLRScheduler(other, 1)), 1)


def check(scheduler, nb_epochs, nb_batches, step="epoch", **kwargs):
    """Compare a scheduler with a run, without the run."""
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(()))], 0.05, momentum=0.9)
    fit_options = FitOptions(batch_size=1, nb_epochs=nb_epochs, scheduler_step=step)
    schedule = Schedule.of(scheduler(optimizer), optimizer, fit=fit_options, nb_batches=nb_batches, has_validation=True)
    schedule.check_new(is_whole=True, **kwargs)
    return schedule


WARNINGS = {
    # as ART's own trainers, or the documentation of torch, step them
    "one cycle in batches": (
        lambda o: lr.OneCycleLR(o, 0.1, epochs=6, steps_per_epoch=4),
        "epoch",
        r"total_steps=24.*for 6, or use `scheduler_step='batch'` if it counts batches",
    ),
    "T_max in batches": (
        lambda o: lr.CosineAnnealingLR(o, 24),
        "epoch",
        r"T_max=24\) does not come to its end.*`scheduler_step='batch'`",
    ),
    "T_max in epochs": (
        lambda o: lr.CosineAnnealingLR(o, 6),
        "batch",
        r"T_max=6.*raises it again.*24 steps, one after each batch.*for 24, or use `scheduler_step='epoch'`",
    ),
    "T_max too small": (
        lambda o: lr.CosineAnnealingLR(o, 4),
        "epoch",
        r"T_max=4.*raises it again; this run makes 6 steps, one after each epoch. Choose `T_max` for 6\.$",
    ),
    "cyclic with its defaults": (
        lambda o: lr.CyclicLR(o, 0.01, 0.1),
        "epoch",
        r"CyclicLR\(step_size_up=2000\) does not",
    ),
    "restarts in batches": (lambda o: lr.CosineAnnealingWarmRestarts(o, 12), "epoch", r"T_0=12\) does not"),
    "polynomial that ends": (
        lambda o: lr.PolynomialLR(o, 5),
        "epoch",
        r"total_iters=5\) has the learning rate 0 after 5",
    ),
    "linear to zero": (
        lambda o: lr.LinearLR(o, 1.0, 0.0, total_iters=3),
        "epoch",
        r"total_iters=3\) has the learning rate 0",
    ),
    "milestones in batches": (
        lambda o: lr.MultiStepLR(o, [12, 18]),
        "epoch",
        r"MultiStepLR\(milestones=\[12, 18\]\) does not",
    ),
    "one milestone beyond": (lambda o: lr.MultiStepLR(o, [3, 7]), "epoch", r"milestones=\[3, 7\]\) does not"),
    "a step beyond": (lambda o: lr.StepLR(o, 30), "epoch", r"step_size=30\) does not"),
    "decay an epoch, stepped a batch": (
        lambda o: lr.ExponentialLR(o, 0.4),
        "batch",
        r"gamma=0.4\) multiplies the learning rate by 3e-10.*`scheduler_step='epoch'`",
    ),
    "steps of epochs, stepped a batch": (
        lambda o: lr.StepLR(o, 2),
        "batch",
        r"step_size=2\) multiplies the learning rate by 1e-12",
    ),
    "within a sequence": (
        lambda o: lr.SequentialLR(o, [lr.ConstantLR(o), lr.CosineAnnealingLR(o, 3)], [2]),
        "epoch",
        r"^.scheduler.: CosineAnnealingLR\(T_max=3\)",
    ),
    "a sequence in batches": (
        lambda o: lr.SequentialLR(o, [lr.ConstantLR(o), lr.ExponentialLR(o, 0.9)], [8]),
        "epoch",
        r"SequentialLR\(milestones=\[8\]\) does not",
    ),
    "within a chain": (
        lambda o: lr.ChainedScheduler([lr.ConstantLR(o), lr.CosineAnnealingLR(o, 24)]),
        "epoch",
        r"T_max=24",
    ),
    "begins at zero": (
        lambda o: lr.LambdaLR(o, lambda epoch: epoch / 6),
        "epoch",
        r"LambdaLR begins with the learning rate 0",
    ),
    "timm in batches": (
        lambda o: timm_schedulers.CosineLRScheduler(o, 24),
        "epoch",
        r"CosineLRScheduler\(t_initial=24\) does not.*or use `t_in_epochs=False` if it counts batches",
    ),
    "timm in epochs": (
        lambda o: timm_schedulers.CosineLRScheduler(o, 6, t_in_epochs=False),
        "epoch",
        r"t_initial=6\) has the learning rate 0 after 6.*24 steps.*`t_in_epochs=True`",
    ),
    "timm's steps": (lambda o: timm_schedulers.StepLRScheduler(o, 12), "epoch", r"decay_t=12\) does not"),
    "timm's milestones": (
        lambda o: timm_schedulers.MultiStepLRScheduler(o, [2, 12]),
        "epoch",
        r"decay_t=\[2, 12\]\) does not",
    ),
}

RIGHT = {
    "none": (lambda o: None, "epoch"),
    "one cycle in epochs": (lambda o: lr.OneCycleLR(o, 0.1, total_steps=6), "epoch"),
    "one cycle in batches": (lambda o: lr.OneCycleLR(o, 0.1, epochs=6, steps_per_epoch=4), "batch"),
    "cosine": (lambda o: lr.CosineAnnealingLR(o, 6), "epoch"),
    "cosine, a little longer": (lambda o: lr.CosineAnnealingLR(o, 8), "epoch"),
    "cosine in batches": (lambda o: lr.CosineAnnealingLR(o, 24), "batch"),
    "three cycles, the last one down": (lambda o: lr.CosineAnnealingLR(o, 2), "epoch"),
    "restarts": (lambda o: lr.CosineAnnealingWarmRestarts(o, 2), "epoch"),
    "milestones": (lambda o: lr.MultiStepLR(o, [3, 5]), "epoch"),
    "a milestone at the end": (lambda o: lr.MultiStepLR(o, [3, 6]), "epoch"),
    "steps": (lambda o: lr.StepLR(o, 2), "epoch"),
    "exponential": (lambda o: lr.ExponentialLR(o, 0.9), "batch"),
    "polynomial": (lambda o: lr.PolynomialLR(o, 6), "epoch"),
    "warm-up, then cosine": (
        lambda o: lr.SequentialLR(o, [lr.LinearLR(o, 0.1, total_iters=2), lr.CosineAnnealingLR(o, 4)], [2]), "epoch",
    ),
    "warm-up that is cut": (
        lambda o: lr.SequentialLR(o, [lr.LinearLR(o, 0.1, total_iters=9), lr.CosineAnnealingLR(o, 4)], [2]), "epoch",
    ),
    "a function": (lambda o: lr.LambdaLR(o, lambda epoch: 1 / (1 + epoch)), "epoch"),
    "plateau": (lambda o: lr.ReduceLROnPlateau(o, mode="max"), "epoch"),
    "a step of nobody's": (type("Mine", (lr.CosineAnnealingLR,), {}), "epoch"),
    "timm": (lambda o: timm_schedulers.CosineLRScheduler(o, 6, warmup_t=2, warmup_lr_init=1e-4), "epoch"),
    "timm in batches": (lambda o: timm_schedulers.CosineLRScheduler(o, 24, t_in_epochs=False), "epoch"),
    "timm, then cool": (lambda o: timm_schedulers.CosineLRScheduler(o, 5, lr_min=1e-5), "epoch"),
}  # fmt: skip


class TestFitsTheRun:
    """A run of six epochs of four batches."""

    @pytest.mark.parametrize(("scheduler", "step", "match"), WARNINGS.values(), ids=WARNINGS)
    def test_one_line_that_says_what_to_do(self, scheduler, step, match, caplog):
        check(scheduler, 6, 4, step)
        (record,) = caplog.records
        assert record.levelname == "WARNING" and "\n" not in record.getMessage()
        assert re.search(match, record.getMessage()), record.getMessage()
        assert re.search("Choose `|Begin above 0", record.getMessage())
        caplog.clear()
        check(scheduler, 6, 4, step, rank=1)
        assert not caplog.records or caplog.records[0].levelname == "DEBUG"

    @pytest.mark.parametrize(("scheduler", "step"), RIGHT.values(), ids=RIGHT)
    def test_nothing_is_said_of_what_fits(self, scheduler, step, caplog):
        if scheduler.__class__ is type:
            scheduler = (lambda mine: lambda o: mine(o, 999))(scheduler)
        check(scheduler, 6, 4, step)
        assert not caplog.records

    def test_a_length_in_epochs_stepped_by_an_odd_number_of_batches(self, caplog):
        """It ends at the lowest learning rate, as whole cycles do."""
        check(lambda o: lr.CosineAnnealingLR(o, 6), 6, 3, "batch")
        assert "CosineAnnealingLR(T_max=6) has its lowest learning rate after 6 steps" in caplog.text
        caplog.clear()
        check(lambda o: lr.CosineAnnealingLR(o, 5), 5, 9, "epoch")
        check(lambda o: lr.CosineAnnealingLR(o, 15), 5, 9, "batch")
        assert not caplog.records

    @pytest.mark.parametrize("total", range(1, 9))
    @pytest.mark.parametrize("place", ["alone", "last", "first"])
    def test_what_is_certain_to_fail_is_refused(self, total, place):
        def scheduler(optimizer):
            one_cycle = lr.OneCycleLR(optimizer, 0.1, total_steps=total)
            if place == "alone":
                return one_cycle
            parts = [one_cycle, lr.ConstantLR(optimizer)] if place == "first" else [lr.ConstantLR(optimizer), one_cycle]
            return lr.SequentialLR(optimizer, parts, [4 if place == "first" else 2])

        try:
            expected_rates(scheduler, 6)
        except ValueError:
            with pytest.raises(ValueError, match=rf"OneCycleLR\(total_steps={total}\) fails after {total} steps"):
                check(scheduler, 6, 4)
        else:
            check(scheduler, 6, 4)

    @pytest.mark.parametrize("length", range(1, 9))
    def test_a_learning_rate_of_zero_is_told_if_an_epoch_would_be_trained_with_it(self, length, caplog):
        def scheduler(optimizer):
            return lr.PolynomialLR(optimizer, length)

        check(scheduler, 6, 4)
        assert ("learning rate 0" in caplog.text) == (0 in expected_rates(scheduler, 6))

    def test_the_second_run_with_one_scheduler(self, caplog):
        """It has already come down."""
        run = make(lambda o: lr.CosineAnnealingLR(o, 3))
        fit(run, 3)
        assert "scheduler" not in caplog.text
        fit(run, 3)
        assert "CosineAnnealingLR(T_max=3) has its lowest learning rate after 3 steps" in caplog.text

    def test_the_second_run_with_one_scheduler_that_would_fail(self):
        run = make(lambda o: lr.OneCycleLR(o, 0.1, total_steps=2))
        fit(run, 2)
        before = outcome(run[0])
        with pytest.raises(ValueError, match="fails after 2 steps"):
            fit(run, 2)
        assert_equal(outcome(run[0]), before)

    def test_is_said_once_a_run_and_not_of_parts_of_a_run(self, tmp_path, caplog):
        run = make(lambda o: lr.CosineAnnealingLR(o, 5))
        for nb_epochs in range(1, 6):
            fit(run, nb_epochs, resume=True)
        assert "scheduler" not in caplog.text
        for _ in range(2):
            fit(make(lambda o: lr.CosineAnnealingLR(o, 5)), 2, checkpoint=tmp_path)
        assert caplog.text.count("does not come to its end") == 1
