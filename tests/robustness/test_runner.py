"""An evaluation that is killed, shared among processes, or finds another one in its folder."""

import multiprocessing
import os
import random
import shutil
import signal
import time
from pathlib import Path

import evaluation_run
import numpy as np
import pytest
import torch
from evaluation_run import SETTINGS, evaluate, held_out, outcome, trained
from launching import launch

from art_clat import evaluate_robustness
from art_clat.robustness.autoattack import Ensemble
from art_clat.utils.files import read, write

SCRIPT = Path(evaluation_run.__file__)
NB_KILLS = int(os.environ.get("NB_KILLS", 3))


@pytest.fixture(scope="module", autouse=True)
def _one_thread():
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def unbroken():
    return {kind: outcome(evaluate(kind)) for kind in ("standard", "noisy")}


def assert_same(found, expected):
    assert list(found) == list(expected)
    for name, values in expected.items():
        np.testing.assert_array_equal(found[name], values, err_msg=name)


def test_there_is_something_to_lose(unbroken):
    """Otherwise the tests below could not fail."""
    numbers = [int(verdicts.sum()) for name, verdicts in unbroken["standard"].items() if name != "adversarial"]
    assert 22 > numbers[0] > numbers[2] > numbers[3] >= numbers[-1] > 2  # clean, apgd-ce, apgd-t, square
    assert numbers[2] > SETTINGS["batch_size"]
    noisy = unbroken["noisy"]
    assert noisy["clean"].sum() > noisy["transfer"].sum() > noisy["pgd"].sum() > 0


def test_a_folder_changes_nothing_and_is_read_again(unbroken, tmp_path, monkeypatch):
    times = []
    for _ in range(2):
        assert_same(outcome(evaluate("standard", checkpoint=tmp_path / "run")), unbroken["standard"])
        batches = [path for path in (tmp_path / "run").iterdir() if not path.name.startswith("evaluation")]
        times.append({path.name: path.stat().st_mtime_ns for path in batches})
        # the second time nothing is attacked any more
        monkeypatch.setattr(Ensemble, "attack", lambda *args: lambda *batch: pytest.fail("a batch ran again"))
    assert times[0] == times[1] and any(name.startswith("pgd") for name in times[0])


def _evaluate(kind, folder, begun):
    """Run in a process of its own, to be killed."""
    fsync = os.fsync
    os.fsync = lambda file: time.sleep(0.02) or fsync(file)  # the disk of a busy machine, so that a kill can hit it
    begun.set()
    evaluation_run.write(folder / "end", evaluate(kind, checkpoint=folder / "state"))


