"""`evaluation/paper_tables`: the committed files, how jobs are added to them, and the command line."""

import gzip
import json
import shutil
from pathlib import Path

import pandas as pd
import pytest
from paper_tables.command_line import main
from paper_tables.configuration import Study, load_configuration
from paper_tables.markdown import markdown_table
from paper_tables.page import aggregate
from paper_tables.results import Job, Results

COMMITTED = Path(__file__).parents[2] / "evaluation" / "results" / "paper_tables"
CONFIG = load_configuration()


@pytest.mark.parametrize("preset", ["cpu", "cpu_again"])
def test_the_committed_page_is_made_from_the_committed_files_alone(tmp_path, preset):
    shutil.copytree(COMMITTED, tmp_path / "results", ignore=shutil.ignore_patterns("*.md", "*.png"))
    results = Results(Study.of(CONFIG, preset), results=tmp_path / "results", work=tmp_path / "work")
    results.collect()  # There is nothing to collect.
    aggregate(results)
    assert results.folder.joinpath("results.md").read_bytes() == (COMMITTED / preset / "results.md").read_bytes()
    pages = {file.name for file in (COMMITTED / preset).glob("*.png")}
    assert pages == {file.name for file in results.folder.glob("*.png")}


class TestCommittedFiles:
    def test_they_are_small_lines_that_pandas_reads(self):
        assert all(file.stat().st_size < 1_000_000 for file in COMMITTED.rglob("*"))
        assert not [file for file in COMMITTED.glob("*/*/*")]
        runs = pd.read_json(COMMITTED / "cpu" / "runs.jsonl", lines=True)
        study = Study.of(CONFIG, "cpu")
        assert set(runs["arm"]) == {arm for letter in ("A", "B", "C", "C2") for arm in study.tables[letter]["arms"]}
        assert not runs.duplicated(["arm", "seed"]).any() and set(runs["seed"]) == set(study.seeds)
        tuning = pd.read_json(COMMITTED / "cpu" / "tuning.jsonl", lines=True)
        assert len(tuning) == sum(len(study.grid(arm)) for arm in set(tuning["arm"]))
        assert len(pd.read_json(COMMITTED / "cpu" / "stability.jsonl", lines=True)) == 5

    @pytest.mark.parametrize("preset", ["cpu", "cpu_again"])
    def test_every_run_has_its_history(self, preset):
        runs = pd.read_json(COMMITTED / preset / "runs.jsonl", lines=True)
        epochs, layers = (pd.read_csv(COMMITTED / preset / f"{name}.csv.gz") for name in ("epochs", "layers"))
        for run in runs.to_dict("records"):
            of_run = epochs[(epochs["arm"] == run["arm"]) & (epochs["seed"] == run["seed"])]
            assert list(of_run["epoch"]) == list(range(0 if run["arm"] == "start" else 20))
            if len(of_run):
                assert of_run["robust_accuracy"].argmax() == run["best_epoch"]
            selections = layers[(layers["arm"] == run["arm"]) & (layers["seed"] == run["seed"])]
            trained = selections.groupby("epoch")[["trainable_parameters", "total_parameters"]].first().mean()
            if len(selections):
                share = trained["trainable_parameters"] / trained["total_parameters"]
                assert share == pytest.approx(run["trainable_share"], rel=1e-5)

    @pytest.mark.parametrize("preset", ["cpu", "cpu_again"])
    def test_what_all_runs_share_is_said_once(self, preset):
        content = json.loads((COMMITTED / preset / "preset.json").read_text())
        assert content["preset"] == Study.of(CONFIG, preset).preset and content["all_runs"]["machine"]
        lines = [json.loads(line) for file in (COMMITTED / preset).glob("*.jsonl") for line in file.open()]
        assert not any(line.keys() & content["all_runs"].keys() for line in lines)
        assert all({"commit", "date"} <= line.keys() | content["all_runs"].keys() for line in lines)


def record_of(results, job):
    """A finished run as its process writes it."""
    epochs = [
        {"epoch": at, "stage": "clat", "loss": 1 / 3, "cross_entropy": 0.1, "criticality_loss": 1234567.8,
         "learning_rate": 0.05, "seconds": 2.0, "train_clean_accuracy": None, "train_robust_accuracy": 2 / 3,
         "clean_accuracy": 0.5, "robust_accuracy": 0.25}
        for at in range(2)
    ]  # fmt: skip
    layers = [
        {"name": name, "weakness": 1e-7 / 3, "criticality": 12.3456789, "nb_parameters": 12345678, "shape": [3, 8, 8],
         "is_head": name == "fc", "relative_error": 0.1, "relative_criticality": 1.0}
        for name in ("conv", "fc")
    ]  # fmt: skip
    selection = {"epoch": 0, "chosen": ["conv"], "trainable_parameters": 12345678, "total_parameters": 123456789,
                 "seconds": 1.0, "measured": {"layers": layers, "input_weakness": 0.1, "nb_samples": 32}}  # fmt: skip
    accuracies = {"clean": 2 / 3, "autoattack": 0.12345, "warnings": []}
    return {
        "arm": job.arm, "seed": job.seed, "setting": results.setting(job), "tuned": {}, "commit": "abc",
        "date": "2026-01-01", "machine": "one", "versions": {"torch": "2"}, "status": "done",
        "results": {"last": accuracies, "best": accuracies}, "seconds_per_epoch": 2.123456789,
        "history": {"epochs": epochs, "selections": [selection]},
    }  # fmt: skip


