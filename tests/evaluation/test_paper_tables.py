"""`evaluation/paper_tables`: configuration, statistics, jobs that are killed, crash or are done, and the tables."""

import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from paper_tables.configuration import CONFIGURATION, Study, load_configuration, resolve_arm, resolve_preset
from paper_tables.evidence import Evidence
from paper_tables.experiment import Experiment
from paper_tables.jobs import claimed, measure_all, run_all
from paper_tables.networks import ART_TRAINERS, load_data, make_model, trainer_arguments
from paper_tables.page import aggregate, share_sections
from paper_tables.results import Job, RefusedError, Results
from paper_tables.statistics import interval, paired, trained_share
from paper_tables.tables import accuracy_table, difference_table, second_stage_table, stability_table, tuning_table
from safetensors.torch import load_file
from scipy import stats

from art_clat import Budget, LayerOptions, SelectionOptions, list_objectives, list_selection_rules

SCRIPT = Path(__file__).parents[2] / "evaluation" / "paper_tables"
CONFIG = load_configuration()
ARMS = ["pgd_at", "clat_random", "pgd_at_ema"]


@dataclass
class Bench:
    study: Study
    results: Results
    experiment: Experiment

    def run(self, arms, seeds, **kwargs):
        run_all(self.experiment, self.results, arms, seeds, **kwargs)

    def read(self, arm, seed):
        return self.results.read(Job("runs", seed, arm))

    def aggregate(self):
        self.results.collect()
        return aggregate(self.results)

    def evidence(self, arms, seeds=(0, 1)):
        self.results.collect()
        return Evidence.read(self.results, arms, seeds)


def make_bench(folder, experiment=Experiment, **preset):
    config = {**CONFIG, "presets": {"smoke": {**CONFIG["presets"]["smoke"], **preset}}, "arms": dict(CONFIG["arms"])}
    config["arms"]["clat"] = {**config["arms"]["clat"], "tune": {"lr": [1.0], "criticality_weight": [0.02, 0.1]}}
    config["arms"]["clat_random"] = {
        "title": "CLAT objective on random layers", "like": "clat", "trainer": {"selection": "random"}
    }  # fmt: skip
    config["tables"] = {"A": {"title": "Controls", "arms": [*ARMS, "clat"], "against": ["pgd_at"]}}
    return bench_of(Study.of(config, "smoke"), folder / "results", folder / "work", experiment)


def bench_of(study, results, work, experiment=Experiment):
    results = Results(study, results=results, work=work)
    return Bench(study, results, experiment(study, work=results.work, data=None))


def without_circumstances(result):
    """A result without what two runs of the same may differ in."""
    history = result.get("history", {"epochs": [], "selections": []})
    for record in [*history["epochs"], *history["selections"]]:
        record.pop("seconds")
    return {key: value for key, value in result.items() if key not in ("date", "machine", "seconds_per_epoch")}


@pytest.fixture(scope="module")
def done(tmp_path_factory):
    bench = make_bench(tmp_path_factory.mktemp("bench"))
    bench.run(ARMS, [0, 1])
    return bench


@pytest.fixture(scope="module", autouse=True)
def _one_thread():  # another number of threads rounds in another order
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


