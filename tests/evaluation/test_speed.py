"""`evaluation/speed`: it runs, its tables are made from what was measured, and what saves time can be taken away."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from speed.bench import Bench
from speed.command_line import main
from speed.contenders import PRECISIONS, Setting, matmul_precision
from speed.savings import SAVINGS, without

EVALUATION = Path(__file__).parents[2] / "evaluation"


@pytest.fixture
def bench():
    return Bench("small CNN", Setting(batch_size=64, batches=1, smoke=True))


def contender(bench):
    return bench.contenders({"first third": "network.3", "first half": "network.6"})["CLAT clean, first half"]


def test_speed_harness(tmp_path):
    """It runs and writes its table; how fast is not a test's business."""
    command = [sys.executable, EVALUATION / "speed", "--preset", "smoke", "--output", tmp_path / "speed.md"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    table = (tmp_path / "speed.md").read_text()
    for row in ("| ART Madry PGD |", "| PGD-AT |", "| CLAT clean, first half |", "Criticality of all 7 layers"):
        assert row in table
    assert "failed" not in table
    measured = json.loads((tmp_path / "speed.json").read_text())
    (result,) = measured["results"].values()
    forward = result["flops"]["forward"]
    assert result["flops"]["PGD-AT"] / forward == pytest.approx(22.98, abs=0.01)  # 10 × (1 + 1) and 3, less the stem
    assert result["flops"]["ART Madry PGD"] / forward == pytest.approx(34.98, abs=0.01)
    assert result["flops"]["CLAT clean, first half"] / forward == pytest.approx(10.42, abs=0.01)
    again = subprocess.run([*command, "--repeats", "1"], capture_output=True, text=True)  # nothing is left to measure
    assert again.returncode == 0 and "repeat" not in again.stderr
    assert measured["results"] == json.loads((tmp_path / "speed.json").read_text())["results"]


def test_results_of_another_setting_are_refused(tmp_path, capsys):
    committed = json.loads((EVALUATION / "results" / "speed-cpu.json").read_text())
    (tmp_path / "speed.json").write_text(json.dumps(committed))
    with pytest.raises(SystemExit):
        main(["--preset", "smoke", "--output", str(tmp_path / "speed.md")])
    assert "holds results of another setting" in capsys.readouterr().err


@pytest.mark.parametrize("name", ["speed-cpu", "speed-savings-cpu"])
def test_the_committed_tables_are_made_from_the_committed_results(tmp_path, name, capsys):
    results = EVALUATION / "results"
    (tmp_path / f"{name}.json").write_bytes((results / f"{name}.json").read_bytes())
    main([*["--savings"] * ("savings" in name), "--tables-only", "--output", str(tmp_path / f"{name}.md")])
    expected = (results / f"{name}.md").read_text()
    assert (tmp_path / f"{name}.md").read_text() == expected == capsys.readouterr().out


def test_tables_need_results(tmp_path, capsys):
    with pytest.raises(SystemExit):
        main(["--tables-only", "--output", str(tmp_path / "none.md")])
    assert "there are no results in" in capsys.readouterr().err


def test_savings_are_taken_away(bench):
    """Every row changes what runs: no weight gradients, whole batches, torch's BatchNorm, whole passes, all layers."""
    trained = contender(bench)

    def operations(saving):
        with without(saving):
            flops = trained.count_flops()
            with torch.profiler.profile() as profile:
                trained.epoch()
        return {event.key: event.count for event in profile.key_averages()}, flops

    with_all, flops = operations(None)
    assert with_all["_FrozenBatchNormBackward"] > 0
    for saving in SAVINGS:
        counts, more = operations(saving)
        if "BatchNorm" in saving:
            assert "_FrozenBatchNormBackward" not in counts and more == flops
        elif "chunks" in saving:
            assert counts["aten::convolution"] < with_all["aten::convolution"] and more == flops
        else:
            assert more > flops
    assert operations(None)[1] == flops  # everything is back in its place


def test_fixed_layers_are_trained_and_nothing_is_measured(bench):
    trained = contender(bench)
    before = {name: value.clone() for name, value in trained.trainer.classifier.model.named_parameters()}
    trained.epoch()
    after = dict(trained.trainer.classifier.model.named_parameters())
    assert [name for name, value in before.items() if not torch.equal(value, after[name])] == ["network.6.weight"]
    assert not trained.trainer.history.selections and trained.trainer.history.epochs[0].stage == "clat"


def test_precisions(bench):
    before = torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32
    for precision, allowed in zip(PRECISIONS, (False, True, True), strict=True):
        with matmul_precision(precision):
            assert torch.backends.cuda.matmul.allow_tf32 is torch.backends.cudnn.allow_tf32 is allowed
    assert (torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32) == before
    for precision in PRECISIONS:
        one = Bench("small CNN", Setting(batch_size=8, precision=precision))
        made = one.contenders({"first half": "network.6"})
        ours = {name: c.trainer.options.performance for name, c in made.items() if c.is_ours}
        amp = precision == "bfloat16"
        assert all(performance.amp is (amp or "amp=True" in name) for name, performance in ours.items())
        assert ("PGD-AT, amp=True" in ours) is not amp
        assert ours["PGD-AT, channels_last=True"].channels_last and ours["PGD-AT, compile=True"].compile
