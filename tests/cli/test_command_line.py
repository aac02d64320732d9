"""What `art-clat` understands, which function it calls with what, and how it fails."""

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from evaluation_run import held_out
from launching import launch

from art_clat import RobustnessReport, __version__, cli
from art_clat.leaderboard import submission
from art_clat.report import page
from art_clat.robustness import by_name

ROOT = Path(__file__).parents[2]
EVALUATE = ["evaluate", "--model", "m:f", "--dataset", "digits", "--eps", "8/255", "--output", "out"]
SUBMIT = ["submit", "runs/a", "--output", "out", "--model-id", "A2026B_R18", "--title", "T", "--authors", "A. B"]
SUBMIT += ["--link", "https://example.org", "--architecture", "ResNet-18"]


def run_python(*arguments, cwd, **environment):
    return subprocess.run(
        [sys.executable, *map(str, arguments)],
        capture_output=True, text=True, timeout=300, cwd=cwd, env={**os.environ, **environment},
    )  # fmt: skip


@pytest.fixture
def called(monkeypatch):
    """The calls that the command line makes, without the work."""
    calls = []
    verdicts = np.array([True, False])
    report = RobustnessReport(
        norm="Linf", eps=0.1, nb_examples=2, clean=verdicts, pgd=verdicts, pgd_max_iter=1,
        autoattack_version=None, warnings=(), seconds=0.0, seed=0,
    )  # fmt: skip

    def record(result):
        return lambda *args, **kwargs: (calls.append((args, kwargs)), result)[1]

    monkeypatch.setattr(by_name, "evaluate_by_name", record(report))
    monkeypatch.setattr(submission, "write_submission", record(["a doubt"]))
    monkeypatch.setattr(page, "write_page", record(Path(__file__)))
    return calls


class TestParsing:
    @pytest.mark.parametrize(("text", "value"), [("8/255", 8 / 255), ("0.5", 0.5), ("1", 1.0)])
    def test_fractions(self, text, value):
        assert cli.fraction(text) == value

    @pytest.mark.parametrize("text", ["8/0", "eight", ""])
    def test_what_is_no_fraction(self, text, capsys):
        with pytest.raises(SystemExit) as stopped:
            cli.main([*EVALUATE[:5], "--eps", text, "--output", "out"])
        assert stopped.value.code == 2
        assert f"a number such as 8/255 or 0.5, got {text!r}" in capsys.readouterr().err

    @pytest.mark.parametrize(
        ("arguments", "said"),
        [
            ([], "required: evaluate | submit | report"),
            (["evaluat"], "invalid choice: 'evaluat'"),
            (["evaluate", "--model", "m:f"], "required: --dataset, --eps, --output"),
            ([*EVALUATE, "--norm", "L3"], "invalid choice: 'L3'"),
            ([*EVALUATE, "--version", "best"], "invalid choice: 'best'"),
            (["submit", "a"], "required: --output, --model-id, --title, --authors, --link, --architecture"),
            (["report"], "required: RUN"),
        ],
    )
    def test_what_is_missing_or_wrong_is_named(self, arguments, said, capsys):
        with pytest.raises(SystemExit) as stopped:
            cli.main(arguments)
        assert stopped.value.code == 2 and said in capsys.readouterr().err

    def test_version(self, capsys):
        with pytest.raises(SystemExit) as stopped:
            cli.main(["--version"])
        assert stopped.value.code == 0 and capsys.readouterr().out == f"art_clat {__version__}\n"


class TestDispatch:
    def test_evaluate(self, called, capsys):
        cli.main([*EVALUATE, "--version", "none", "--n-examples", "5", "--checkpoint", "w.pt"])
        (((request,), told),) = called
        assert request == by_name.NamedEvaluation(
            model="m:f", dataset="digits", eps=8 / 255, output=Path("out"), version=None, n_examples=5,
            checkpoint=Path("w.pt"),
        )  # fmt: skip
        assert told == {
            "command": "art-clat evaluate --model m:f --dataset digits --eps 8/255 --output out --version none "
            "--n-examples 5 --checkpoint w.pt"
        }
        out = capsys.readouterr().out
        assert "clean                    50.00 %" in out and "Everything else is in out." in out

    def test_evaluate_in_one_of_several_processes(self, called, capsys, monkeypatch):
        monkeypatch.setenv("WORLD_SIZE", "4")
        monkeypatch.setenv("RANK", "1")
        cli.main([*EVALUATE, "--dataset", "a folder"])
        ((_, told),) = called
        assert told["command"] == (
            "torchrun --nproc-per-node 4 -m art_clat evaluate --model m:f --dataset digits --eps 8/255 --output out "
            "--dataset 'a folder'"
        )
        assert capsys.readouterr().out == ""  # the first process says it

    def test_submit(self, called, capsys):
        cli.main([*SUBMIT, "--additional-data", "--benchmark", "--license", "MIT"])
        (((asked,), _),) = called
        assert asked == submission.Submission(
            run=Path("runs/a"), output=Path("out"), model_id="A2026B_R18", title="T", authors="A. B",
            link="https://example.org", architecture="ResNet-18", additional_data=True, benchmark=True, license="MIT",
        )  # fmt: skip
        assert capsys.readouterr().out == "! a doubt\nout/ISSUE.md is the filled form; search the folder for TODO.\n"

    def test_report(self, called, capsys):
        cli.main(["report", "a", "b"])
        assert called == [(([Path("a"), Path("b")], Path("report.html")), {})]
        assert capsys.readouterr().out.endswith("test_command_line.py: 0.01 MB\n")