class TestConfiguration:
    def test_every_arm_and_table_is_whole(self):
        for name in CONFIG["arms"]:
            arm = resolve_arm(CONFIG["arms"], name)
            assert arm["title"] and arm["tuned_by"] in CONFIG["arms"]
            assert arm.get("trainer", {}).get("selection", "criticality") in list_selection_rules()
            assert arm.get("trainer", {}).get("objective", "adversarial") in list_objectives()
            assert arm.get("base", "pgd_at") in {*list_objectives(first_stage=True), *ART_TRAINERS}
        study = Study.of(CONFIG, "smoke")
        assert study.tables == CONFIG["tables"]
        for letter, table in study.tables.items():
            for name, others in study.references(table).items():
                bases = {study.arm(one).get("base", "pgd_at") for one in (name, *others)}
                assert len(bases) == 1  # pairs begin at the same weights
                assert others or name in {"d_trades", "d_mart", "d_awp", "d_fbf", "rule_random", "g_full"}
                if letter == "C" and name.startswith("c_") and name != "c_single_step":
                    assert others == ["clat_parameters"]  # not what that one is compared with elsewhere

    def test_presets_like_another(self):
        gpu, full = (resolve_preset(CONFIG["presets"], name) for name in ("gpu", "full"))
        assert full == {**gpu, "amp": False, "channels_last": False, "autoattack_images": 10_000}
        assert resolve_preset(CONFIG["presets"], "full_densenet121") == {**full, "backbone": "densenet121_cifar"}
        settings = set(gpu) | {"stem_stride", "validated_images", "backbone_arguments", "tuned_in"}
        settings |= {"evaluated", "evaluation_batch_size"}
        assert all(set(resolve_preset(CONFIG["presets"], name)) <= settings for name in CONFIG["presets"])

    def test_like_takes_over_all_but_what_is_given(self):
        config = {
            "arms": {
                "a": {"title": "A", "trainer": {"objective": "clean", "budget": 0.1}, "tune": {"lr": [1]}},
                "b": {"title": "B", "like": "a", "trainer": {"budget": 0.2}, "reselect_every": 3},
            }
        }
        arm = resolve_arm(config["arms"], "b")
        assert arm["trainer"] == {"objective": "clean", "budget": 0.2}
        own_tuning = {**config["arms"], "b": {**config["arms"]["b"], "tune": {"lr": [2]}}}
        assert resolve_arm(own_tuning, "b")["tuned_by"] == "b"
        assert arm["tuned_by"] == "a" and arm["title"] == "B" and arm["reselect_every"] == 3
        assert "like" in config["arms"]["b"] and config["arms"]["a"]["trainer"]["budget"] == 0.1

    def test_what_an_arm_leaves_out_does_not_follow_the_packages_defaults(self):
        preset = CONFIG["presets"]["smoke"]
        arguments = trainer_arguments(preset, {})
        assert arguments["objective"] == "adversarial" and arguments["layers"] == LayerOptions(freeze_norms=False)
        assert arguments["selection"] == SelectionOptions("criticality", 32) and arguments["augmentation"] is None
        arm = {"objective": "clean", "freeze_norms": True, "budget": {"parameter_share": 0.05}, "selection": "last"}
        arguments = trainer_arguments({**preset, "augmentation": "flip"}, arm)
        assert arguments["objective"] == "clean" and arguments["layers"].freeze_norms and arguments["augmentation"]
        assert arguments["selection"] == SelectionOptions("last", 32) and "freeze_norms" not in arguments
        assert arguments["budget"] == Budget(parameter_share=0.05, fill=True)

    def test_data_of_a_seed(self):
        preset = CONFIG["presets"]["smoke"]
        one, again, other = (load_data(preset, seed, None) for seed in (0, 0, 1))
        assert all(np.array_equal(a[0], b[0]) and np.array_equal(a[1], b[1]) for a, b in zip(one, again, strict=True))
        assert not any(np.array_equal(a[0], b[0]) for a, b in zip(one, other, strict=True))
        images = [{image.tobytes() for image in x} for x, _ in one]
        assert not images[0] & images[1]  # the few digits that are drawn alike are not among these
        assert [len(x) for x, _ in one] == [preset[f"{part}_images"] for part in ("train", "validation", "test")]


class TestStatistics:
    @pytest.mark.parametrize("seed", range(3))
    def test_interval_and_paired_test_against_scipy(self, seed):
        rng = np.random.default_rng(seed)
        one, other = rng.normal(0.2, 0.02, 5), rng.normal(0.19, 0.02, 5)
        mean, half = interval(one)
        low, high = stats.t.interval(0.95, 4, loc=one.mean(), scale=one.std(ddof=1) / np.sqrt(5))
        assert (mean - half, mean + half) == pytest.approx((low, high))
        mean, half, p = paired(one, other)
        expected = stats.ttest_1samp(one - other, 0)
        assert p == pytest.approx(expected.pvalue)
        assert (mean - half, mean + half) == pytest.approx(tuple(expected.confidence_interval(0.95)))

    def test_one_seed_has_no_interval(self):
        assert np.isnan(interval([0.3])[1]) and np.isnan(paired([0.3], [0.2])[2])

    @pytest.mark.parametrize("by", [0.0, 11 / 400])
    def test_the_same_difference_every_time_proves_nothing(self, by):
        one = np.array([47, 33, 45]) / 400
        mean, half, p = paired(one + by, one)
        assert mean == pytest.approx(by) and np.isnan(half) and np.isnan(p)


