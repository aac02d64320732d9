"""Runs that go on after they ended: more epochs, an epoch at a time, after a stop."""

import multiprocessing
import os
import signal
import time

import numpy as np
import pytest
import torch
from conftest import Chain, make_attack, make_classifier, make_data, observe
from test_checkpoint import assert_equal, interrupt, make_run, without_seconds
from torch.optim import lr_scheduler as lr

from art_clat import AdversarialTrainerCLATPyTorch, Callback, TrainingLoop

SCHEDULES = {
    "none": lambda o: None,
    "StepLR": lambda o: lr.StepLR(o, 2, gamma=0.5),
    "a cosine for all epochs": lambda o: lr.CosineAnnealingLR(o, T_max=6),
    "a warm-up that ends before": lambda o: lr.SequentialLR(o, [lr.LinearLR(o, 0.1), lr.ConstantLR(o, 0.5)], [2]),
}


def make(scheduler="StepLR", network=Chain, **kwargs):
    """A trainer whose layers are chosen in epochs 2 and 4, and its scheduler."""
    trainer, _ = make_run(network, scheduler=lambda o: lr.StepLR(o, 99), **kwargs)
    for group in trainer.classifier.optimizer.param_groups:
        del group["initial_lr"]
    make_scheduler = SCHEDULES[scheduler] if isinstance(scheduler, str) else scheduler
    return trainer, make_scheduler(trainer.classifier.optimizer)


def fit(run, nb_epochs, **kwargs):
    trainer, scheduler = run
    settings = {"batch_size": 16, "validation_data": make_data(12), "verbose": False, **kwargs}
    trainer.fit(*make_data(), nb_epochs=nb_epochs, scheduler=scheduler, **settings)
    return outcome(trainer)


def outcome(trainer):
    """Weights, momentum, learning rates."""
    optimizer = trainer.classifier.optimizer.state_dict()
    tensors = {f"{i}.{k}": torch.as_tensor(v) for i, entry in optimizer["state"].items() for k, v in entry.items()}
    rates = torch.tensor([group["lr"] for group in optimizer["param_groups"]], dtype=torch.float64)
    weights = {name: value.clone() for name, value in trainer.classifier.model.state_dict().items()}
    return {**weights, **tensors, "rates": rates}


def stages(trainer):
    return [record.stage for record in trainer.history.epochs]


@pytest.mark.parametrize("scheduler", SCHEDULES)
class TestTheSameBitsAsOneCall:
    def test_a_finished_run_gets_more_epochs(self, tmp_path, scheduler):
        straight, first, second = make(scheduler), make(scheduler), make(scheduler)
        expected = fit(straight, 6)
        fit(first, 3, checkpoint=tmp_path)
        assert_equal(fit(second, 6, checkpoint=tmp_path), expected)
        assert without_seconds(second[0].history) == without_seconds(straight[0].history)
        assert second[0].history.configuration["fit"]["nb_epochs"] == 6

    def test_an_epoch_at_a_time(self, scheduler):
        straight, run = make(scheduler), make(scheduler)
        expected = fit(straight, 6)
        for nb_epochs in range(1, 7):
            given = fit(run, nb_epochs, resume=True)
            assert len(run[0].history.epochs) == nb_epochs
        assert_equal(given, expected)
        assert without_seconds(run[0].history) == without_seconds(straight[0].history)
        assert [selection.epoch for selection in run[0].history.selections] == [2, 4]


def test_an_epoch_at_a_time_in_a_folder(tmp_path):
    expected = fit(make(), 5)
    for nb_epochs in range(1, 6):
        given = fit(make(), nb_epochs, checkpoint=tmp_path)
    assert_equal(given, expected)


