"""What callbacks see, what they may not change, and the logs that ship."""

import csv
import multiprocessing
import os
import random
import signal
import sys
import time

import numpy as np
import pytest
import torch
from conftest import Chain, Normed, make_attack, make_classifier, make_data
from test_checkpoint import assert_equal, make_run, without_seconds
from test_going_on import MOMENTS, fit, make

from art_clat import AdversarialTrainerCLATPyTorch, Callback, CSVLog, TensorBoardLog

ALL = [*MOMENTS, "on_run_end"]


def listening(answer):
    """A callback that calls a function with every moment."""

    def method(moment):
        return lambda self, event: answer(moment, event)

    return type("Listening", (Callback,), {moment: method(moment) for moment in ALL})()


def test_every_moment_comes_in_order():
    heard = []
    run = make(reselect_every=1)
    fit(run, 3, callbacks=[listening(lambda moment, event: heard.append((moment[3:], event.epoch, event.batch)))])
    batches = [("batch_begin", 0), ("batch_end", 0), ("batch_begin", 1), ("batch_end", 1), ("batch_begin", 2)]

    def epoch(number, *selection):
        moments = [("epoch_begin", 0), *selection, *batches, ("batch_end", 2), ("epoch_end", 2)]
        return [(moment, number, batch) for moment, batch in moments]

    selection = [("selection_begin", 0), ("selection_end", 0)]
    assert heard == [("run_begin", 0, 0), *epoch(0), *epoch(1), *epoch(2, *selection), ("run_end", 3, 0)]


def test_an_event_holds_the_run():
    seen = {}
    run = make()

    def look(moment, event):
        assert event.classifier is run[0].classifier and event.history is run[0].history
        assert (event.nb_epochs, event.nb_batches, event.rank, event.is_resumed) == (3, 3, 0, False)
        assert (event.loss is not None) == (moment == "on_batch_end")
        if moment == "on_batch_end":
            seen.setdefault(event.epoch, []).append(event.loss.loss.item())
        if moment == "on_epoch_end":
            record = event.history.epochs[event.epoch]
            assert record.robust_accuracy is not None and record.loss == pytest.approx(np.mean(seen[event.epoch]))
        if moment == "on_selection_end":
            assert event.history.selections[-1].epoch == event.epoch == 2
        if moment == "on_run_end":
            seen["weights"] = {n: t.clone() for n, t in event.classifier.model.state_dict().items()}

    fit(run, 3, callbacks=[listening(look)], restore_best=True)
    assert_equal(seen["weights"], dict(run[0].classifier.model.state_dict()))


def test_what_a_callback_does_with_the_classifier_does_not_change_the_run():
    """Random numbers, modes, gradients and predictions, at every moment."""

    def disturb(moment, event):
        torch.rand(3), np.random.rand(3), random.random()
        event.classifier.predict(make_data(8)[0])
        torch.manual_seed(len(moment))
        event.classifier.model.eval()
        event.classifier.loss_gradient(make_data(4)[0], np.eye(4, dtype=np.float32))

    def run():
        return make(network=Normed)

    one, other = run(), run()
    assert_equal(fit(one, 4, callbacks=[listening(disturb)]), fit(other, 4))
    assert without_seconds(one[0].history) == without_seconds(other[0].history)


@pytest.mark.parametrize("moment", ALL)
def test_the_model_is_restored_if_a_callback_raises(moment):
    run = make()
    model = run[0].classifier.model.eval()
    model.second.weight.requires_grad_(False)

    def fail(now, event):
        if now == moment and event.epoch >= 2 * (moment != "on_run_begin"):
            raise KeyboardInterrupt

    state, python = torch.get_rng_state(), random.getstate()
    with pytest.raises(KeyboardInterrupt):
        fit(run, 4, callbacks=[listening(fail)])
    assert [name for name, p in model.named_parameters() if not p.requires_grad] == ["second.weight"]
    assert not model.training and not any(module._forward_hooks for module in model.modules())
    assert torch.equal(torch.get_rng_state(), state) and random.getstate() == python
    assert len(run[0].history.epochs) == {"on_run_begin": 0, "on_epoch_end": 3, "on_run_end": 4}.get(moment, 2)


