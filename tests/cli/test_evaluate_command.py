"""`python -m art_clat evaluate` from beginning to end."""

import json
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import torch
from evaluation_run import held_out, trained

TESTS = Path(__file__).parents[1]


def evaluate(*arguments):
    return subprocess.run(
        [sys.executable, "-m", "art_clat", "evaluate", *map(str, arguments)],
        capture_output=True, text=True, cwd=TESTS, timeout=300,
    )  # fmt: skip


def test_from_a_model_to_the_files(tmp_path):
    """And not for another run into the same folder."""
    settings = ["--model", "evaluation_run:trained", "--dataset", tmp_path / "x.npz", "--batch-size", 5]
    settings += ["--output", tmp_path / "out"]
    model, (x, y) = trained(), held_out(12)
    np.savez(tmp_path / "x.npz", x=x, y=y)
    first = evaluate(*settings, "--eps", "4/25", "--seed", 3)
    assert first.returncode == 0, first.stderr[-2000:]
    told = json.loads((tmp_path / "out" / "report.json").read_text(encoding="utf-8"))
    assert told["eps"] == 0.16 and told["data"]["shape"] == [12, 2, 6, 6] and told["versions"]["torch"]
    assert told["model"] == {"name": "evaluation_run:trained", "checkpoint": None, "weights": None}
    assert told["transfer_from"] is None
    assert told["batch_size"] == 5 and told["processes"] == 1 and "CPU cores" in told["machine"] and told["date"]
    assert told["command"].startswith("art-clat evaluate --model evaluation_run:trained")
    assert f"AutoAttack (standard)   {100 * told['autoattack_accuracy']:6.2f} %" in first.stdout
    log = (tmp_path / "out" / "autoattack.log").read_text(encoding="utf-8")
    assert "robust accuracy after APGD-CE" in log and "max Linf perturbation: 0.1" in log
    # every line of the log is a line of its own, beside the bar
    assert "%|" in first.stderr
    assert set(log.splitlines()) <= set(re.split(r"[\r\n]+", first.stderr))
    adversarial = torch.load(tmp_path / "out" / "adversarial.pt", weights_only=True)
    with np.load(tmp_path / "out" / "verdicts.npz") as verdicts, torch.no_grad():
        robust = model(adversarial).argmax(1).numpy() == y
        np.testing.assert_array_equal(robust, verdicts["autoattack/square"])
    before = {path: path.read_bytes() for path in (tmp_path / "out").glob("*.*")}
    other = evaluate(*settings, "--eps", "5/25", "--seed", 3)
    assert other.returncode == 1 and "holds another run: eps is 0.16 there, 0.2 here" in other.stderr
    assert "Traceback" not in other.stderr
    assert {path: path.read_bytes() for path in (tmp_path / "out").glob("*.*")} == before


def test_eps_must_be_given(tmp_path):
    done = evaluate("--model", "conftest:Normed", "--dataset", "digits", "--output", tmp_path)
    assert done.returncode == 2 and "--eps" in done.stderr