class TestReusedPerturbations:
    """Attacks that go on from the last epoch's go on from those of the last call."""

    REUSED = {"augmentation": None, "reuse_perturbations": 1}  # noqa: RUF012

    def make(self):
        return make(**self.REUSED)

    def test_an_epoch_at_a_time(self):
        straight, run = self.make(), self.make()
        expected = fit(straight, 7)
        for nb_epochs in (1, 2, 3, 5, 6, 7):
            given = fit(run, nb_epochs, resume=True)
        assert_equal(given, expected)
        assert run[0].history.strengths == straight[0].history.strengths != []
        other = fit(make(augmentation=None), 7)
        assert any(not torch.equal(other[name], expected[name]) for name in expected)

    def test_a_call_that_fails(self):
        expected, run = fit(self.make(), 6), self.make()
        fit(run, 4, resume=True)
        interrupt(run[0], 3 + 2)
        with pytest.raises(KeyboardInterrupt):
            fit(run, 6, resume=True)
        run[0].loop_class = TrainingLoop
        assert_equal(fit(run, 6, resume=True), expected)

    @pytest.mark.parametrize("first", [1, 2, 3, 4])
    def test_a_finished_run_gets_more_epochs(self, tmp_path, first):
        fit(self.make(), first, checkpoint=tmp_path)
        assert_equal(fit(self.make(), 6, checkpoint=tmp_path), fit(self.make(), 6))

    @pytest.mark.parametrize("at", [7, 8, 9, 10, 13])
    def test_a_stopped_run(self, tmp_path, at):
        fit(self.make(), 6, checkpoint=tmp_path, callbacks=[Stop("on_batch_end", at)])
        assert_equal(fit(self.make(), 5, checkpoint=tmp_path), fit(self.make(), 5))


def test_a_plateau_does_not_count_the_last_validation_of_a_run_that_goes_on(tmp_path):
    def scheduler(optimizer):
        return lr.ReduceLROnPlateau(optimizer, mode="max", patience=1)

    expected = fit(make(scheduler), 8, validate_every=2)
    for nb_epochs in (1, 3, 5, 8):
        given = fit(make(scheduler), nb_epochs, validate_every=2, checkpoint=tmp_path)
    assert_equal(given, expected)


def test_dropout_norms_and_the_best_epoch_survive_calls_that_resume():
    straight, run = (
        make(network=lambda: make_run()[0].classifier.model),
        make(network=lambda: make_run()[0].classifier.model),
    )
    expected = fit(straight, 5, restore_best=True)
    for nb_epochs in range(1, 6):
        given = fit(run, nb_epochs, restore_best=True, resume=True)
    assert_equal(given, expected)


def test_one_epoch_a_call_without_resume_never_reaches_clat_and_with_it_does(caplog):
    trainer = make("none")[0]
    for _ in range(4):
        fit((trainer, None), 1)
        assert stages(trainer) == ["adversarial training"]
    assert caplog.text.count("CLAT never begins") == caplog.text.count("pass `resume=True`") == 1
    caplog.clear()
    trainer = make("none")[0]
    for nb_epochs in range(1, 5):
        fit((trainer, None), nb_epochs, resume=True)
    assert "CLAT never begins" not in caplog.text
    assert stages(trainer) == ["adversarial training"] * 2 + ["clat"] * 2


def test_a_call_that_fails_is_gone_on_with_from_its_last_complete_epoch():
    expected, run = fit(make(), 5), make()
    fit(run, 2, resume=True)
    interrupt(run[0], 3 + 2)
    with pytest.raises(KeyboardInterrupt):
        fit(run, 5, resume=True)
    run[0].loop_class = TrainingLoop
    assert_equal(fit(run, 5, resume=True), expected)


def test_what_happens_to_the_network_in_between_is_undone():
    """It goes on with the run, not with what somebody else left in the network."""
    expected, run = fit(make(), 3), make()
    fit(run, 2, resume=True)
    with torch.no_grad():
        run[0].classifier.model.first.weight.zero_()
    assert_equal(fit(run, 3, resume=True), expected)