class TestRuns:
    def test_every_arm_begins_where_the_first_stage_ended(self, done):
        for seed in (0, 1):
            first = json.loads((done.results.work / "first" / f"pgd_at-seed{seed}.json").read_text())
            assert len(first["epochs"]) == 2
            rates = [first["epochs"][-1]["learning_rate"]] + [
                record["learning_rate"] for record in done.read("pgd_at", seed)["history"]["epochs"]
            ]
            expected = [0.05 * (1 + np.cos(np.pi * epoch / 4)) / 2 for epoch in (1, 2, 3)]
            assert rates == pytest.approx(expected)

    def test_results_are_whole_and_of_different_seeds(self, done):
        for arm in ARMS:
            one, other = (done.read(arm, seed) for seed in (0, 1))
            assert one["status"] == other["status"] == "done"
            assert without_circumstances(one)["history"] != without_circumstances(other)["history"]
            for when in ("last", "best"):
                assert 0 <= one["results"][when]["autoattack"] <= one["results"][when]["pgd20_on_autoattack_images"]
            assert (one["largest_trainable_share"] == 1) == (arm != "clat_random")
        assert done.read("clat_random", 0)["tuned"]["criticality_weight"] in (0.02, 0.1)

    @pytest.mark.parametrize("base", ["awp", "fbf"])
    def test_first_stages_of_art(self, tmp_path, base):
        first, again = (make_bench(tmp_path / name).experiment.first_stage(0, base) for name in ("one", "two"))
        one, two = load_file(first), load_file(again)
        model = make_model(CONFIG["presets"]["smoke"], 0)
        for name, parameter in model.named_parameters():
            assert torch.equal(one[name], two[name]) and not torch.equal(one[name], parameter)
        model.load_state_dict(one)

    def test_what_is_done_is_not_done_again(self, done):
        files = sorted(done.results.work.rglob("*.json"))
        assert {file.parent.name for file in files} >= {"runs", "tuning"}
        before = [file.stat().st_mtime_ns for file in files]
        done.run(ARMS, [0, 1])
        assert sorted(done.results.work.rglob("*.json")) == files
        assert [file.stat().st_mtime_ns for file in files] == before

    def test_another_configuration_is_refused(self, done):
        done.results.collect()
        bench = make_bench(done.results.folder.parents[1], lr=0.06)
        for action in (lambda: bench.run(ARMS, [0, 1]), bench.aggregate):
            with pytest.raises(RefusedError, match=r"\.jsonl, .* was made with another configuration"):
                action()

    def test_an_arm_that_was_changed_is_refused_before_it_is_collected(self, done):
        arms = {**done.study.arms, "pgd_at": {**done.study.arms["pgd_at"], "reselect_every": 7}}
        folder = done.results.folder.parents[1]
        bench = bench_of(replace(done.study, arms=arms), folder / "none", folder / "work")
        assert bench.results.work == done.results.work
        for action in (lambda: bench.run(["pgd_at"], [0]), bench.results.collect):
            with pytest.raises(RefusedError, match=r"pgd_at-seed0\.json, .* another configuration"):
                action()
        assert not (folder / "none").exists()

    def test_work_that_another_configuration_began_is_not_continued(self, done):
        folder = done.results.folder.parents[1]
        assert make_bench(folder).results.work == done.results.work
        assert make_bench(folder, batch_size=16).results.work != done.results.work
        one, other = ({**done.study.arms["pgd_at"], "reselect_every": n} for n in (1, 2))
        assert done.study.fingerprint(one) != done.study.fingerprint(other)

    def test_values_that_diverge_are_not_chosen_and_stop_nothing(self, tmp_path):
        class Diverging(Experiment):
            def second_stage(self, name, seed, tuned):
                if tuned.get("criticality_weight") == 0.02:
                    raise FloatingPointError("lost")
                return super().second_stage(name, seed, tuned)

        bench = make_bench(tmp_path, Diverging)
        bench.run(["clat"], [0])
        assert bench.results.tuned("clat")["criticality_weight"] == 0.1
        assert "| diverged to" in tuning_table(bench.results, ["clat"])

    def test_runs_of_values_that_tuning_no_longer_chooses_are_refused(self, tmp_path):
        bench = make_bench(tmp_path)
        bench.run(["clat"], [0])
        tuned = bench.results.tuned("clat")
        other = next(values for values in bench.study.grid("clat") if values != tuned)
        for values, accuracy in ((tuned, 0.1), (other, 0.9)):
            path = bench.results.file(Job("tuning", 100, "clat", values))
            path.write_text(json.dumps({**json.loads(path.read_text()), "pgd20": accuracy}))
        for action in (lambda: bench.run(["clat"], [0]), bench.aggregate):
            with pytest.raises(RefusedError, match="tuning now chooses"):
                action()

    def test_tuning_and_first_stages_that_crash_are_recorded_and_stop_nothing_else(self, tmp_path):
        class Crashing(Experiment):
            def first_stage(self, seed, base="pgd_at"):
                if seed == 1:
                    raise RuntimeError("no first stage")
                return super().first_stage(seed, base)

            def second_stage(self, name, seed, tuned):
                if name == "clat":
                    raise RuntimeError("no second stage")
                return super().second_stage(name, seed, tuned)

        bench = make_bench(tmp_path, Crashing)
        bench.run(["clat", "pgd_at"], [0, 1])
        assert bench.results.tuned("clat") is None
        errors = {(arm, seed): bench.read(arm, seed).get("error") for arm in ("clat", "pgd_at") for seed in (0, 1)}
        tuning = "RuntimeError: its tuning failed, RuntimeError: no second stage"
        assert errors == {("clat", 0): tuning, ("clat", 1): tuning, ("pgd_at", 0): None,
                          ("pgd_at", 1): "RuntimeError: no first stage"}  # fmt: skip
        bench.aggregate()
        assert "| 0 of 2, **2 failed** |" in (bench.results.folder / "results.md").read_text()
        again = make_bench(tmp_path)
        again.run(["clat", "pgd_at"], [0, 1], retry=True)
        assert {again.read(arm, seed)["status"] for arm, seed in errors} == {"done"}
        again.aggregate()  # What was collected as failed is replaced.
        assert "failed" not in (bench.results.folder / "results.md").read_text()

    def test_killed_and_run_again_gives_the_same(self, done, tmp_path):
        config = tmp_path / "config.toml"
        config.write_text(CONFIGURATION.read_text())
        command = [sys.executable, str(SCRIPT), "run", "--preset", "smoke", "--seeds", "0", "--arms", "pgd_at"]
        command += ["--results", str(tmp_path / "results"), "--work", str(tmp_path / "work")]
        killed = []
        for file in ("first/pgd_at-seed0/last.safetensors", "pgd_at-*-seed0/last.safetensors"):
            process = subprocess.Popen(command, stderr=subprocess.DEVNULL, env={**os.environ, "OMP_NUM_THREADS": "1"})
            while process.poll() is None and not list((tmp_path / "work").glob(f"smoke-*/{file}")):
                time.sleep(0.002)
            process.send_signal(signal.SIGKILL)
            killed.append(process.wait())
        assert killed == [-signal.SIGKILL] * 2
        subprocess.run(command, check=True, capture_output=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
        (path,) = (tmp_path / "work").glob("smoke-*/runs/pgd_at-seed0.json")
        assert without_circumstances(json.loads(path.read_text())) == without_circumstances(done.read("pgd_at", 0))

    def test_a_crash_is_recorded_and_shown_and_can_be_tried_again(self, done, tmp_path):
        class Crashing(Experiment):
            def second_stage(self, name, seed, tuned):
                if seed == 1:
                    raise FloatingPointError("lost")
                return super().second_stage(name, seed, tuned)

        bench = make_bench(tmp_path, Crashing)
        bench.run(["pgd_at"], [0, 1])
        assert bench.read("pgd_at", 1)["status"] == "failed"
        bench.aggregate()
        text = (bench.results.folder / "results.md").read_text()
        assert "| PGD-AT continued | 1 of 2, **1 failed** |" in text
        assert "- pgd_at, seed 1: FloatingPointError: lost" in text
        bench.run(["pgd_at"], [0, 1], retry=True)  # It crashes again: it is tried once.
        assert bench.read("pgd_at", 1)["status"] == "failed"
        evidence = bench.evidence(["pgd_at"])
        assert list(evidence.done("pgd_at").index) == [0] and evidence.failed("pgd_at") == 1
        again = make_bench(tmp_path)
        again.run(["pgd_at"], [0, 1])
        assert again.read("pgd_at", 1)["status"] == "failed"
        again.run(["pgd_at"], [0, 1], retry=True)
        assert without_circumstances(again.read("pgd_at", 1)) == without_circumstances(done.read("pgd_at", 1))

    def test_a_job_that_another_process_has_is_left_to_it(self, tmp_path):
        lock = tmp_path / "job.lock"
        hold = (
            f"from paper_tables.jobs import claimed\nwith claimed(__import__('pathlib').Path({str(lock)!r})) as mine:"
        )
        hold += "\n    print(mine, flush=True)\n    input()"
        path = os.pathsep.join([str(SCRIPT.parent), *sys.path])
        process = subprocess.Popen(
            [sys.executable, "-c", hold], stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL,
            text=True, env={**os.environ, "PYTHONPATH": path},
        )  # fmt: skip
        assert process.stdout.readline() == "True\n"
        with claimed(lock) as mine:
            assert not mine
        process.kill()
        process.wait()
        with claimed(lock) as mine, claimed(lock) as again:
            assert mine and not again


def rows_of(text):
    return [[cell.strip() for cell in row.split("|")[1:-1]] for row in text.split("\n")]


def test_table_is_what_the_runs_say(done):
    evidence = done.evidence([*ARMS, "clat"])
    rows = {row[0]: row[1:] for row in rows_of(accuracy_table(done.study, done.study.tables["A"], evidence, [0, 1]))}
    row, runs = rows["CLAT objective on random layers"], [done.read("clat_random", seed) for seed in (0, 1)]
    assert row[0] == "2 of 2" and rows['CLAT, objective "adversarial"'][0] == "0 of 2"
    whats = [("last", "clean"), ("last", "pgd20"), ("last", "autoattack"), ("best", "autoattack")]
    whats += [("last", "pgd20_on_autoattack_images"), ("last", "train_pgd20")]
    for cell, (when, what) in zip(row[1:], whats, strict=False):
        assert cell.startswith(f"{np.mean([100 * run['results'][when][what] for run in runs]):.1f}")
    share = np.mean([100 * run["trainable_share"] for run in runs])
    assert row[7] == f"{share:.3g} %" and rows["PGD-AT continued"][7] == "100 %"


def test_differences_are_those_of_the_runs(done):
    evidence = done.evidence([*ARMS, "clat"])
    arms = {**done.study.arms, "pgd_at_ema": {**done.study.arms["pgd_at_ema"], "against": ["pgd_at", "clat_random"]}}
    study = replace(done.study, arms=arms)
    _, _, *rows = rows_of(difference_table(study, study.tables["A"], evidence))
    titles = {name: arms[name]["title"] for name in ARMS}
    pairs = [("clat_random", "pgd_at"), ("pgd_at_ema", "pgd_at"), ("pgd_at_ema", "clat_random")]
    assert [row[:2] for row in rows] == [[titles[one], titles[other]] for one, other in pairs]
    for row, (one, other) in zip(rows, pairs, strict=True):
        columns = [
            ("last", "autoattack"),
            ("last", "pgd20"),
            ("best", "autoattack"),
            ("best", "pgd20"),
            ("last", "clean"),
        ]
        for at, (when, what) in zip(range(2, 12, 2), columns, strict=True):
            pair = ([100 * done.read(name, seed)["results"][when][what] for seed in (0, 1)] for name in (one, other))
            difference = np.subtract(*pair)
            assert row[at].startswith(f"{difference.mean():+.1f}")
            if np.ptp(difference) > 1e-9:
                assert row[at + 1] == f"{stats.ttest_1samp(difference, 0).pvalue:.3f}"
        last = ([100 * done.read(name, seed)["history"]["epochs"][-1]["robust_accuracy"] for seed in (0, 1)]
                for name in (one, other))  # fmt: skip
        assert row[12].startswith(f"{np.subtract(*last).mean():+.1f}")
    others = evidence.epochs[evidence.epochs["arm"] != "pgd_at"]  # as if nothing of PGD-AT had been validated
    unvalidated = Evidence.of(evidence.runs, others, evidence.layers)
    _, _, row, *_ = rows_of(difference_table(study, study.tables["A"], unvalidated))
    assert row[2] and row[12:] == ["", ""]


def test_what_the_second_stage_did_is_in_the_histories(done):
    rows = {row[0]: row[1:] for row in rows_of(second_stage_table(done.study, done.evidence(ARMS), ARMS))}
    assert rows["PGD-AT continued"][1:] == [""] * 6
    histories = [done.read("clat_random", seed)["history"] for seed in (0, 1)]
    robust, *losses = (
        np.mean([history["epochs"][at][what] for history in histories])
        for at, what in ((-1, "robust_accuracy"), (0, "criticality_loss"), (-1, "criticality_loss"))
    )
    figures = [
        np.mean(
            [layer[figure] for h in histories for layer in h["selections"][at]["measured"]["layers"]
             if layer["name"] == h["selections"][0]["chosen"][0]]
        )
        for figure in ("criticality", "relative_error") for at in (0, -1)
    ]  # fmt: skip
    assert all(len(history["selections"]) == 2 for history in histories)
    assert rows["CLAT objective on random layers"] == [
        f"{100 * robust:.1f}", *(f"{number:.3g}" for number in (*losses, *figures))
    ]  # fmt: skip


def test_robust_overfitting_is_set_against_the_share_that_is_trained(done):
    evidence = done.evidence([*ARMS, "clat"])
    pgd_at = evidence.runs[evidence.runs["arm"] == "pgd_at"]
    others = [pgd_at.assign(arm=arm) for arm in ("start", "d_trades")]  # neither is an arm's second stage from PGD-AT
    others.append(pgd_at[pgd_at["seed"] == 0].assign(arm="pgd_at_tenth"))  # one seed of two
    evidence = Evidence.of(pd.concat([evidence.runs, *others]), evidence.epochs, evidence.layers)
    groups = trained_share(done.study, evidence, [*ARMS, "clat", "start", "d_trades", "pgd_at_tenth"], [0, 1])
    tuned = done.read("clat_random", 0)["tuned"]["lr"]
    assert set(groups) == {("pgd_at", 1.0), ("adversarial", tuned)}
    ((share, accuracies),) = groups["adversarial", tuned]
    runs = [done.read("clat_random", seed) for seed in (0, 1)]
    assert share == pytest.approx(np.mean([100 * run["trainable_share"] for run in runs])) and share < 100
    assert accuracies == [100 * run["results"]["last"]["pgd20"] for run in runs]
    assert [share for share, _ in groups["pgd_at", 1.0]] == [100]


def test_overfitting_is_correlated_among_arms_that_differ_in_no_more(tmp_path):
    groups = {
        ("pgd_at", 0.2): [(1.0, [20.0, 22.0]), (9.0, [18.0, 21.0]), (50.0, [19.0, 16.0])],
        ("pgd_at", 1.0): [(2.0, [5.0, 6.0]), (3.0, [50.0, 60.0])],
        ("adversarial", 0.2): [(share, [share, share]) for share in (1.0, 2.0, 3.0, 4.0)],  # these may differ in λ
    }
    text = "".join(share_sections(groups, tmp_path / "share.png"))
    assert "over the 3 arms with PGD-AT's own loss and the learning-rate factor 0.2: Spearman's ρ = -1.00." in text
    assert (tmp_path / "share.png").stat().st_size > 1000
    del groups["pgd_at", 0.2]
    assert "Spearman" not in "".join(share_sections(groups, tmp_path / "share.png"))


def test_stability(done):
    measure_all(done.experiment, done.results, [0, 1])
    measurements = [done.results.read(Job("stability", seed)) for seed in (0, 1)]
    for entry in measurements:
        assert set(entry["measured"]) == {
            "PGD, 16 samples", "PGD, 32 samples", "FGSM, 32 samples", "APGD, 32 samples"
        }  # fmt: skip
        assert all(len(values) == len(entry["layers"]) for values in entry["measured"].values())
    text = stability_table(measurements)
    one, other = (entry["measured"]["PGD, 32 samples"] for entry in measurements)
    assert f"| two seeds, PGD, 32 samples | {stats.spearmanr(one, other).statistic:.2f} " in text
    made_up = [
        {"measured": {"PGD, 8 samples": [1, 2, 3], "PGD, 64 samples": values}} for values in ([1, 2, 3], [3, 2, 1])
    ]
    text = stability_table(made_up)
    assert "| two seeds, PGD, 64 samples | -1.00 (-1.00 to -1.00) | 0 % |" in text
    assert "| PGD, 8 samples, and PGD, 64 samples, the same network | 0.00 (-1.00 to 1.00) | 50 % |" in text


def test_fresh_seeds_take_what_another_preset_tuned_and_are_shown_by_themselves_and_together(done, tmp_path):
    arms = ["pgd_at", "clat_random"]
    config = {
        "arms": done.study.arms,
        "presets": {
            "smoke": done.study.preset,
            "again": {"like": "smoke", "seeds": [2, 3], "tuned_in": "smoke", "tables": ["F"]},
        },
        "tables": {
            **done.study.tables,
            "F": {"title": "Again", "arms": arms, "against": ["pgd_at"], "note": "Why."},
        },
    }
    done.results.collect()
    bench = bench_of(Study.of(config, "again"), done.results.folder.parent, tmp_path)
    bench.run(arms, [2, 3])
    assert not (bench.results.work / "tuning").exists()
    assert bench.read("clat_random", 2)["tuned"] == done.read("clat_random", 0)["tuned"]
    bench.aggregate()
    text = (bench.results.folder / "results.md").read_text()
    assert "## A." not in text and "## F. Again\n\nWhy.\n" in text
    accuracy = {
        arm: [
            b.read(arm, seed)["results"]["last"]["clean"] for b, seed in ((done, 0), (done, 1), (bench, 2), (bench, 3))
        ]
        for arm in arms
    }
    rows = [row for row in rows_of(text) if row[:1] == ["CLAT objective on random layers"]]
    alone, together = ([row for row in rows if row[1] == count] for count in ("2 of 2", "4 of 4"))
    assert len(alone) == len(together) == 1
    assert alone[0][2].startswith(f"{100 * np.mean(accuracy['clat_random'][2:]):.1f} ±")
    assert together[0][2].startswith(f"{100 * np.mean(accuracy['clat_random']):.1f} ±")
    differences = [row[10] for row in rows if row[1] == "PGD-AT continued"]
    means = [
        np.mean(np.subtract(accuracy["clat_random"], accuracy["pgd_at"])[part]) for part in (slice(2, 4), slice(4))
    ]
    assert [cell.split(" ")[0] for cell in differences] == [f"{100 * mean:+.1f}" for mean in means]
    with pytest.raises(RefusedError, match="smoke has not tuned yet: rule_first"):
        bench.run(["rule_first"], [2])
