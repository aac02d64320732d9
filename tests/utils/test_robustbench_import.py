"""Import RobustBench and AutoAttack as a user would: in scripts in other folders."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

import art_clat

REPOSITORY = Path(art_clat.__file__).parents[1]
BENCHMARK = "from robustbench.eval import benchmark; assert callable(benchmark)"
HELPERS = "from art_clat.utils.robustbench_import import autoattack, install_finder, robustbench_utils\n"


@pytest.fixture
def run(tmp_path):
    """Run Python code as a script in a new folder, and return the lines that it printed."""

    def run(code, *, command=False):
        (tmp_path / "script.py").write_text(code)
        arguments = ["-W", "ignore", *(["-c", code] if command else ["script.py"])]
        environment = {**os.environ, "PYTHONPATH": str(REPOSITORY)}
        done = subprocess.run(
            [sys.executable, *arguments], cwd=tmp_path, env=environment, capture_output=True, text=True
        )
        assert done.returncode == 0, done.stderr[-3000:]
        return done.stdout.splitlines()

    return run


@pytest.mark.parametrize(
    ("code", "command"),
    [
        (BENCHMARK, False),
        ("from robustbench.utils import load_model; assert callable(load_model)", False),
        ("import robustbench.eval", True),
    ],
)
def test_importing_the_package_makes_robustbench_importable(run, code, command):
    run(f"import art_clat\n{code}", command=command)


def test_the_finder_is_last_and_finds_the_authors_attacks(run):
    run(
        "import sys, art_clat, importlib.util\n"
        "loaded = {name.partition('.')[0] for name in sys.modules}\n"
        "assert not loaded & {'autoattack', 'pyautoattack', 'robustbench'}, loaded\n"
        "before = list(sys.meta_path)\n"
        f"{HELPERS}install_finder()\n"
        "assert sys.meta_path == before and type(before[-1]).__module__ == 'art_clat.utils.robustbench_import'\n"
        "assert not [finder for finder in before[:-1] if type(finder).__module__.startswith('art_clat')]\n"
        "import autoattack.checks, autoattack.state, autoattack.square, pyautoattack\n"
        "from autoattack.autoattack import AutoAttack\n"
        "for name in ('checks', 'state', 'square'):\n"
        "    assert getattr(autoattack, name) is getattr(pyautoattack, name), name\n"
        "    assert getattr(pyautoattack, name).__spec__.name == f'pyautoattack.{name}'\n"
        "assert AutoAttack is autoattack.AutoAttack and issubclass(AutoAttack, pyautoattack.AutoAttack)\n"
        "assert autoattack.__version__ == pyautoattack.__version__\n"
        "assert importlib.util.find_spec('autoattack') and importlib.util.find_spec('autoattack.nothing') is None"
    )


class TestSomethingElseOfThatName:
    @pytest.mark.parametrize("command", [False, True])
    def test_a_script_is_not_the_package(self, run, tmp_path, command):
        (tmp_path / "autoattack.py").write_text("raise SystemExit('the wrong one')\n")
        run(f"import art_clat\n{BENCHMARK}", command=command)

    def test_nor_is_a_folder(self, run, tmp_path):
        (tmp_path / "autoattack").mkdir()
        run(f"import art_clat\n{HELPERS}assert autoattack().AutoAttack; robustbench_utils()")

    def test_a_script_keeps_its_name_if_it_was_first(self, run, tmp_path):
        (tmp_path / "autoattack.py").write_text("mine = True\n")
        (said,) = run(
            "import art_clat, autoattack\n"
            f"assert autoattack.mine\n{HELPERS}"
            "try: robustbench_utils()\n"
            "except ImportError as error: print(error)"
        )
        assert str(tmp_path / "autoattack.py") in said and "rename that file" in said

    def test_the_real_package_is_left_alone(self, run, tmp_path):
        (tmp_path / "autoattack").mkdir()
        (tmp_path / "autoattack" / "__init__.py").write_text("class AutoAttack: real = True\n")
        said = run(
            "import art_clat, sys\n"
            f"{HELPERS}"
            "assert autoattack().AutoAttack.real and 'pyautoattack' not in sys.modules\n"
            "import autoattack as real\n"
            "assert real.__file__.endswith('__init__.py') and not hasattr(real, 'checks')\n"
            "try: import autoattack.checks\n"
            "except ModuleNotFoundError: print('it has no checks')\n"
        )
        assert said == ["it has no checks"]


def test_without_pyautoattack_it_says_how_to_get_it(run, tmp_path):
    """Python's message stays the same, and a script of that name is not taken for the package."""
    said = run(
        "import sys; sys.modules['pyautoattack'] = None\n"
        f"import art_clat\n{HELPERS}"
        "try: import autoattack as module\n"
        "except ModuleNotFoundError as error: print(error)\n"
        "open('autoattack.py', 'w').close()\n"
        "import importlib; importlib.invalidate_caches()\n"
        "try: autoattack()\n"
        "except ImportError as error: print(error)"
    )
    assert said[0] == "No module named 'autoattack'"
    assert 'AutoAttack is not installed: `pip install "art_clat[evaluation]"`' in said[1]