class TestCollecting:
    @pytest.fixture
    def results(self, tmp_path):
        return Results(Study.of(CONFIG, "smoke"), results=tmp_path / "results", work=tmp_path / "work")

    def write(self, results, seed, **others):
        job = Job("runs", seed, "pgd_at")
        results.write(job, {**record_of(results, job), **others})

    def files(self, results):
        return {file.name: file.read_bytes() for file in results.folder.iterdir()}

    def test_counts_are_exact_and_floats_have_six_digits(self, results):
        self.write(results, 0)
        results.collect()
        (line,) = results.folder.joinpath("runs.jsonl").read_text().splitlines()
        assert '"last_clean": 0.666667, "last_autoattack": 0.12345' in line and '"seconds_per_epoch": 2.12346' in line
        epochs = gzip.decompress((results.folder / "epochs.csv.gz").read_bytes()).decode().splitlines()
        assert epochs[1] == "pgd_at,0,0,clat,0.333333,0.1,1234570.0,0.05,2.0,,0.666667,0.5,0.25" and len(epochs) == 3
        layers = gzip.decompress((results.folder / "layers.csv.gz").read_bytes()).decode().splitlines()
        assert layers[1:] == [
            "pgd_at,0,0,conv,True,3.33333e-08,12.3457,0.1,1.0,12345678,3×8×8,False,0.1,32,12345678,123456789,1.0",
            "pgd_at,0,0,fc,False,3.33333e-08,12.3457,0.1,1.0,12345678,3×8×8,True,0.1,32,12345678,123456789,1.0",
        ]

    def test_collecting_twice_or_bit_by_bit_gives_the_same_bytes(self, results, tmp_path):
        at_once = Results(results.study, results=tmp_path / "other", work=tmp_path / "other_work")
        for seed in (1, 0):
            self.write(results, seed)
            self.write(at_once, seed)
            results.collect()
        at_once.collect()
        before = self.files(results)
        assert before == self.files(at_once) and len(before) == 4
        assert all(content[4:8] == bytes(4) for name, content in before.items() if name.endswith(".gz"))
        results.collect()
        assert self.files(results) == before

    @pytest.mark.parametrize("field", ["loss", "criticality", "nb_samples", "total_parameters"])
    def test_a_field_of_the_history_that_was_renamed_is_noticed(self, results, field):
        job = Job("runs", 0, "pgd_at")
        text = json.dumps(record_of(results, job))
        assert f'"{field}"' in text
        results.write(job, json.loads(text.replace(f'"{field}"', '"renamed"')))
        with pytest.raises(KeyError, match=field):
            results.collect()

    def test_what_is_no_longer_shared_moves_to_the_lines(self, results):
        self.write(results, 0)
        results.collect()
        self.write(results, 1, machine="two")
        results.collect()
        shared = json.loads((results.folder / "preset.json").read_text())["all_runs"]
        assert shared == {"commit": "abc", "date": "2026-01-01", "versions": {"torch": "2"}}
        runs = pd.read_json(results.folder / "runs.jsonl", lines=True)
        assert list(runs["machine"]) == ["one", "two"]

    def test_collected_results_count_without_the_work_folder(self, results, tmp_path):
        self.write(results, 0)
        failed = Job("runs", 1, "pgd_at")
        results.write(failed, {"arm": "pgd_at", "seed": 1, "setting": results.setting(failed), "status": "failed",
                               "error": "lost"})  # fmt: skip
        results.collect()
        shutil.rmtree(tmp_path / "work")
        again = Results(results.study, results=tmp_path / "results", work=tmp_path / "work")
        good, bad = Job("runs", 0, "pgd_at"), Job("runs", 1, "pgd_at")
        assert again.is_done(good, retry=True) and again.is_done(bad) and not again.is_done(bad, retry=True)
        assert again.read(good)["last_clean"] == 0.666667 and again.read(Job("runs", 2, "pgd_at")) is None
        self.write(again, 1)
        assert again.is_done(bad, retry=True)
        again.collect()
        lines = [json.loads(line) for line in (results.folder / "runs.jsonl").open()]
        assert [line["status"] for line in lines] == ["done", "done"] and "error" not in lines[1]


def test_a_short_row_is_filled():
    assert markdown_table(["a", "b"], [["1", "2"], ["3"]]) == "| a | b |\n| --- | --- |\n| 1 | 2 |\n| 3 |  |"


class TestCommandLine:
    @pytest.mark.parametrize(
        ("arguments", "message"),
        [
            (["run", "--preset", "none"], "`preset` must be one of smoke, cpu"),
            (["run", "--preset", "smoke", "--arms", "none", "--tables", "Z"], "no such table or arm: Z, none"),
        ],
    )
    def test_unknown_names(self, capsys, arguments, message):
        with pytest.raises(SystemExit, match="2"):
            main(arguments)
        assert message in capsys.readouterr().err

    def test_there_must_be_a_result(self, tmp_path):
        folders = ["--results", str(tmp_path / "results"), "--work", str(tmp_path / "work")]
        with pytest.raises(SystemExit, match=r"There is no result in .*smoke: `run` makes them"):
            main(["aggregate", "--preset", "smoke", *folders])

    def test_collect_and_aggregate(self, tmp_path, capsys):
        results = Results(Study.of(CONFIG, "cpu"), results=tmp_path / "results", work=tmp_path / "work")
        folders = ["--results", str(tmp_path / "results"), "--work", str(tmp_path / "work")]
        shutil.copytree(COMMITTED / "cpu", tmp_path / "results" / "cpu")
        job = Job("runs", 0, "d_awp")
        results.write(job, record_of(results, job))
        before = (tmp_path / "results" / "cpu" / "runs.jsonl").read_text()
        main(["collect", "--preset", "cpu", *folders])
        after = (tmp_path / "results" / "cpu" / "runs.jsonl").read_text().splitlines()
        new = [line for line in after if line.startswith('{"arm": "d_awp"')]
        assert len(new) == 1 and len(after) == len(before.splitlines()) + 1
        assert capsys.readouterr().out == ""
