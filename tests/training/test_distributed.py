"""Several processes, for real: gloo on the CPU."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import distributed_run
import numpy as np
import pytest
import torch
from conftest import observe
from launching import free_port, launch

from art_clat.utils.processes import Part, Ranks

SCRIPT = Path(distributed_run.__file__)
ROOT = SCRIPT.parents[1]


def results(folder, task, nb_processes):
    done = launch(nb_processes, SCRIPT, task, folder / task)
    assert done.returncode == 0, done.stderr[-3000:]
    return [json.loads((folder / f"{task}-{rank}.json").read_text()) for rank in range(nb_processes)]


@pytest.fixture(scope="module")
def one_process():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield distributed_run.compare()
    torch.set_num_threads(threads)


@pytest.mark.parametrize("nb_processes", [2, 3])
def test_the_same_as_one_process(tmp_path, one_process, nb_processes, monkeypatch):
    if nb_processes == 3:  # batches of 16 and 15 of 50 leave 2 and 5
        one_process = {name: one for name, one in one_process.items() if "share" in name or "NumPy" in name}
        monkeypatch.setenv("CONFIGURATIONS", ";".join(one_process))
    first, *others = results(tmp_path, "compare", nb_processes)
    assert all(other == first for other in others)  # to the last bit, weights and BatchNorm statistics included
    assert first.keys() == one_process.keys()
    for name, one in one_process.items():
        np.testing.assert_allclose(first[name]["losses"], one["losses"], rtol=1e-4)
        np.testing.assert_allclose(first[name]["accuracies"], one["accuracies"], atol=0.021)  # one sample
        np.testing.assert_allclose(first[name]["weakness"], one["weakness"], rtol=1e-3)
        assert first[name]["chosen"] == [list(chosen) for chosen in one["chosen"]]
        for key, value in one["state"].items():
            np.testing.assert_allclose(first[name]["state"][key], value, rtol=1e-3, atol=1e-4, err_msg=f"{name}, {key}")


def test_every_process_refuses_what_cannot_be_shared(tmp_path):
    for messages in results(tmp_path, "refuse", 2):
        assert "`batch_size` 1 leaves a batch of 1 of 50 inputs, fewer than the 2 processes" in messages.pop(
            "batch smaller than ranks"
        )
        assert "`batch_size` 49 leaves a batch of 1 of 50" in messages.pop("last batch smaller than ranks")
        assert "`fit_generator` trains in one process" in messages.pop("generator")
        assert "The 2 processes differ in the inputs, the labels" in messages.pop("other data")
        assert "differ in criticality_weight" in messages.pop("other arguments")
        assert "it must be a mean over the samples" in messages.pop("summed loss")
        assert "no class weights" in messages.pop("weighted loss")
        assert "The 2 processes differ in" in messages.pop("another model")
        assert "differ in the optimizer's state" in messages.pop("other momentum")
        assert "differ in checkpoint: all" in messages.pop("checkpoint of one only")
        assert "differ in the checkpoint: all" in messages.pop("folder of one only")
        assert "differ in callbacks: all" in messages.pop("callbacks of one only")
        assert "differ in resume: all" in messages.pop("resume of one only")
        assert "ignores the class 0" in messages.pop("ignored class")
        assert "has parameters (temperature)" in messages.pop("loss with parameters")
        assert "bn2 keeps running statistics of single samples" in messages.pop("norm of samples with statistics")
        assert "bn2 has no running statistics" in messages.pop("norm without statistics")
        assert messages.pop("a loss that is not finite in one").startswith("FloatingPointError")
        assert not messages


def test_the_model_comes_back_as_it_was_and_equal_everywhere(tmp_path):
    """Also with dropout, which differs between processes, and a seed that the first process draws for all."""
    first, second = results(tmp_path, "hooks", 2)
    assert first["hooks"] == second["hooks"] == 0
    assert first["threads"] == second["threads"] == 0
    assert first["flags"] and second["flags"]
    assert first["state"] == second["state"]
    assert first["left out"] != second["left out"] and len(first["left out"]) == len(second["left out"])
    every = distributed_run.make_data(50)[0].sum((1, 2, 3))
    np.testing.assert_allclose(sorted(first["seen"] + second["seen"]), np.sort(every), rtol=1e-5)
    assert first["written"] > 0 and second["written"] == 0


def test_one_process_stops_all_and_they_go_on_together(tmp_path):
    first, second = results(tmp_path, "stop", 2)
    assert first["stopped"] == second["stopped"] and first["outcome"] == second["outcome"]
    assert len(first["stopped"]["losses"]) == 3 and len(first["outcome"]["losses"]) == 4
    assert first["log"] and not second["log"]
    trainer = distributed_run.make_trainer(ema_decay=0.8)
    distributed_run.fit(trainer, nb_epochs=4, scheduler=distributed_run.plateau(trainer), max_grad_norm=0.5)
    one = distributed_run.outcome(trainer)
    np.testing.assert_allclose(first["outcome"]["losses"], one["losses"], rtol=1e-4)
    for name, value in one["state"].items():
        np.testing.assert_allclose(first["outcome"]["state"][name], value, rtol=1e-3, atol=1e-4, err_msg=name)


def start_two(task, folder):
    """Start two processes by hand."""
    environment = {**os.environ, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port()), "WORLD_SIZE": "2"}
    return [
        subprocess.Popen(
            [sys.executable, SCRIPT, task, folder / "run"],
            env={**environment, "RANK": str(rank)},
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(2)
    ]


def end(processes):
    for process in processes:
        process.send_signal(signal.SIGKILL)
        process.communicate()


def test_waiting_for_a_process_that_hangs_ends(tmp_path):
    processes = start_two("hang", tmp_path)
    try:
        _, message = processes[0].communicate(timeout=150)  # torch would wait for half an hour
    finally:
        end(processes)
    assert processes[0].returncode == 1 and processes[1].returncode == -signal.SIGKILL
    assert "ConnectionError: Process 0 of 2 has lost another one, which died or did not answer" in message


def test_a_dead_process_ends_the_run_and_one_process_resumes_it(tmp_path, one_process):
    processes = start_two("die", tmp_path)
    try:
        _, message = processes[0].communicate(timeout=150)  # a hang, not slowness, would take this long
    finally:
        end(processes)
    assert processes[0].returncode == 1 and processes[1].returncode == 9
    assert "ConnectionError: Process 0 of 2 has lost another one" in message and "With `checkpoint=`" in message
    trainer = distributed_run.make_trainer()
    steps = []
    observe(trainer, step=lambda loop, step, *args: steps.append(1) or step(*args))
    distributed_run.fit(trainer, checkpoint=tmp_path / "run", checkpoint_every=1)
    assert len(steps) == 20 - 10
    np.testing.assert_allclose(
        distributed_run.outcome(trainer)["losses"], one_process["adversarial"]["losses"], rtol=1e-4
    )


def test_the_example(tmp_path):
    for nb_processes in (2, 1):  # the second run resumes the finished first one
        done = launch(
            nb_processes, ROOT / "examples" / "distributed.py", "--epochs", 2, "--batch-size", 400, "--output", tmp_path
        )
        assert done.returncode == 0, done.stderr[-3000:]
        assert done.stdout.count("epoch  0  adversarial training") == 1 and "epoch  1  clat" in done.stdout
        assert ("CLAT, epoch 1: training 1 of" in done.stderr) == (nb_processes == 2)


@pytest.mark.parametrize("nb_samples", [0, 1, 2, 7, 16])
@pytest.mark.parametrize("size", [1, 2, 3, 5])
def test_parts_are_even_and_make_the_whole(nb_samples, size):
    parts = [Ranks(rank, size).part(nb_samples) for rank in range(size)]
    assert all(part.total == nb_samples for part in parts)
    shares = [list(range(nb_samples))[part.mine] for part in parts]
    assert [sample for share in shares for sample in share] == list(range(nb_samples))
    assert max(map(len, shares)) - min(map(len, shares)) <= 1


def test_a_part_of_one_process_is_everything():
    assert Part(5).mine == slice(None) and Ranks().part(5) == Part(5)


def test_processes_may_make_unequal_passes_outside_of_the_update(tmp_path):
    """Statistics are shared in the update alone: elsewhere a process without a sample would be waited for."""
    assert results(tmp_path, "unequal", 2) == [1, 1]