class TestRefused:
    @pytest.mark.parametrize(
        ("scheduler", "match"),
        [
            (lambda o: lr.CosineAnnealingLR(o, T_max=3), r"CosineAnnealingLR\(T_max=3\) .* raises it again"),
            (lambda o: lr.OneCycleLR(o, 0.1, total_steps=3), r"OneCycleLR\(total_steps=3\) fails after 3 steps"),
            (lambda o: lr.PolynomialLR(o, 3), r"PolynomialLR\(total_iters=3\) has the learning rate 0 after 3"),
            (
                lambda o: lr.SequentialLR(o, [lr.ConstantLR(o, 0.5), lr.CosineAnnealingLR(o, 2)], [1]),
                r"CosineAnnealingLR\(T_max=2\) .* raises it again",
            ),
        ],
    )
    @pytest.mark.parametrize("in_a_folder", [True, False])
    def test_schedules_that_end_with_the_run(self, tmp_path, scheduler, match, in_a_folder):
        run = make(scheduler)
        settings = {"checkpoint": tmp_path} if in_a_folder else {"resume": True}
        fit(run, 3, **settings)
        before = outcome(run[0])
        with pytest.raises(ValueError, match=f"`nb_epochs` is 4, but the run was planned for 3: its {match}.*new run"):
            fit(run, 4, **settings)
        assert_equal(outcome(run[0]), before)
        fit(run, 3, **settings)  # as it was

    def test_another_schedule_for_more_epochs(self, tmp_path):
        fit(make(lambda o: lr.CosineAnnealingLR(o, T_max=2)), 2, checkpoint=tmp_path)
        with pytest.raises(
            ValueError, match="planned for 2, and its epochs so far were trained with another `scheduler`"
        ):
            fit(make(lambda o: lr.CosineAnnealingLR(o, T_max=3)), 3, checkpoint=tmp_path)

    def test_fewer_epochs_than_were_trained(self, tmp_path):
        fit(make(), 3, checkpoint=tmp_path)
        with pytest.raises(ValueError, match="`nb_epochs` is 2, but the run that would go on has begun 3 epochs"):
            fit(make(), 2, checkpoint=tmp_path)

    def test_fewer_epochs_than_planned_are_right_while_they_are_not_trained(self, tmp_path):
        run = make()
        interrupt(run[0], 5)
        with pytest.raises(KeyboardInterrupt):
            fit(run, 6, checkpoint=tmp_path)
        assert_equal(fit(make(), 3, checkpoint=tmp_path), fit(make(), 3))

    def test_nothing_to_go_on_with(self):
        run = make()
        fit(run, 1)
        with pytest.raises(ValueError, match="`resume=True`: the latest call of this trainer was without it"):
            fit(run, 2, resume=True)

    def test_other_arguments(self):
        run = make()
        fit(run, 1, resume=True)
        with pytest.raises(
            ValueError, match="`resume`: the latest call of this trainer holds another run: batch_size is"
        ):
            fit(run, 2, resume=True, batch_size=12)
        with pytest.raises(ValueError, match="max_grad_norm is None there, 0.1 here"):
            fit(run, 2, resume=True, max_grad_norm=0.1)
        assert len(run[0].history.epochs) == 1


def _extend(folder, nb_epochs, begun):
    """Run in a process of its own, to be killed."""
    torch.set_num_threads(1)
    run = make()
    begun.set()
    torch.save(fit(run, nb_epochs, checkpoint=folder, checkpoint_every=1), os.path.join(folder, "almost"))
    os.replace(os.path.join(folder, "almost"), os.path.join(folder, f"end-{nb_epochs}"))


def test_killed_while_it_gets_more_epochs(tmp_path):
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["art_clat", "pytest", "torchvision.transforms.v2"])
    rng, kills = np.random.default_rng(0), 0
    (tmp_path / "straight").mkdir()
    for nb_epochs, folder in ((8, tmp_path / "straight"), (4, tmp_path), (8, tmp_path)):
        while not (folder / f"end-{nb_epochs}").exists():
            begun = context.Event()
            process = context.Process(target=_extend, args=(str(folder), nb_epochs, begun))
            process.start()
            begun.wait(120)
            if folder == tmp_path and nb_epochs == 8 and kills < 6:
                time.sleep(rng.uniform(0, 0.1))
                if process.is_alive():
                    os.kill(process.pid, signal.SIGKILL)
                    kills += 1
            process.join()
    assert kills > 1
    assert_equal(torch.load(tmp_path / "end-8"), torch.load(tmp_path / "straight" / "end-8"))


