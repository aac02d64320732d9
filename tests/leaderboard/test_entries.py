import contextlib
import dataclasses
import json
import os

import numpy as np
import pytest

from art_clat import RobustnessReport, write_robustbench_entry
from art_clat.leaderboard.entries import leaderboard_row
from art_clat.utils.robustbench_import import robustbench_utils


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
