"""RobustBench's `benchmark` on its own data."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from art_clat import create_backbone, evaluate_robustness, write_robustbench_entry
from art_clat.leaderboard.benchmark import run_benchmark
from art_clat.leaderboard.definitions import load_from_robustbench, model_definition, write_checkpoint
from art_clat.models.datasets import load_data
from art_clat.utils.robustbench_import import autoattack, robustbench_utils

robustbench_utils()  # makes the next one importable
import robustbench.eval  # noqa: E402

CIFAR10 = Path(__file__).parents[3] / "shared" / "data" / "cifar10"
ID = "Someone2026Small-R10"
SETTING = {"model_id": ID, "dataset": "cifar10", "norm": "Linf"}
#: Few and small operations, since AutoAttack makes thousands of passes.
VIT = {
    "name": "vit_tiny_patch16_224", "num_classes": 10, "input_size": (3, 32, 32), "patch_size": 16, "depth": 1,
    "embed_dim": 16, "num_heads": 1,
}  # fmt: skip


@pytest.mark.skipif(not CIFAR10.exists(), reason="no CIFAR-10 at ../shared/data/cifar10")
def test_robustbenchs_own_benchmark_agrees_on_real_cifar10_example_by_example(tmp_path, monkeypatch):
    """
    A network trained here, loaded by RobustBench's `load_model`, evaluated by its `benchmark` on its own data.

    AutoAttack's attacks are made short on both sides.
    """
    seeds = []

    class Short(autoattack().AutoAttack):
        def __init__(self, *args, **kwargs):
            super().__init__(*args, **kwargs)
            self.apgd.n_iter = self.apgd_targeted.n_iter = self.fab.n_iter = 10
            self.square.n_queries = 100

    class Seeded(Short):
        def __init__(self, *args, **kwargs):
            seeds.append(kwargs["seed"])
            super().__init__(*args, **kwargs)

    monkeypatch.setattr(autoattack(), "AutoAttack", Short)
    subprocess.run([sys.executable, str(CIFAR10 / "unpack.py"), str(tmp_path), "test_batch"], check=True)
    data = load_data("cifar10", data_dir=tmp_path, nb_examples=100)
    x, y = torch.as_tensor(data.x), torch.as_tensor(data.y)
    model = create_backbone(**VIT)
    optimizer = torch.optim.Adam(model.parameters(), 0.01)
    for _ in range(40):
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(x), y).backward()
        optimizer.step()
    model.eval()
    ours = evaluate_robustness(model, x[:16].numpy(), y[:16].numpy(), norm="Linf", eps=4 / 255, batch_size=16, seed=5)

    (tmp_path / "definition.py").write_text(model_definition(create_backbone, VIT, **SETTING))
    write_checkpoint(model, tmp_path / "weights.pt", tmp_path / "definition.py", **SETTING)
    theirs = load_from_robustbench(tmp_path / "definition.py", tmp_path / "weights.pt", **SETTING)
    arguments = {"eps": 4 / 255, "nb_examples": 16, "data_dir": tmp_path, "directory": tmp_path, "batch_size": 16}
    monkeypatch.setattr(robustbench.eval, "AutoAttack", Seeded)
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
    assert robustbench.eval.AutoAttack is Seeded  # nothing of RobustBench is changed