def test_killed_at_any_instant(unbroken, tmp_path):
    """SIGKILL at random instants, every other time while a file is being written."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["art_clat", "pytest", "torchvision.transforms.v2", "evaluation_run"])
    rng, kills, while_writing = random.Random(0), {}, 0
    for kind in ("noisy", "standard"):
        folder, kills[kind] = tmp_path / kind, 0
        state = folder / "state"
        folder.mkdir()
        for _ in range(5 * NB_KILLS):
            of_the_killed = set(state.glob("*.tmp"))
            begun = context.Event()
            process = context.Process(target=_evaluate, args=(kind, folder, begun))
            process.start()
            begun.wait(120)
            due = time.monotonic() + rng.uniform(0.05, 0.6)

            def is_writing(state=state, of_the_killed=of_the_killed):
                return not of_the_killed.issuperset(state.glob("*.tmp"))

            while process.is_alive() and (
                time.monotonic() < due or (kills[kind] % 2 and not is_writing() and time.monotonic() < due + 5)
            ):
                pass
            if kills[kind] < NB_KILLS and process.is_alive():
                os.kill(process.pid, signal.SIGKILL)
                kills[kind] += 1
            process.join()
            while_writing += is_writing()  # what was being written is still there, half
            if (folder / "end").exists():
                break
        with np.load(folder / "end") as end:
            assert_same(dict(end), unbroken[kind])
        assert not list(state.glob("*.tmp"))
    assert kills["standard"] and while_writing


@pytest.mark.parametrize("nb_processes", [2])
def test_processes_agree_with_one(unbroken, tmp_path, nb_processes):
    """The same verdicts and the same adversarial examples, of attacks and networks that draw random numbers, too."""
    done = launch(nb_processes, SCRIPT, tmp_path / "out", tmp_path / "state")
    assert done.returncode == 0, done.stderr[-3000:]
    for kind, expected in unbroken.items():
        for rank in range(nb_processes):
            with np.load(tmp_path / f"out-{kind}-{rank}.npz") as found:
                assert_same(dict(found), expected)
        batches = [path for path in (tmp_path / f"state-{kind}").iterdir() if not path.name.startswith("evaluation")]
        assert len(batches) > nb_processes
        # One process goes on where two have been killed: with half of the batches, and no later attack.
        for path in batches:
            if path.name.startswith(("square", "fab", "transfer")) or path.stem.endswith("1"):
                path.unlink()
        assert_same(outcome(evaluate(kind, checkpoint=tmp_path / f"state-{kind}")), expected)


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("refused") / "run"
    evaluate("standard", autoattack_version=None, checkpoint=folder)
    return folder


class TestRefused:
    @pytest.mark.parametrize(
        ("change", "difference"),
        [
            ({"eps": 0.11}, "eps is 0.1 there, 0.11 here"),
            ({"norm": "L2"}, "norm is Linf there, L2 here"),
            ({"seed": 4}, "seed is 3 there, 4 here"),
            ({"batch_size": 6}, "batch_size is 5 there, 6 here"),
            ({"pgd_max_iter": 6}, "pgd_max_iter is 5 there"),
            ({"pgd_eps_step": 0.01}, "pgd_eps_step is"),
            ({"pgd_restarts": 3}, "pgd_restarts is 2 there"),
            ({"autoattack_version": "rand"}, "autoattack_version is None there, rand here"),
            ({"transfer_from": trained(1)}, "transfer_from, weights is None there"),
        ],
    )
    def test_another_configuration(self, run, change, difference):
        before = {path.name: path.read_bytes() for path in run.iterdir()}
        with pytest.raises(ValueError, match=f"holds another run: .*{difference}"):
            evaluate("standard", **{"autoattack_version": None, "checkpoint": run, **change})
        assert {path.name: path.read_bytes() for path in run.iterdir()} == before

    def test_other_weights(self, run):
        settings = {**SETTINGS, "autoattack_version": None, "checkpoint": run}
        with pytest.raises(ValueError, match="holds another run: classifier_or_model, weights is"):
            evaluate_robustness(trained(1), *held_out(), **settings)

    def test_other_code(self, run):
        """Same weights, same architecture as far as can be written down."""
        model = trained()
        forward = model.forward
        model.forward = lambda x: forward(x * 0.9)
        before = {path.name: path.read_bytes() for path in run.iterdir()}
        with pytest.raises(ValueError, match="returned other outputs for the same inputs"):
            evaluate_robustness(model, *held_out(), **{**SETTINGS, "autoattack_version": None, "checkpoint": run})
        assert {path.name: path.read_bytes() for path in run.iterdir()} == before

    def test_batches_of_other_examples_are_not_used(self, run, tmp_path):
        """As another machine, on which another example withstood the attack before, would leave them."""
        shutil.copytree(run, tmp_path / "copy")
        path = tmp_path / "copy" / "pgd-00000.safetensors"
        tensors, content = read(path)
        before = evaluate("standard", autoattack_version=None, checkpoint=run)
        assert not tensors["fooled"].all()
        write(
            path, {**tensors, "fooled": torch.ones_like(tensors["fooled"]), "indices": tensors["indices"] + 1}, content
        )
        again = evaluate("standard", autoattack_version=None, checkpoint=tmp_path / "copy")
        assert_same(outcome(again), outcome(before))

    def test_other_data(self, run):
        settings = {**SETTINGS, "autoattack_version": None, "checkpoint": run}
        x, y = held_out()
        with pytest.raises(ValueError, match="holds another run: x is"):
            evaluate_robustness(trained(), x[::-1].copy(), y, **settings)
        with pytest.raises(ValueError, match="holds another run: y is"):
            evaluate_robustness(trained(), x, np.roll(y, 1), **settings)

    def test_a_folder_of_something_else(self, tmp_path):
        (tmp_path / "last.safetensors").write_bytes(b"a training run")
        with pytest.raises(ValueError, match="holds something else than an evaluation"):
            evaluate("standard", checkpoint=tmp_path)
        with pytest.raises(ValueError, match="holds something else"):
            evaluate("standard", checkpoint=tmp_path / "last.safetensors")
        assert [path.name for path in tmp_path.iterdir()] == ["last.safetensors"]

    def test_a_damaged_file(self, run, tmp_path):
        shutil.copytree(run, tmp_path / "copy")
        path = tmp_path / "copy" / "pgd-00001.safetensors"
        path.write_bytes(path.read_bytes()[:-3])
        with pytest.raises(ValueError, match="pgd-00001.safetensors cannot be read"):
            evaluate("standard", autoattack_version=None, checkpoint=tmp_path / "copy")

    def test_a_folder_that_cannot_be_written_to(self, tmp_path):
        (tmp_path / "file").touch()
        with pytest.raises(OSError, match="`checkpoint`: cannot write to"):
            evaluate("standard", checkpoint=tmp_path / "file" / "run")


def test_progress_says_what_is_left(capsys):
    evaluate("noisy", verbose=True)
    assert "transfer on" in capsys.readouterr().err
    evaluate("noisy")
    assert not capsys.readouterr().err
