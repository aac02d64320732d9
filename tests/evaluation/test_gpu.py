"""`evaluation/gpu.py`: packed here, unpacked and run where nothing of ours is; stopped in time, and continued."""

import importlib.metadata
import json
import os
import shutil
import subprocess
import sys
import tarfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch
from bare_machine.cuda_tests import OUTCOMES
from bare_machine.outputs import LIMIT, PartResult, join_large_files, split_large_files
from bare_machine.packing import OVERHEAD, PIECE, pack, pieces
from bare_machine.parts import PATIENCE, Step, run_part, run_until
from bare_machine.requirements import NAMED
from bare_machine.training import load_images, train
from safetensors.torch import load_file

ROOT = Path(__file__).parents[2]
COMPACT = ROOT.parent / "shared" / "data" / "cifar10"

NOT_THERE = (
    *("art_clat", "art", "pyautoattack", "autoattack", "robustbench", "geotorch", "torchdiffeq", "gdown", "bs4"),
    *("soupsieve", "six", "tqdm", "joblib", "threadpoolctl", "cloudpickle", "packaging", "pytest", "_pytest", "pluggy"),
    *("iniconfig", "pygments", "matplotlib", "transformers", "jinja2"),
)

#: A machine without some packages: Python finds them nowhere but outside of its own folder of packages.
SITE = """
import os, sys
from importlib.machinery import PathFinder

HIDDEN = os.environ["HIDDEN"].split()

class Finder(PathFinder):
    @classmethod
    def find_spec(cls, name, path=None, target=None):
        if name in HIDDEN:
            path = [place for place in sys.path if "site-packages" not in place]
        return super().find_spec(name, path, target)

kept = [finder for finder in sys.meta_path if "__editable__" not in getattr(finder, "__module__", "")]
sys.meta_path[:] = [Finder if finder is PathFinder else finder for finder in kept]
"""

#: Asserted of the machine before anything is unpacked, and of what is imported afterwards.
ORIGINS = """
import sys
sys.path[:0] = [{root!r}]
sys.path.append({root!r} + "/packages")
import art_clat, art, pyautoattack, pytest
from art_clat.utils.robustbench_import import robustbench_utils
robustbench_utils()
for name in ("art_clat", "art", "pyautoattack", "robustbench", "pytest", "six", "joblib"):
    assert sys.modules[name].__file__.startswith({root!r}), sys.modules[name].__file__
"""


@pytest.fixture
def bare(tmp_path):
    """The environment of a machine with torch, torchvision, timm, NumPy, SciPy and scikit-learn alone."""
    site = tmp_path / "site"
    site.mkdir()
    (site / "sitecustomize.py").write_text(SITE)
    return {**os.environ, "PYTHONPATH": str(site), "HIDDEN": " ".join(NOT_THERE), "OMP_NUM_THREADS": "1"}


def gpu(root, environment, *arguments):
    command = [sys.executable, root / "evaluation" / "gpu.py", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, env=environment, cwd=root)


