import contextlib
import dataclasses
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from art_clat import RobustnessReport, create_backbone, evaluate_robustness, write_robustbench_entry
from art_clat.leaderboard.benchmark import run_benchmark
from art_clat.leaderboard.definitions import load_from_robustbench, model_definition, write_checkpoint
from art_clat.leaderboard.entries import leaderboard_row
from art_clat.models.datasets import only_test_files
from art_clat.utils.robustbench_import import autoattack, robustbench_utils

CIFAR10 = Path(__file__).parents[3] / "shared" / "data" / "cifar10"
#: Few and small operations, since AutoAttack makes thousands of passes.
VIT = {
    "name": "vit_tiny_patch16_224", "num_classes": 10, "input_size": (3, 32, 32), "patch_size": 16, "depth": 1,
    "embed_dim": 16, "num_heads": 1,
}  # fmt: skip


@pytest.fixture
def report():
    """24 examples, of which 18 are right, and 12 under AutoAttack."""
    verdicts = np.arange(24)
    attacks = {"apgd-ce": verdicts < 13, "apgd-t": verdicts < 12, "fab-t": verdicts < 12, "square": verdicts < 12}
    return RobustnessReport(
        norm="Linf", eps=0.04, nb_examples=24, clean=verdicts < 18, pgd=verdicts < 13, pgd_max_iter=20,
        autoattack_version="standard", warnings=(), seconds=1.0, seed=0, attacks=attacks,
    )  # fmt: skip


class TestRobustBenchEntry:
    def test_has_the_fields_and_the_figures(self, report, tmp_path):
        path = write_robustbench_entry(
            report, model_id="Someone2026Digits", dataset="cifar10", directory=tmp_path, link="https://example.org",
            name="A title", authors="Some One", venue="Nowhere 2026", architecture="ConvNet",
        )  # fmt: skip
        assert path == tmp_path / "model_info" / "cifar10" / "Linf" / "Someone2026Digits.json"
        entry = json.loads(path.read_text())
        model_info = robustbench_utils().ModelInfo(**entry)  # RobustBench's own fields, and no others
        assert float(model_info.clean_acc) == pytest.approx(100 * report.clean_accuracy, abs=0.01)
        assert float(model_info.autoattack_acc) == pytest.approx(100 * report.autoattack_accuracy, abs=0.01)
        assert (model_info.authors, model_info.number_forward_passes, model_info.eps) == ("Some One", 1, "0.04")

    def test_says_what_keeps_it_from_the_leaderboard(self, report, tmp_path):
        def footnote(dataset):
            return json.loads(
                write_robustbench_entry(report, model_id="M", dataset=dataset, directory=tmp_path).read_text()
            )["footnote"]

        assert "evaluated on 24 of the 10000 examples" in footnote("cifar10")
        assert "ε = 0.04 instead of 8/255" in footnote("cifar10")
        assert "no leaderboard for digits" in footnote("digits")

    @pytest.mark.parametrize(
        ("change", "said"),
        [
            ({"autoattack_version": "rand"}, "AutoAttack's rand version instead of the standard one"),
            (
                {"warnings": ("it seems to be a randomized defense!",)},
                "the evaluation warned: it seems to be a randomized",
            ),
            ({"norm": "L2", "eps": 1.0}, "ε = 1 instead of 0.5"),
            (
                {"attacks": {"apgd-ce": np.ones(1, bool), "fab-t": np.ones(1, bool)}},
                "without AutoAttack's apgd-t, square",
            ),
        ],
    )
    def test_says_what_else_keeps_it_from_the_leaderboard(self, report, tmp_path, change, said):
        full = dataclasses.replace(report, nb_examples=10_000, **{"eps": 8 / 255, **change})
        path = write_robustbench_entry(full, model_id="M", dataset="cifar10", directory=tmp_path)
        assert said in json.loads(path.read_text())["footnote"]

    def test_a_full_result_has_no_reservation(self, report, tmp_path):
        full = dataclasses.replace(report, nb_examples=10_000, eps=8 / 255)
        path = write_robustbench_entry(full, model_id="M", dataset="cifar10", directory=tmp_path)
        entry = json.loads(path.read_text())
        assert entry["footnote"] is None and entry["eps"] == "8/255"

    def test_updates_an_entry_that_is_there(self, report, tmp_path):
        write_robustbench_entry(report, model_id="M", dataset="cifar10", directory=tmp_path, venue="First")
        write_robustbench_entry(report, model_id="M", dataset="cifar10", directory=tmp_path, additional_data=True)
        path = write_robustbench_entry(report, model_id="M", dataset="cifar10", directory=tmp_path, name="Second")
        entry = json.loads(path.read_text())
        assert (entry["venue"], entry["name"], entry["additional_data"]) == ("First", "Second", True)

    def test_leaves_the_working_directory(self, report, tmp_path):
        before = os.getcwd()
        write_robustbench_entry(report, model_id="M", dataset="cifar10", directory=tmp_path)
        assert os.getcwd() == before

    def test_bad_input(self, report, tmp_path):
        def write(report, **kwargs):
            write_robustbench_entry(report, **{"model_id": "M", "dataset": "cifar10", "directory": tmp_path, **kwargs})

        with pytest.raises(ValueError, match="no AutoAttack result"):
            write(dataclasses.replace(report, attacks={}))
        with pytest.raises(ValueError, match="Linf and L2, got L1"):
            write(dataclasses.replace(report, norm="L1"))
        with pytest.raises(ValueError, match="`model_id` must be a plain file name"):
            write(report, model_id="../M")


