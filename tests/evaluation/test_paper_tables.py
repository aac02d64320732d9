import importlib.util
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from scipy import stats

SCRIPT = Path(__file__).parents[2] / "evaluation" / "paper_tables.py"

spec = importlib.util.spec_from_file_location("paper_tables", SCRIPT)
paper_tables = importlib.util.module_from_spec(spec)
spec.loader.exec_module(paper_tables)

CONFIG = paper_tables.load_config(SCRIPT.with_suffix(".toml"))
ARMS = ["pgd_at", "clat_random", "pgd_at_ema"]


def make_bench(folder, **preset):
    config = {**CONFIG, "presets": {"smoke": {**CONFIG["presets"]["smoke"], **preset}}, "arms": dict(CONFIG["arms"])}
    config["arms"]["clat"] = {**config["arms"]["clat"], "tune": {"lr": [1.0], "criticality_weight": [0.02, 0.1]}}
    config["arms"]["clat_random"] = {
        "title": "CLAT objective on random layers", "like": "clat", "trainer": {"selection": "random"}
    }  # fmt: skip
    config["tables"] = {"A": {"title": "Controls", "arms": [*ARMS, "clat"], "against": ["pgd_at"]}}
    return paper_tables.Bench(config, "smoke", results=folder / "results", work=folder / "work", data=None)


def without_circumstances(result):
    """A result without what two runs of the same may differ in."""
    history = result.get("history", {"epochs": [], "selections": []})
    for record in [*history["epochs"], *history["selections"]]:
        record.pop("seconds")
    return {key: value for key, value in result.items() if key not in ("date", "machine", "seconds_per_epoch")}


@pytest.fixture(scope="module")
def done(tmp_path_factory):
    bench = make_bench(tmp_path_factory.mktemp("bench"))
    paper_tables.run_all(bench, ARMS, [0, 1])
    return bench


@pytest.fixture(scope="module", autouse=True)
def _one_thread():  # another number of threads rounds in another order
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def read(bench, arm, seed):
    return json.loads(bench.run_file(arm, seed).read_text())


class TestConfiguration:
    def test_every_arm_and_table_is_whole(self):
        from art_clat import objectives, selection_rules
        from art_clat.training.objectives import FIRST_STAGES

        for name in CONFIG["arms"]:
            arm = paper_tables.resolve(CONFIG, name)
            assert arm["title"] and arm["tuned_by"] in CONFIG["arms"]
            assert arm.get("trainer", {}).get("selection", "criticality") in selection_rules()
            assert arm.get("trainer", {}).get("objective", "adversarial") in objectives()
            assert arm.get("base", "pgd_at") in {*FIRST_STAGES, *paper_tables.ART_TRAINERS}
        for letter, table in CONFIG["tables"].items():
            for name, others in paper_tables.references(CONFIG, table).items():
                bases = {paper_tables.resolve(CONFIG, one).get("base", "pgd_at") for one in (name, *others)}
                assert len(bases) == 1  # pairs begin at the same weights
                assert others or name in {"d_trades", "d_mart", "d_awp", "d_fbf", "rule_random"}
                if letter == "C" and name.startswith("c_") and name != "c_single_step":
                    assert others == ["clat_parameters"]  # not what that one is compared with elsewhere

    def test_presets_like_another(self):
        gpu, full = (paper_tables.resolve_preset(CONFIG, name) for name in ("gpu", "full"))
        assert full == {**gpu, "amp": False, "channels_last": False, "autoattack_images": 10_000}
        assert paper_tables.resolve_preset(CONFIG, "full_densenet121") == {**full, "backbone": "densenet121_cifar"}
        settings = set(gpu) | {"stem_stride", "validated_images", "backbone_arguments", "tuned_in"}
        assert all(set(paper_tables.resolve_preset(CONFIG, name)) <= settings for name in CONFIG["presets"])

    def test_like_takes_over_all_but_what_is_given(self):
        config = {
            "arms": {
                "a": {"title": "A", "trainer": {"objective": "clean", "budget": 0.1}, "tune": {"lr": [1]}},
                "b": {"title": "B", "like": "a", "trainer": {"budget": 0.2}, "reselect_every": 3},
            }
        }
        arm = paper_tables.resolve(config, "b")
        assert arm["trainer"] == {"objective": "clean", "budget": 0.2}
        assert (
            paper_tables.resolve({"arms": {**config["arms"], "b": {**config["arms"]["b"], "tune": {"lr": [2]}}}}, "b")[
                "tuned_by"
            ]
            == "b"
        )  # its own tuning
        assert arm["tuned_by"] == "a" and arm["title"] == "B" and arm["reselect_every"] == 3
        assert "like" in config["arms"]["b"] and config["arms"]["a"]["trainer"]["budget"] == 0.1

    def test_data_of_a_seed(self):
        preset = CONFIG["presets"]["smoke"]
        one, again, other = (paper_tables.load_data(preset, seed, None) for seed in (0, 0, 1))
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
        mean, half = paper_tables.interval(one)
        low, high = stats.t.interval(0.95, 4, loc=one.mean(), scale=one.std(ddof=1) / np.sqrt(5))
        assert (mean - half, mean + half) == pytest.approx((low, high))
        mean, half, p = paper_tables.paired(one, other)
        expected = stats.ttest_1samp(one - other, 0)
        assert p == pytest.approx(expected.pvalue)
        assert (mean - half, mean + half) == pytest.approx(tuple(expected.confidence_interval(0.95)))

    def test_one_seed_has_no_interval(self):
        assert np.isnan(paper_tables.interval([0.3])[1]) and np.isnan(paper_tables.paired([0.3], [0.2])[2])

    @pytest.mark.parametrize("by", [0.0, 11 / 400])
    def test_the_same_difference_every_time_proves_nothing(self, by):
        one = np.array([47, 33, 45]) / 400
        mean, half, p = paper_tables.paired(one + by, one)
        assert mean == pytest.approx(by) and np.isnan(half) and np.isnan(p)


