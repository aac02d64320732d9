"""Examples in docstrings: those with ``>>>`` print what they say, those after ``Example::`` run."""

import doctest
import importlib
import inspect
import pkgutil
import re
import textwrap

import pytest
import torch
from art.attacks.evasion import ProjectedGradientDescent
from conftest import make_attack, make_classifier
from torch import nn

import art_clat
from art_clat.selection.rules import SELECTION_RULES
from art_clat.training.objectives import OBJECTIVES

MODULES = sorted(module.name for module in pkgutil.walk_packages(art_clat.__path__, "art_clat."))


def blocks(module):
    """The code after every ``Example::`` of a module, with the name of what it documents."""
    for test in doctest.DocTestFinder(exclude_empty=False).find(module):
        for indented in re.findall(r"^Example::\n\n((?:    .*\n|\n)+)", inspect.cleandoc(test.docstring) + "\n", re.M):
            yield test.name, textwrap.dedent(indented)


BLOCKS = [block for name in MODULES if not name.endswith("__main__") for block in blocks(importlib.import_module(name))]


@pytest.fixture
def registries():
    """The tables of rules and objectives, put back afterwards: examples register."""
    before = [(table, dict(table)) for table in (SELECTION_RULES, OBJECTIVES)]
    yield {"selection": set(SELECTION_RULES), "objective": set(OBJECTIVES)}
    for table, content in before:
        table.clear()
        table.update(content)


@pytest.fixture
def names(chain, data):
    """What an example may use: the package's names, a classifier, its attack and data."""
    classifier = make_classifier(chain)
    x, y = data
    return {
        **{name: getattr(art_clat, name) for name in art_clat.__all__},
        **{"torch": torch, "nn": nn, "ProjectedGradientDescent": ProjectedGradientDescent},
        **{"classifier": classifier, "attack": make_attack(classifier), "model": nn.Sequential()},
        **{"x_train": x, "y_train": y},
    }


@pytest.mark.parametrize("name", [name for name in MODULES if not name.endswith("__main__")])
def test_doctests(name, names):
    module = importlib.import_module(name)
    results = doctest.testmod(module, extraglobs=names | vars(module))
    assert results.failed == 0


def test_there_are_doctests():
    found = [
        example
        for name in MODULES
        if not name.endswith("__main__")
        for test in doctest.DocTestFinder().find(importlib.import_module(name))
        for example in test.examples
    ]
    assert len(found) >= 2 and len(BLOCKS) >= 4


@pytest.mark.parametrize(("name", "code"), BLOCKS, ids=[name for name, _ in BLOCKS])
def test_examples_in_docstrings(name, code, names, registries):
    names["model"].maxpool = nn.MaxPool2d(2)
    module = importlib.import_module(name.rpartition(".")[0])
    exec(compile(code, name, "exec"), vars(module) | names)
    for option, table in (("selection", SELECTION_RULES), ("objective", OBJECTIVES)):
        for registered in set(table) - registries[option]:  # what an example registers must also train
            trainer = art_clat.AdversarialTrainerCLATPyTorch(
                names["classifier"], names["attack"], **{option: registered}, seed=0
            )
            trainer.fit(names["x_train"], names["y_train"], nb_epochs=1, verbose=False)