def test_pack_unpack_run(tmp_path, bare):
    data = tmp_path / "data"
    data.mkdir()
    (data / "unpack.py").write_text("")
    done = gpu(ROOT, os.environ, "--pack", tmp_path / "pieces", "--data", data)
    assert done.returncode == 0, done.stderr
    assert "tar xzf" in done.stdout and "--part train --minutes 9" in done.stdout
    found = sorted((tmp_path / "pieces").iterdir())
    assert len(found) == 3 and all(piece.stat().st_size < PIECE for piece in found)
    machine = tmp_path / "machine"
    for piece in found:
        with tarfile.open(piece) as archive:
            archive.extractall(machine, filter="data")
    assert (machine / "data" / "unpack.py").exists()
    assert not (machine / "packages" / "pyautoattack" / "examples").exists()
    found = importlib.metadata.distributions(path=[str(machine / "packages")])
    versions = {distribution.metadata["Name"].replace("-", "_") for distribution in found}
    assert versions == {name.replace("-", "_") for name in NAMED}
    texts = [path.read_text() for path in (machine / "evaluation").rglob("*.py")]
    assert not any(place in text for text in texts for place in ("shared/", str(ROOT)))

    lacking = subprocess.run([sys.executable, "-c", "import art"], env=bare, cwd=tmp_path, capture_output=True)
    assert b"No module named 'art'" in lacking.stderr
    origins = [sys.executable, "-c", ORIGINS.format(root=str(machine))]
    done = subprocess.run(origins, env=bare, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr

    shutil.rmtree(machine / "data")  # a training of random images takes seconds
    arguments = ["--device", "cpu", "--minutes", 5, "--output", tmp_path / "output"]
    parts = ("tests", "train", "speed")
    with ThreadPoolExecutor() as pool:
        finished = list(pool.map(lambda part: gpu(machine, bare, "--part", part, *arguments), parts))
    for part, done in zip(parts, finished, strict=True):
        output = tmp_path / "output" / part
        assert done.returncode == 0, done.stderr + "".join(log.read_text() for log in output.glob("*.log"))
        result = json.loads((output / "result.json").read_text())
        assert (result["part"], result["device"], result["failed"]) == (part, "CPU", {})
        assert result["is_finished"] and result["seconds"] > 0 and "torch" in result["environment"]["versions"]
        assert len(result["passed"]) == {"tests": 4, "train": 1, "speed": 1}[part]
        assert f"{part} on CPU: {len(result['passed'])} passed, 0 failed" in done.stdout
        assert all(path.stat().st_size <= LIMIT for path in output.rglob("*") if path.is_file())
    history = json.loads((tmp_path / "output" / "train" / "history.json").read_text())
    assert [record["stage"] for record in history["epochs"]] == ["adversarial training"] * 2 + ["clat"]
    assert load_file(tmp_path / "output" / "train" / "weights.safetensors")
    assert "| PGD-AT |" in (tmp_path / "output" / "speed" / "speed-cpu-float32.md").read_text()


def test_what_the_machine_lacks_is_named(bare):
    done = gpu(ROOT, {**bare, "HIDDEN": "scipy sklearn"}, "--part", "tests")
    assert done.returncode == 1 and "lacks scipy, scikit-learn: pip install scipy scikit-learn" in done.stderr
    done = gpu(ROOT, {**bare, "HIDDEN": "art"}, "--part", "tests")
    assert done.returncode == 1 and "lacks art: unpack all pieces" in done.stderr


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "pass one of --pack and --part"),
        (["--pack", "x", "--part", "tests"], "pass one of --pack and --part"),
        (["--part", "tests", "--minutes", "0"], "--minutes must be above 0"),
        (["--pack", "x", "--data", "/nowhere"], "`--data` must be a folder"),
        pytest.param(
            ["--part", "tests"],
            "torch sees no GPU",
            marks=pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a GPU"),
        ),
    ],
)
def test_arguments_are_refused(arguments, message):
    done = gpu(ROOT, os.environ, *arguments)
    assert done.returncode != 0 and message in done.stderr


class TestPieces:
    def files(self, folder, *sizes):
        for number, size in enumerate(sizes):
            (folder / f"{number}").write_bytes(np.random.bytes(size))
        return [(folder / f"{number}", f"{number}") for number in range(len(sizes))]

    def test_are_small_enough_and_hold_everything_in_order(self, tmp_path):
        files = self.files(tmp_path, *[30_000] * 5, 90_000, *[1] * 40)
        divided = list(pieces(files, limit=130_000))
        assert [file for piece in divided for file in piece] == files and len(divided) > 3
        for piece in divided:
            with tarfile.open(tmp_path / "piece.tar.gz", "w:gz", compresslevel=3) as archive:
                for path, name in piece:
                    archive.add(path, name)
            assert (tmp_path / "piece.tar.gz").stat().st_size < 130_000
            assert sum(path.stat().st_size for path, _ in piece) > 40 or piece == divided[-1]

    def test_a_file_that_fits_none_is_refused(self, tmp_path):
        with pytest.raises(SystemExit, match="1 has 130,000 bytes, more than a piece holds"):
            list(pieces(self.files(tmp_path, 10, 130_000), limit=130_000 + OVERHEAD))

    def test_of_an_earlier_call_are_replaced(self, tmp_path):
        (tmp_path / "piece-77.tar.gz").write_text("")
        written = pack(tmp_path, None)
        assert sorted(tmp_path.iterdir()) == written and len(written) == 2