class TestRuns:
    def test_every_arm_begins_where_the_first_stage_ended(self, done):
        for seed in (0, 1):
            first = json.loads((done.work / "first" / f"pgd_at-seed{seed}.json").read_text())
            assert len(first["epochs"]) == 2
            rates = [first["epochs"][-1]["learning_rate"]] + [
                record["learning_rate"] for record in read(done, "pgd_at", seed)["history"]["epochs"]
            ]
            expected = [0.05 * (1 + np.cos(np.pi * epoch / 4)) / 2 for epoch in (1, 2, 3)]
            assert rates == pytest.approx(expected)

    def test_results_are_whole_and_of_different_seeds(self, done):
        for arm in ARMS:
            one, other = (read(done, arm, seed) for seed in (0, 1))
            assert one["status"] == other["status"] == "done"
            assert without_circumstances(one)["history"] != without_circumstances(other)["history"]
            for when in ("last", "best"):
                assert 0 <= one["results"][when]["autoattack"] <= one["results"][when]["pgd20_on_autoattack_images"]
            assert (one["largest_trainable_share"] == 1) == (arm != "clat_random")
        assert read(done, "clat_random", 0)["tuned"]["criticality_weight"] in (0.02, 0.1)

    @pytest.mark.parametrize("base", ["awp", "fbf"])
    def test_first_stages_of_art(self, tmp_path, base):
        first, again = (make_bench(tmp_path / name).first_stage(0, base) for name in ("one", "two"))
        one, two = load_file(first), load_file(again)
        model = paper_tables.make_model(CONFIG["presets"]["smoke"], 0)
        for name, parameter in model.named_parameters():
            assert torch.equal(one[name], two[name]) and not torch.equal(one[name], parameter)
        model.load_state_dict(one)

    def test_what_is_done_is_not_done_again(self, done):
        files = sorted(done.results.rglob("*.json"))
        before = [file.stat().st_mtime_ns for file in files]
        paper_tables.run_all(done, ARMS, [0, 1])
        assert sorted(done.results.rglob("*.json")) == files
        assert [file.stat().st_mtime_ns for file in files] == before

    def test_another_configuration_is_refused(self, done):
        bench = make_bench(done.results.parents[1], lr=0.06)
        for action in (lambda: paper_tables.run_all(bench, ARMS, [0, 1]), lambda: paper_tables.aggregate(bench)):
            with pytest.raises(SystemExit, match="another configuration"):
                action()

    def test_nothing_is_gone_on_with_that_another_configuration_began(self, done):
        assert make_bench(done.results.parents[1]).work == done.work
        assert make_bench(done.results.parents[1], batch_size=16).work != done.work
        one, other = ({**done.config["arms"]["pgd_at"], "reselect_every": n} for n in (1, 2))
        assert done.fingerprint(one) != done.fingerprint(other)

    def test_values_that_diverge_are_not_chosen_and_stop_nothing(self, tmp_path):
        bench = make_bench(tmp_path)
        second_stage = bench.second_stage

        def diverge(name, seed, **values):
            if values.get("criticality_weight") == 0.02:
                raise FloatingPointError("lost")
            return second_stage(name, seed, **values)

        bench.second_stage = diverge
        paper_tables.run_all(bench, ["clat"], [0])
        assert bench.tuned("clat")["criticality_weight"] == 0.1
        assert "| diverged to" in paper_tables.chosen_values(bench, ["clat"])

    def test_runs_of_values_that_tuning_no_longer_chooses_are_refused(self, tmp_path):
        bench = make_bench(tmp_path)
        paper_tables.run_all(bench, ["clat"], [0])
        tuned = bench.tuned("clat")
        other = next(values for values in paper_tables.grid(bench.config["arms"]["clat"]) if values != tuned)
        for values, accuracy in ((tuned, 0.1), (other, 0.9)):
            path = bench.tuning_file("clat", values, 100)
            path.write_text(json.dumps({**json.loads(path.read_text()), "pgd20": accuracy}))
        for action in (lambda: paper_tables.run_all(bench, ["clat"], [0]), lambda: paper_tables.aggregate(bench)):
            with pytest.raises(SystemExit, match="tuning now chooses"):
                action()

    def test_tuning_and_first_stages_that_crash_are_recorded_and_stop_nothing_else(self, tmp_path):
        bench = make_bench(tmp_path)
        first_stage, second_stage = bench.first_stage, bench.second_stage

        def crash_first(seed, base="pgd_at"):
            if seed == 1:
                raise RuntimeError("no first stage")
            return first_stage(seed, base)

        def crash_second(name, seed, **values):
            if name == "clat":
                raise RuntimeError("no second stage")
            return second_stage(name, seed, **values)

        bench.first_stage, bench.second_stage = crash_first, crash_second
        paper_tables.run_all(bench, ["clat", "pgd_at"], [0, 1])
        assert bench.tuned("clat") is None
        errors = {(arm, seed): read(bench, arm, seed).get("error") for arm in ("clat", "pgd_at") for seed in (0, 1)}
        tuning = "RuntimeError: its tuning failed, RuntimeError: no second stage"
        assert errors == {("clat", 0): tuning, ("clat", 1): tuning, ("pgd_at", 0): None,
                          ("pgd_at", 1): "RuntimeError: no first stage"}  # fmt: skip
        paper_tables.aggregate(bench)
        assert "| 0 of 2, **2 failed** |" in (bench.results / "results.md").read_text()
        bench.first_stage, bench.second_stage = first_stage, second_stage
        paper_tables.run_all(bench, ["clat", "pgd_at"], [0, 1], retry=True)
        assert {read(bench, arm, seed)["status"] for arm, seed in errors} == {"done"}

    def test_killed_and_run_again_gives_the_same(self, done, tmp_path):
        config = tmp_path / "config.toml"
        config.write_text(SCRIPT.with_suffix(".toml").read_text())
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
        again = json.loads((tmp_path / "results" / "smoke" / "runs" / "pgd_at-seed0.json").read_text())
        assert without_circumstances(again) == without_circumstances(read(done, "pgd_at", 0))

    def test_a_crash_is_recorded_and_shown_and_can_be_tried_again(self, done, tmp_path, monkeypatch):
        bench = make_bench(tmp_path)
        second_stage = bench.second_stage

        def crash(arm, seed, **kwargs):
            if seed == 1:
                raise FloatingPointError("lost")
            return second_stage(arm, seed, **kwargs)

        bench.second_stage = crash
        paper_tables.run_all(bench, ["pgd_at"], [0, 1])
        assert read(bench, "pgd_at", 1)["status"] == "failed"
        paper_tables.aggregate(bench)
        text = (bench.results / "results.md").read_text()
        assert "| PGD-AT continued | 1 of 2, **1 failed** |" in text
        assert "- pgd_at, seed 1: FloatingPointError: lost" in text
        assert paper_tables.done(paper_tables.collect(bench, ["pgd_at"], [0, 1])["pgd_at"]).keys() == {0}
        bench.second_stage = second_stage
        paper_tables.run_all(bench, ["pgd_at"], [0, 1])
        assert read(bench, "pgd_at", 1)["status"] == "failed"
        paper_tables.run_all(bench, ["pgd_at"], [0, 1], retry=True)
        assert without_circumstances(read(bench, "pgd_at", 1)) == without_circumstances(read(done, "pgd_at", 1))


