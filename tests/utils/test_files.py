import os
import stat

import numpy as np
import pytest
import torch

from art_clat import RobustnessReport, write_robustbench_entry
from art_clat.utils.files import prepare, read, write


@pytest.fixture(params=[0o022, 0o077])
def expected(request, tmp_path):
    """Set a umask; return the permissions of a new file under it."""
    before = os.umask(request.param)
    (tmp_path / "any").write_text("")
    yield stat.S_IMODE((tmp_path / "any").stat().st_mode)
    os.umask(before)


@pytest.mark.skipif(os.name == "nt", reason="Windows has no umask")
def test_files_are_as_readable_as_the_umask_says(expected, tmp_path):
    verdicts = np.arange(24)
    report = RobustnessReport(
        norm="Linf", eps=8 / 255, nb_examples=24, clean=verdicts < 18, pgd=verdicts < 13, pgd_max_iter=20,
        autoattack_version="standard", warnings=(), seconds=1.0, seed=0, attacks={"apgd-ce": verdicts < 12},
        adversarial=np.zeros((24, 1, 2, 2), np.float32),
    )  # fmt: skip
    for _ in range(2):  # new, and replaced
        write(tmp_path / "run" / "last.safetensors", {"x": torch.zeros(3)}, {"a": 1})
        report.save(tmp_path / "report")
        write_robustbench_entry(report, model_id="M", dataset="cifar10", directory=tmp_path / "entries")
    files = {path.name: stat.S_IMODE(path.stat().st_mode) for path in tmp_path.rglob("*") if path.is_file()}
    assert files == dict.fromkeys(
        ("any", "last.safetensors", "report.json", "verdicts.npz", "adversarial.pt", "waterfall.png", "M.json"),
        expected,
    )


def test_files_that_a_kill_leaves_are_deleted(tmp_path, monkeypatch):
    """Here the kill interrupts the wait for the disk."""
    path = tmp_path / "last.safetensors"
    write(path, {"x": torch.zeros(3)}, {"a": 1})

    def killed(file):
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "fsync", killed)
    with pytest.raises(KeyboardInterrupt):
        write(path, {"x": torch.ones(3)}, {"a": 2})
    assert len(list(tmp_path.iterdir())) == 2
    prepare(tmp_path)
    assert list(tmp_path.iterdir()) == [path]
    tensors, content = read(path)
    assert content == {"a": 1} and torch.equal(tensors["x"], torch.zeros(3))