@pytest.mark.parametrize("answer", [True, 0, "halt", np.ones(2), torch.ones(2)])
def test_other_answers_are_refused(answer):
    with pytest.raises(
        TypeError, match="Listening.on_run_begin returned .* must return 'stop' to end the run, or None"
    ):
        fit(make(), 1, callbacks=[listening(lambda moment, event: answer)])


@pytest.mark.parametrize(
    ("callbacks", "match"),
    [
        ([print], "builtin_function"),
        (CSVLog("x"), "CSVLog"),
        ([CSVLog], "CSVLog, a class"),
        ("stop", "str"),
        (3, "int"),
    ],
)
def test_what_is_no_callback_is_refused(callbacks, match):
    with pytest.raises(TypeError, match=f"`callbacks` must (hold|be a list of) .*, got {match}"):
        fit(make(), 1, callbacks=callbacks)


def test_generators_have_callbacks(tmp_path):
    from art.data_generators import NumpyDataGenerator

    classifier = make_classifier(Chain())
    trainer = AdversarialTrainerCLATPyTorch(classifier, make_attack(classifier))
    stop = listening(lambda moment, event: "stop" if moment == "on_epoch_end" and event.epoch == 1 else None)
    log = CSVLog(tmp_path / "log.csv")
    trainer.fit_generator(NumpyDataGenerator(*make_data(), batch_size=16), 5, callbacks=[log, stop], verbose=False)
    assert len(trainer.history.epochs) == 2 == len(rows(log.path))


@pytest.mark.parametrize("every", [2, 3])
def test_validation_every_so_many_epochs_and_at_the_end(every):
    run, other = make(network=Normed), make(network=Normed)
    assert_equal(fit(run, 5, validate_every=every), fit(other, 5))  # it does not influence the training
    validated = [r.epoch for r in run[0].history.epochs if r.robust_accuracy is not None]
    assert validated == sorted({*range(every - 1, 5, every), 4})
    for record in run[0].history.epochs:
        if record.epoch in validated:
            expected = other[0].history.epochs[record.epoch]
            assert (record.clean_accuracy, record.robust_accuracy) == (
                expected.clean_accuracy,
                expected.robust_accuracy,
            )