def rows_of(text):
    return [[cell.strip() for cell in row.split("|")[1:-1]] for row in text.split("\n")]


def test_table_is_what_the_runs_say(done):
    found = paper_tables.collect(done, [*ARMS, "clat"], [0, 1])
    rows = {row[0]: row[1:] for row in rows_of(paper_tables.table(done.config, "A", found, [0, 1]))}
    row, runs = rows["CLAT objective on random layers"], [read(done, "clat_random", seed) for seed in (0, 1)]
    assert row[0] == "2 of 2" and rows['CLAT, objective "adversarial"'][0] == "0 of 2"
    whats = [("last", "clean"), ("last", "pgd20"), ("last", "autoattack"), ("best", "autoattack")]
    whats += [("last", "pgd20_on_autoattack_images"), ("last", "train_pgd20")]
    for cell, (when, what) in zip(row[1:], whats, strict=False):
        assert cell.startswith(f"{np.mean([100 * run['results'][when][what] for run in runs]):.1f}")
    share = np.mean([100 * run["trainable_share"] for run in runs])
    assert row[7] == f"{share:.3g} %" and rows["PGD-AT continued"][7] == "100 %"


def test_differences_are_those_of_the_runs(done):
    found = paper_tables.collect(done, [*ARMS, "clat"], [0, 1])
    config = {**done.config, "arms": {**done.config["arms"]}}
    config["arms"]["pgd_at_ema"] = {**config["arms"]["pgd_at_ema"], "against": ["pgd_at", "clat_random"]}
    _, _, *rows = rows_of(paper_tables.differences(config, "A", found))
    titles = {name: config["arms"][name]["title"] for name in ARMS}
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
            pair = ([100 * read(done, name, seed)["results"][when][what] for seed in (0, 1)] for name in (one, other))
            difference = np.subtract(*pair)
            assert row[at].startswith(f"{difference.mean():+.1f}")
            if np.ptp(difference) > 1e-9:
                assert row[at + 1] == f"{stats.ttest_1samp(difference, 0).pvalue:.3f}"
        last = ([100 * read(done, name, seed)["history"]["epochs"][-1]["robust_accuracy"] for seed in (0, 1)]
                for name in (one, other))  # fmt: skip
        assert row[12].startswith(f"{np.subtract(*last).mean():+.1f}")
    for seed in (0, 1):  # which nothing is validated of
        found["pgd_at"][seed]["history"]["epochs"].clear()
    _, _, row, *_ = rows_of(paper_tables.differences(config, "A", found))
    assert row[2] and row[12:] == ["", ""]