class TestLargeFiles:
    def test_are_split_and_joined_again(self, tmp_path):
        content = np.random.bytes(2500)
        (tmp_path / "checkpoint").mkdir()
        (tmp_path / "checkpoint" / "last").write_bytes(content)
        (tmp_path / "small").write_bytes(content[:1000])
        split_large_files(tmp_path, limit=1000)
        found = sorted(path for path in tmp_path.rglob("*") if path.is_file())
        assert [path.name for path in found] == ["last.part-00", "last.part-01", "last.part-02", "small"]
        assert all(path.stat().st_size <= 1000 for path in found)
        join_large_files(tmp_path)
        assert (tmp_path / "checkpoint" / "last").read_bytes() == content
        assert sorted(path.name for path in tmp_path.rglob("*") if path.is_file()) == ["last", "small"]


def python(code, name="step", **environment):
    return Step(name, [sys.executable, "-c", code], environment)


@pytest.fixture
def result():
    return PartResult("speed", "CPU", {})


class TestMinutes:
    def test_a_command_is_ended_with_all_that_it_started(self, tmp_path):
        grandchild = f"import time, pathlib; time.sleep(3); pathlib.Path({str(tmp_path / 'late')!r}).touch()"
        code = f"import subprocess, sys; print('began'); subprocess.run([sys.executable, '-c', {grandchild!r}])"
        started = time.monotonic()
        assert run_until(python(code), tmp_path / "log", until=started + PATIENCE + 1.5) is None
        assert time.monotonic() - started < PATIENCE + 1.5
        assert "began" in (tmp_path / "log").read_text()
        time.sleep(max(0, 4 - (time.monotonic() - started)))
        assert not (tmp_path / "late").exists()

    def test_nothing_begins_without_time(self, tmp_path, result):
        run_part([python("")], result, tmp_path, until=time.monotonic() + PATIENCE - 0.1)
        assert not result.is_finished and not result.passed and not result.failed
        assert "something is left: run the same command again" in result.summary()

    def test_what_is_left_is_done_by_the_next_call(self, tmp_path, result):
        count = f"open({str(tmp_path / 'ran')!r}, 'a').write(sys.argv[0])"
        hangs = f"time.sleep(60 if len(open({str(tmp_path / 'ran')!r}).read()) < 6 else 0)"
        steps = [python(f"import sys; {count}", "first"), python(f"import sys, time; {count}; {hangs}", "second")]
        run_part(steps, result, tmp_path, until=time.monotonic() + PATIENCE + 2)
        assert (result.passed, result.is_finished) == (["first"], False)
        again = PartResult.resume(tmp_path, "speed", "CPU", {"date": "later"})
        assert again.passed == ["first"] and again.environment == {"date": "later"}
        run_part(steps, again, tmp_path, until=time.monotonic() + 60)
        assert (again.passed, again.is_finished) == (["first", "second"], True)
        assert (tmp_path / "ran").read_text() == "-c" * 3  # the first once

    def test_a_failure_is_told_and_tried_again(self, tmp_path, result):
        run_part(
            [python("raise SystemExit('no memory')"), python("", "other")],
            result,
            tmp_path,
            until=time.monotonic() + 60,
        )
        assert result.passed == ["other"] and result.is_finished
        assert "no memory" in result.failed["step"] and "failed: step: no memory" in result.summary()
        again = PartResult.resume(tmp_path, "speed", "CPU", {})
        run_part([python("")], again, tmp_path, until=time.monotonic() + 60)
        assert again.passed == ["other", "step"] and not again.failed

    def test_results_of_another_device_are_not_mixed(self, tmp_path, result):
        result.write(tmp_path)
        with pytest.raises(SystemExit, match="has results of CPU, this is GPU: use another --output"):
            PartResult.resume(tmp_path, "speed", "GPU", {})

    def test_tests_are_noted_one_by_one_and_those_that_passed_are_not_run_again(self, tmp_path, result):
        (tmp_path / "test_some.py").write_text(
            "import os, pytest\n"
            "def test_good(): open('good', 'a').write('x')\n"
            "def test_bad(): assert os.path.exists('mended'), 'not mended'\n"
            "def test_skipped(): pytest.skip('no GPU')\n"
            "def test_end(end): pass\n"
            "@pytest.fixture\ndef end():\n    yield\n    assert os.path.exists('mended'), 'not cleaned up'\n"
            "def test_last():\n    if not os.path.exists('mended'): os._exit(9)\n"
        )
        options = [
            "-p",
            "bare_machine.cuda_tests",
            "-p",
            "no:cacheprovider",
            "--rootdir",
            str(tmp_path),
            "test_some.py",
        ]
        code = f"import os, sys, pytest; os.chdir({str(tmp_path)!r}); sys.exit(pytest.main({options!r}))"
        step = python(code, "tests", **{OUTCOMES: str(tmp_path / "outcomes.jsonl")})
        run_part([step], result, tmp_path, until=time.monotonic() + 60)  # it dies in the last test
        assert result.passed == ["test_some.py::test_good"]
        assert "not mended" in result.failed["test_some.py::test_bad"]
        assert "not cleaned up" in result.failed["test_some.py::test_end"]
        assert "no GPU" in result.skipped["test_some.py::test_skipped"]
        (tmp_path / "mended").touch()
        for addopts in ("", "", "-k 'not skipped'"):  # what is skipped is left the second time, nothing the third
            (tmp_path / "pytest.ini").write_text(f"[pytest]\naddopts = {addopts}\n")
            run_part([step], result, tmp_path, until=time.monotonic() + 60)
            assert sorted(name[-4:] for name in result.passed) == ["_bad", "_end", "good", "last"]
            assert not result.failed and result.is_finished
        assert (tmp_path / "good").read_text() == "x"