def rows(path):
    with open(path, newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def as_row(record):
    return {name: "" if value is None else str(value) for name, value in vars(record).items()}


class TestCSVLog:
    def test_holds_the_history(self, tmp_path):
        path = tmp_path / "logs" / "run.csv"
        run = make()
        fit(run, 3, callbacks=[CSVLog(path)], validate_every=2)
        assert rows(path) == [as_row(record) for record in run[0].history.epochs]
        fit(run, 2, callbacks=[CSVLog(path)])  # a new run replaces it
        assert rows(path) == [as_row(record) for record in run[0].history.epochs] and len(rows(path)) == 2
        assert [path.name for path in path.parent.iterdir()] == ["run.csv"]

    def test_leaves_other_files_alone(self, tmp_path):
        path = tmp_path / "data.csv"
        path.write_text("x,y\n1,2\n")
        run = make()
        with pytest.raises(FileExistsError, match="data.csv is another kind of file"):
            fit(run, 1, callbacks=[CSVLog(path)])
        assert path.read_text() == "x,y\n1,2\n" and not run[0].history.epochs


def scalars(folder):
    """What TensorBoard shows: names, and steps with their values."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(folder)).Reload()
    return {tag: [(event.step, event.value) for event in events.Scalars(tag)] for tag in events.Tags()["scalars"]}


def check_scalars(folder, history):
    shown = scalars(folder)
    for group, name in (("loss", "loss"), ("accuracy", "robust_accuracy"), ("time", "learning_rate")):
        expected = [(r.epoch, getattr(r, name)) for r in history.epochs if getattr(r, name) is not None]
        steps, values = zip(*shown[f"{group}/{name}"], strict=True)
        assert list(steps) == [epoch for epoch, _ in expected]
        np.testing.assert_allclose(values, [value for _, value in expected], rtol=1e-6)
    for layer in history.selections[0].measured:
        assert [step for step, _ in shown[f"score/{layer.name}"]] == [s.epoch for s in history.selections]


class TestTensorBoardLog:
    def test_holds_the_history(self, tmp_path):
        pytest.importorskip("tensorboard")
        run = make()
        fit(run, 5, callbacks=[TensorBoardLog(tmp_path)], validate_every=2)
        check_scalars(tmp_path, run[0].history)
        time.sleep(1.1)  # the name of an event file has the second in it
        fit(run, 3, callbacks=[TensorBoardLog(tmp_path)])  # a new run hides it
        check_scalars(tmp_path, run[0].history)

    def test_says_what_is_missing(self, tmp_path, monkeypatch):
        monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
        with pytest.raises(
            ImportError, match="`TensorBoardLog` needs the package tensorboard: pip install tensorboard"
        ):
            TensorBoardLog(tmp_path)


def _train(folder, with_tensorboard, begun):
    """Run in a process of its own, to be killed."""
    torch.set_num_threads(1)
    run = make()
    callbacks = [CSVLog(f"{folder}/log.csv"), *([TensorBoardLog(f"{folder}/board")] if with_tensorboard else [])]
    begun.set()
    fit(run, 8, checkpoint=f"{folder}/run", checkpoint_every=1, callbacks=callbacks)
    run[0].history.to_json(os.path.join(folder, "almost.json"))
    os.replace(os.path.join(folder, "almost.json"), os.path.join(folder, "end.json"))


def test_logs_of_a_run_that_is_killed_hold_each_epoch_once(tmp_path):
    try:
        import tensorboard  # noqa: F401
    except ImportError:
        with_tensorboard = False
    else:
        with_tensorboard = True
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["art_clat", "pytest", "torchvision.transforms.v2"])
    rng, kills, log = random.Random(1), 0, tmp_path / "log.csv"

    def lines():
        return len(log.read_text().splitlines()) if log.exists() else 0

    while not (tmp_path / "end.json").exists():
        begun = context.Event()
        process = context.Process(target=_train, args=(str(tmp_path), with_tensorboard, begun))
        process.start()
        begun.wait(120)
        if kills < 6:
            while process.is_alive() and lines() <= kills:  # the header, and an epoch more for every kill
                pass
            time.sleep(rng.uniform(0, 0.02))
            if process.is_alive():
                os.kill(process.pid, signal.SIGKILL)
                kills += 1
        process.join()
    assert kills > 1
    from art_clat import History

    history = History.from_json((tmp_path / "end.json").read_text())
    assert rows(tmp_path / "log.csv") == [as_row(record) for record in history.epochs]
    if with_tensorboard:
        check_scalars(tmp_path / "board", history)


def test_early_stopping_of_the_guide():
    class EarlyStopping(Callback):
        def on_epoch_end(self, event):
            if event.epoch - event.history.best_epoch >= 2:
                return "stop"

    run, full = make_run(), make_run()
    settings = {"validation_data": make_data(20), "batch_size": 8, "verbose": False}
    full[0].fit(*make_data(), nb_epochs=12, scheduler=full[1], **settings)
    run[0].fit(*make_data(), nb_epochs=12, scheduler=run[1], callbacks=[EarlyStopping()], **settings)
    robust = [record.robust_accuracy for record in full[0].history.epochs]
    last = next(epoch for epoch in range(12) if epoch - int(np.argmax(robust[: epoch + 1])) >= 2)
    assert len(run[0].history.epochs) == last + 1 < 12


def test_an_error_of_a_callback_is_not_taken_for_one_of_the_training():
    def fail(moment, event):
        if moment == "on_batch_end":
            raise FloatingPointError("mine")

    with pytest.raises(FloatingPointError, match="^mine$"):
        fit(make(), 1, callbacks=[listening(fail)])