def test_what_the_second_stage_did_is_in_the_histories(done):
    found = paper_tables.collect(done, ARMS, [0, 1])
    rows = {row[0]: row[1:] for row in rows_of(paper_tables.second_stages(done.config, found))}
    assert rows["PGD-AT continued"][1:] == [""] * 6
    histories = [read(done, "clat_random", seed)["history"] for seed in (0, 1)]
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
    found = paper_tables.collect(done, [*ARMS, "clat", "start", "d_trades"], [0, 1])
    found["start"] = found["d_trades"] = found["pgd_at"]  # neither is an arm's second stage from PGD-AT
    found["pgd_at_tenth"] = {0: found["pgd_at"][0]}  # one seed of two
    groups = paper_tables.trained_share(done.config, found, [0, 1])
    tuned = read(done, "clat_random", 0)["tuned"]["lr"]
    assert set(groups) == {("pgd_at", 1.0), ("adversarial", tuned)}
    ((share, accuracies),) = groups["adversarial", tuned]
    runs = [read(done, "clat_random", seed) for seed in (0, 1)]
    assert share == pytest.approx(np.mean([100 * run["trainable_share"] for run in runs])) and share < 100
    assert accuracies == [100 * run["results"]["last"]["pgd20"] for run in runs]
    assert [share for share, _ in groups["pgd_at", 1.0]] == [100]