class TestErrors:
    @pytest.mark.parametrize("error", [ValueError, TypeError, OSError, ImportError])
    def test_one_line(self, error, monkeypatch):
        def fail(*args, **kwargs):
            raise error("`this` is wrong.")

        monkeypatch.setattr(by_name, "evaluate_by_name", fail)
        with pytest.raises(SystemExit) as stopped:
            cli.main(EVALUATE)
        assert stopped.value.code == "art-clat evaluate: `this` is wrong."

    def test_an_error_of_ours_has_its_traceback(self, monkeypatch):
        def fail(*args, **kwargs):
            raise ZeroDivisionError

        monkeypatch.setattr(page, "write_page", fail)
        with pytest.raises(ZeroDivisionError):
            cli.main(["report", "a"])

    @pytest.mark.parametrize(
        ("arguments", "said"),
        [
            (EVALUATE, "art-clat evaluate: interrupted; the same command continues where out was left."),
            (SUBMIT, "art-clat submit: interrupted."),
        ],
    )
    def test_interruption(self, arguments, said, monkeypatch):
        def interrupt(*args, **kwargs):
            raise KeyboardInterrupt

        monkeypatch.setattr(by_name, "evaluate_by_name", interrupt)
        monkeypatch.setattr(submission, "write_submission", interrupt)
        with pytest.raises(SystemExit) as stopped:
            cli.main(arguments)
        assert stopped.value.code == said

    def test_a_folder_that_is_no_run(self, tmp_path):
        done = run_python("-m", "art_clat", "report", tmp_path, cwd=tmp_path)
        assert done.returncode == 1 and done.stdout == ""
        assert done.stderr.splitlines()[-1].startswith(f"art-clat report: {tmp_path} is not the folder of a run")
        assert "Traceback" not in done.stderr


def test_importing_the_package_loads_none_of_it(tmp_path):
    unwanted = ("art_clat.cli", "art_clat.report", "jinja2", "matplotlib", "robustbench", "pyautoattack", "autoattack")
    code = f"import art_clat, sys; print([name for name in {unwanted} if name in sys.modules])"
    assert run_python("-c", code, cwd=tmp_path).stdout == "[]\n"


class TestScripts:
    @pytest.mark.parametrize("name", ["evaluate", "submit", "report"])
    def test_they_call_the_command_line(self, name, tmp_path):
        done = run_python(ROOT / "evaluation" / f"{name}.py", "--help", cwd=tmp_path)
        assert done.returncode == 0 and done.stdout.startswith(f"usage: art-clat {name} ")

    def test_the_scripts_are_no_modules_of_the_users(self, tmp_path):
        np.savez(tmp_path / "x.npz", x=np.zeros((2, 1, 8, 8), dtype=np.float32), y=np.arange(2))
        arguments = ["--model", "timm_sweep:main", "--dataset", "x.npz", "--eps", "0.1", "--output", tmp_path / "out"]
        done = run_python(ROOT / "evaluation" / "evaluate.py", *arguments, cwd=tmp_path)
        assert done.returncode == 1 and "No module named 'timm_sweep'" in done.stderr

    def test_modules_of_the_users_are_found(self, tmp_path):
        np.savez(tmp_path / "x.npz", x=np.zeros((2, 1, 8, 8), dtype=np.float32), y=np.arange(2))
        (tmp_path / "mine.py").write_text("def make():\n    raise ValueError('reached')\n")
        arguments = ["--model", "mine:make", "--dataset", "x.npz", "--eps", "0.1", "--output", tmp_path / "out"]
        done = run_python(ROOT / "evaluation" / "evaluate.py", *arguments, cwd=tmp_path)
        assert done.returncode == 1 and "mine:make failed: ValueError: reached" in done.stderr

    def test_under_torchrun(self, tmp_path):
        x, y = held_out(6)
        np.savez(tmp_path / "x.npz", x=x, y=y)
        tests = ROOT / "tests"
        (tmp_path / "mine.py").write_text(
            f"import sys\nsys.path.append({str(tests)!r})\nfrom evaluation_run import trained as make\n"
        )
        done = launch(
            2, "-m", "art_clat", "evaluate", "--model", f"{tmp_path / 'mine.py'}:make", "--dataset", tmp_path / "x.npz",
            "--eps", "0.1", "--version", "none", "--pgd-steps", 2, "--batch-size", 3, "--output", tmp_path / "out",
        )  # fmt: skip
        assert done.returncode == 0, done.stderr[-2000:]
        report, about = RobustnessReport.load(tmp_path / "out")
        assert report.nb_examples == 6 and about["processes"] == 2
        assert about["command"].startswith("torchrun --nproc-per-node 2 -m art_clat evaluate --model ")
        assert done.stdout.count("Everything else is in") == 1