class TestTraining:
    def test_a_finished_run_is_not_trained_again(self, tmp_path):
        images = load_images(None, tmp_path)
        train(images, device="cpu", output=tmp_path)
        history, weights = ((tmp_path / name).read_bytes() for name in ("history.json", "weights.safetensors"))
        train(images, device="cpu", output=tmp_path)  # with the seconds of the first
        assert ((tmp_path / "history.json").read_bytes(), (tmp_path / "weights.safetensors").read_bytes()) == (
            history,
            weights,
        )

    def test_a_folder_without_images_is_refused(self, tmp_path):
        with pytest.raises(SystemExit, match="must have cifar-10-batches-py or a script unpack.py"):
            load_images(tmp_path, tmp_path)

    @pytest.mark.skipif(not COMPACT.is_dir(), reason="needs CIFAR-10 in its compact form")
    def test_images_are_unpacked_once(self, tmp_path):
        x, y = load_images(COMPACT, tmp_path)
        assert x.shape == (50_000, 3, 32, 32) and x.dtype == np.float32 and 0 <= x.min() < x.max() <= 1
        assert np.bincount(y).tolist() == [5000] * 10
        before = (tmp_path / "cifar-10-batches-py" / "data_batch_1").stat().st_mtime_ns
        again, _ = load_images(COMPACT, tmp_path)
        assert np.array_equal(again[:100], x[:100])
        assert (tmp_path / "cifar-10-batches-py" / "data_batch_1").stat().st_mtime_ns == before