def test_overfitting_is_correlated_among_arms_that_differ_in_no_more(tmp_path):
    groups = {
        ("pgd_at", 0.2): [(1.0, [20.0, 22.0]), (9.0, [18.0, 21.0]), (50.0, [19.0, 16.0])],
        ("pgd_at", 1.0): [(2.0, [5.0, 6.0]), (3.0, [50.0, 60.0])],
        ("adversarial", 0.2): [(share, [share, share]) for share in (1.0, 2.0, 3.0, 4.0)],  # these may differ in λ
    }
    text = paper_tables._overfitting(groups, tmp_path / "share.png")
    assert "over the 3 arms with PGD-AT's own loss and the learning-rate factor 0.2: Spearman's ρ = -1.00." in text
    assert (tmp_path / "share.png").stat().st_size > 1000
    del groups["pgd_at", 0.2]
    assert "Spearman" not in paper_tables._overfitting(groups, tmp_path / "share.png")


def test_stability(done):
    for seed in (0, 1):
        done.measure(seed)
    measurements = [json.loads(done.stability_file(seed).read_text()) for seed in (0, 1)]
    for entry in measurements:
        assert set(entry["measured"]) == {
            "PGD, 16 samples", "PGD, 32 samples", "FGSM, 32 samples", "APGD, 32 samples"
        }  # fmt: skip
        assert all(len(values) == len(entry["layers"]) for values in entry["measured"].values())
    text = paper_tables.stability_table(measurements)
    one, other = (entry["measured"]["PGD, 32 samples"] for entry in measurements)
    assert f"| two seeds, PGD, 32 samples | {stats.spearmanr(one, other).statistic:.2f} " in text
    made_up = [
        {"measured": {"PGD, 8 samples": [1, 2, 3], "PGD, 64 samples": values}} for values in ([1, 2, 3], [3, 2, 1])
    ]
    text = paper_tables.stability_table(made_up)
    assert "| two seeds, PGD, 64 samples | -1.00 (-1.00 to -1.00) | 0 % |" in text
    assert "| PGD, 8 samples, and PGD, 64 samples, the same network | 0.00 (-1.00 to 1.00) | 50 % |" in text


def test_fresh_seeds_take_what_another_preset_tuned_and_are_shown_by_themselves_and_together(done, tmp_path):
    arms = ["pgd_at", "clat_random"]
    config = {
        **done.config,
        "presets": {
            "smoke": done.preset,
            "again": {"like": "smoke", "seeds": [2, 3], "tuned_in": "smoke", "tables": ["F"]},
        },
        "tables": {
            **done.config["tables"],
            "F": {"title": "Again", "arms": arms, "against": ["pgd_at"], "note": "Why."},
        },
    }
    bench = paper_tables.Bench(config, "again", results=done.results.parent, work=tmp_path, data=None)
    paper_tables.run_all(bench, arms, [2, 3])
    assert not (bench.results / "tuning").exists()
    assert read(bench, "clat_random", 2)["tuned"] == read(done, "clat_random", 0)["tuned"]
    paper_tables.aggregate(bench)
    text = (bench.results / "results.md").read_text()
    assert "## A." not in text and "## F. Again\n\nWhy.\n" in text
    accuracy = {
        arm: [
            read(b, arm, seed)["results"]["last"]["clean"] for b, seed in ((done, 0), (done, 1), (bench, 2), (bench, 3))
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
    with pytest.raises(SystemExit, match="smoke has not tuned yet: rule_first"):
        paper_tables.run_all(bench, ["rule_first"], [2])
