"""What `pyproject.toml` promises."""

import re
from pathlib import Path

import pytest

import art_clat

ROOT = Path(__file__).parents[1]


def bounds(text, operator):
    """Names and versions of requirements such as `torch>=2.4`."""
    return {name.lower(): version for name, version in re.findall(rf"([\w-]+){operator}([\d.]+)", text)}


@pytest.fixture
def project():
    return (ROOT / "pyproject.toml").read_text(encoding="utf-8")


def test_ci_tests_the_lowest_versions_that_are_allowed(project):
    lists = re.search(r"dependencies = \[(.*?)^\]", project, re.DOTALL | re.MULTILINE)[1]
    lists += re.search(r"^evaluation = \[(.*?)^\]", project, re.DOTALL | re.MULTILINE)[1]
    allowed = bounds(lists, ">=")
    tested = bounds((ROOT / ".ci" / "lowest.txt").read_text(encoding="utf-8"), "==")
    assert len(allowed) >= 12
    for name, version in allowed.items():
        assert re.fullmatch(rf"{re.escape(version)}(\.0)*", tested[name]), f"{name}: {version} and {tested[name]}"


def test_every_dependency_has_a_lower_bound(project):
    lists = re.search(r"dependencies = \[(.*?)^\]", project, re.DOTALL | re.MULTILINE)[1]
    for requirement in re.findall(r'"(.*?)"', lists):
        assert re.fullmatch(r"[\w-]+>=[\d.]+", requirement), requirement


def test_the_version_has_one_source(project):
    assert re.fullmatch(r"\d+\.\d+\.\d+", art_clat.__version__)
    assert 'version = { attr = "art_clat.__version__" }' in project and not re.search(r'^version = "', project, re.M)