ID = "Someone2026Small-R10"
SETTING = {"model_id": ID, "dataset": "cifar10", "norm": "Linf"}


def test_row_is_robustbenchs(report, tmp_path):
    write_robustbench_entry(
        report, model_id=ID, dataset="cifar10", directory=tmp_path, link="https://example.org/paper",
        name="A title", authors="Some One, Else Body", venue="Nowhere 2026", architecture="ResNet-10",
    )  # fmt: skip
    head, _, row = leaderboard_row(ID, dataset="cifar10", norm="Linf", directory=tmp_path).splitlines()
    cells = [cell.strip() for cell in row.strip("|").split("|")]
    assert len(cells) == len(head.strip("|").split("|")) == 7
    assert f"**{ID}**" in cells[1] and "[A title](https://example.org/paper)" in cells[2]
    assert ["75.00%" in cells[3], "50.00%" in cells[4]] == [True, True]
    assert ID not in robustbench_utils().all_models[robustbench_utils().BenchmarkDataset("cifar10")]
    with contextlib.chdir(tmp_path) if hasattr(contextlib, "chdir") else pytest.skip("needs Python 3.11"):
        _, bibtex = robustbench_utils().get_leaderboard_bibtex("cifar10", "Linf")
        assert "Some One and Else Body" in bibtex and "year\t= {2026}" in bibtex
        latex = robustbench_utils().get_leaderboard_latex("cifar10", "Linf", sort_by="autoattack_acc")
        assert "75.0 & 50.0 & N & RN-10 & Nowhere 2026" in latex


@pytest.mark.skipif(not CIFAR10.exists(), reason="no CIFAR-10 at ../shared/data/cifar10")
def test_robustbenchs_own_benchmark_agrees_on_real_cifar10_example_by_example(tmp_path, monkeypatch):
    """
    A network trained here, loaded by RobustBench's `load_model`, evaluated by its `benchmark` on its own data.

    AutoAttack's attacks are made short on both sides.
    """
    seeds = []

    class Seeded(autoattack().AutoAttack):
        def __init__(self, *args, **kwargs):
            seeds.append(kwargs["seed"])
            super().__init__(*args, **kwargs)

    def short(self, version):
        original(self, version)
        self.apgd.n_iter = self.apgd_targeted.n_iter = self.fab.n_iter = 10
        self.square.n_queries = 100

    original = autoattack().AutoAttack._set_version
    monkeypatch.setattr(autoattack().AutoAttack, "_set_version", short)
    subprocess.run([sys.executable, str(CIFAR10 / "unpack.py"), str(tmp_path), "test_batch"], check=True)
    robustbench_utils()
    import robustbench.data

    with only_test_files(robustbench.data.datasets.CIFAR10):
        x, y = robustbench.data.load_cifar10(100, str(tmp_path))
    model = create_backbone(**VIT)
    optimizer = torch.optim.Adam(model.parameters(), 0.01)
    for _ in range(40):
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(x), y).backward()
        optimizer.step()
    model.eval()
    ours = evaluate_robustness(model, x[:16].numpy(), y[:16].numpy(), norm="Linf", eps=0.5 / 255, batch_size=16, seed=5)

    (tmp_path / "definition.py").write_text(model_definition(create_backbone, VIT, **SETTING))
    write_checkpoint(model, tmp_path / "weights.pt", tmp_path / "definition.py", **SETTING)
    theirs = load_from_robustbench(tmp_path / "definition.py", tmp_path / "weights.pt", **SETTING)
    arguments = {"eps": 0.5 / 255, "nb_examples": 16, "data_dir": tmp_path, "directory": tmp_path, "batch_size": 16}
    monkeypatch.setattr("robustbench.eval.AutoAttack", Seeded)
    clean, robust, verdicts = run_benchmark(theirs, **SETTING, **arguments, seed=5)
    np.testing.assert_array_equal(verdicts, ours.autoattack)
    assert (clean, robust) == pytest.approx((ours.clean_accuracy, ours.autoattack_accuracy))
    assert clean > robust > 0
    path = write_robustbench_entry(ours, model_id="Ours", dataset="cifar10", directory=tmp_path)
    entry, their_entry = (json.loads((path.parent / f"{model_id}.json").read_text()) for model_id in ("Ours", ID))
    assert entry.keys() == their_entry.keys()
    for figure in ("clean_acc", "autoattack_acc", "dataset"):
        assert entry[figure] == their_entry[figure]

    *_, by_the_clock = run_benchmark(theirs, **SETTING, **arguments)  # RobustBench's way
    assert by_the_clock.mean() == pytest.approx(robust, abs=1.01 / 16)
    assert seeds == [5, None]