MOMENTS = [name for name in vars(Callback) if name.startswith("on_") and name != "on_run_end"]


class Stop(Callback):
    """Stops the run at the `at`-th call of one method."""

    def __init__(self, moment, at):
        self.left = at
        setattr(self, moment, self.count)

    def count(self, event):
        self.left -= 1
        return "stop" if self.left == 0 else None


class TestStopped:
    @pytest.mark.parametrize("moment", MOMENTS)
    @pytest.mark.parametrize("at", [1, 2])
    def test_stays_stopped_and_goes_on_to_other_epochs_as_if_it_never_stopped(self, tmp_path, moment, at, caplog):
        at = {"on_batch_begin": 4 * at, "on_batch_end": 3 * at}.get(moment, at)  # also in an epoch's last batch
        steps = []
        stopped = make()
        fit(stopped, 5, checkpoint=tmp_path, callbacks=[Stop(moment, at)], restore_best=True)
        history = stopped[0].history
        if at > 1 and moment == "on_run_begin":
            assert len(history.epochs) == 5
            return
        assert len(history.epochs) < 5 and all(record.robust_accuracy is not None for record in history.epochs)
        caplog.clear()
        again = make()
        observe(again[0], step=lambda loop, step, *args: steps.append(1) or step(*args))
        assert_equal(
            fit(again, 5, checkpoint=tmp_path, callbacks=[Stop(moment, at)], restore_best=True), outcome(stopped[0])
        )
        assert not steps and again[0].history == history
        (line,) = [record.getMessage() for record in caplog.records if record.levelname == "WARNING"]
        assert "was stopped by a callback in epoch" in line and "another `nb_epochs` than 5 goes on" in line
        longer, straight = make(), make()
        assert_equal(fit(longer, 6, checkpoint=tmp_path), fit(straight, 6))
        assert without_seconds(longer[0].history) == without_seconds(straight[0].history)

    def test_ends_with_the_average_and_restores_the_model(self):
        run, averages = make(ema_decay=0.5), []

        class Last(Callback):
            def on_batch_end(self, event):
                return "stop" if event.epoch == 2 and event.batch == 1 else None

        observe(run[0], step=lambda loop, step, *args: averages.append(loop.keeper.average) or step(*args))
        fit(run, 5, callbacks=[Last()])
        assert len(run[0].history.epochs) == 2 and len(averages) == 3 + 3 + 2
        state = run[0].classifier.model.state_dict()
        assert_equal(averages[-1].state(), dict(state))
        assert all(p.requires_grad for p in run[0].classifier.model.parameters())
        steps = len(averages)
        fit(run, 1)  # a new run, not the rest of the stopped one
        assert len(averages) == steps + 3

    def test_restores_the_best_epoch(self):
        run, weights = make(), {}

        class Third(Callback):
            def on_epoch_end(self, event):
                weights[event.epoch] = {n: t.clone() for n, t in event.classifier.model.state_dict().items()}
                return "stop" if event.epoch == 2 else None

        trainer = run[0]
        trainer.options = type(trainer.options)(**{**vars(trainer.options), "ema_decay": None})
        fit(run, 9, callbacks=[Third()], restore_best=True)
        assert len(weights) == 3
        assert_equal(dict(trainer.classifier.model.state_dict()), weights[trainer.history.best_epoch])


def test_the_last_epoch_of_a_stopped_run_is_validated():
    run = make()
    fit(run, 9, validate_every=4, callbacks=[Stop("on_epoch_end", 6)])
    validated = [record.epoch for record in run[0].history.epochs if record.robust_accuracy is not None]
    assert validated == [3, 5]


def test_generators_are_not_resumed():
    classifier = make_classifier(Chain())
    trainer = AdversarialTrainerCLATPyTorch(classifier, make_attack(classifier))
    with pytest.raises(TypeError, match="resume"):
        trainer.fit_generator(None, resume=True)
