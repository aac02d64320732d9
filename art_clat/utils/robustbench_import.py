"""
Make RobustBench work with the AutoAttack that PyPI has.

RobustBench 1.1.1 imports AutoAttack as ``autoattack``, its name in the authors' repository. On PyPI the same authors
publish it as ``pyautoattack``, with other signatures, and RobustBench requires it under that name. If no package
``autoattack`` is installed, this module provides one: the repository's interface over ``pyautoattack``. The attacks
are the authors'.
"""

from __future__ import annotations

import importlib
import importlib.util
import logging
import sys
import warnings
from collections.abc import Sequence
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import ModuleType
from typing import Any

import torch

NAME = "autoattack"


def install_finder() -> None:
    """
    Make ``import autoattack`` work if only ``pyautoattack`` is installed. Nothing is imported until then.

    The finder comes last, so a package ``autoattack`` takes precedence. A script ``autoattack.py``, or a plain folder
    of that name, keeps the name until RobustBench is imported, which needs the package.
    """
    if _FINDER not in sys.meta_path:
        sys.meta_path.append(_FINDER)
    if _GUARD not in sys.meta_path and NAME not in sys.modules and not _is_package(importlib.util.find_spec(NAME)):
        sys.meta_path.insert(0, _GUARD)


def autoattack() -> ModuleType:
    """
    Import ``autoattack``: the real package, or the layer over ``pyautoattack``.

    :return: A module with ``AutoAttack`` as in the authors' repository.
    :raises ImportError: If neither is installed, or a script called ``autoattack.py`` was imported before.
    """
    if NAME not in sys.modules:
        spec = importlib.util.find_spec(NAME)
        if not _is_package(spec):
            spec = _FINDER.find_spec(NAME)
        if spec is None:
            raise ImportError(
                'AutoAttack is not installed: `pip install "art_clat[evaluation]"` brings `pyautoattack`.'
            )
        _load(spec)
    module = importlib.import_module(NAME)
    if not hasattr(module, "AutoAttack"):
        raise ImportError(
            f"`import autoattack` finds {getattr(module, '__file__', None) or module}, which is not AutoAttack: rename "
            "that file, or call art_clat.utils.robustbench_import.autoattack() before it is imported."
        )
    return module


def robustbench_utils() -> ModuleType:
    """
    Import ``robustbench.utils``; after that the rest of RobustBench can be imported too.

    :return: The module.
    :raises ImportError: If RobustBench or a package that it needs is not installed.
    """
    autoattack()
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="pkg_resources is deprecated")
            return importlib.import_module("robustbench.utils")
    except ImportError as error:
        raise ImportError(
            f'RobustBench cannot be imported ({error}). Install it with `pip install "art_clat[evaluation]"`; it needs '
            "setuptools below version 81."
        ) from error


def _is_package(spec: ModuleSpec | None) -> bool:
    """Return whether a spec is a package, not a script ``autoattack.py`` or a folder without ``__init__.py``."""
    return spec is not None and spec.submodule_search_locations is not None and spec.origin is not None


def _load(spec: ModuleSpec) -> None:
    """Import a module from its spec, even if another module has its name."""
    assert spec.loader is not None
    module = sys.modules[spec.name] = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
    except BaseException:
        del sys.modules[spec.name]
        raise


class _Finder(MetaPathFinder, Loader):
    """Finds ``autoattack`` and its submodules in ``pyautoattack``."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        package, _, submodule = fullname.partition(".")
        if package != NAME:
            return None
        if submodule:  # only of the layer, not of another package called `autoattack`
            parent = getattr(sys.modules.get(NAME), "__spec__", None)
            if parent is None or parent.loader is not self:
                return None
        found = importlib.util.find_spec(f"py{fullname}")
        return None if found is None else ModuleSpec(fullname, self, origin=found.origin, is_package=not submodule)

    def exec_module(self, module: ModuleType) -> None:
        name = module.__name__
        if name == f"{NAME}.{NAME}":  # the module that defines the class in the repository
            sys.modules[name] = sys.modules[NAME]
        elif name != NAME:
            sys.modules[name] = importlib.import_module(f"py{name}")
        else:
            package = importlib.import_module(f"py{NAME}")
            module.__doc__ = "The interface of AutoAttack's repository over the package pyautoattack."
            module.__version__ = package.__version__  # type: ignore[attr-defined]
            module.AutoAttack = _repository_interface(package.AutoAttack)  # type: ignore[attr-defined]
            for submodule in ("checks", "state"):
                setattr(module, submodule, importlib.import_module(f"{NAME}.{submodule}"))


class _Guard(MetaPathFinder):
    """Loads the layer before RobustBench, which would find a script or folder called ``autoattack``."""

    def find_spec(self, fullname: str, path: Sequence[str] | None = None, target: ModuleType | None = None) -> None:
        if fullname == "robustbench" and NAME not in sys.modules:
            spec = _FINDER.find_spec(NAME)
            if spec is not None:
                _load(spec)


_FINDER = _Finder()
_GUARD = _Guard()


def _repository_interface(base: Any) -> Any:
    """Return a subclass of pyautoattack's class that has the interface of the authors' repository."""

    class AutoAttack(base):  # type: ignore[misc]
        """The constructor and the calls of the authors' repository, on their PyPI package."""

        def __init__(
            self,
            model: Any,
            norm: str = "Linf",
            eps: float = 0.3,
            seed: int | None = None,
            verbose: bool = True,
            attacks_to_run: list[str] | None = None,
            version: str = "standard",
            is_tf_model: bool = False,
            device: Any = "cuda",
            log_path: str | None = None,
        ) -> None:
            if is_tf_model:
                raise ValueError("`is_tf_model`: TensorFlow models are not supported by pyautoattack.")
            super().__init__(
                model, norm=norm, eps=eps, seed=seed, attacks=attacks_to_run or None, version=version, device=device
            )
            self.verbose = verbose
            if log_path is not None:
                handler = logging.FileHandler(log_path)
                handler.setLevel(logging.DEBUG)
                self.logger.addHandler(handler)
                self.logger.setLevel(logging.DEBUG)

        def run_standard_evaluation(
            self,
            x_orig: torch.Tensor,
            y_orig: torch.Tensor,
            bs: int = 250,
            return_labels: bool = False,
            state_path: Path | None = None,
            *,
            batch_size: int | None = None,
        ) -> Any:
            if batch_size is not None:  # pyautoattack calls itself this way
                return super().run_standard_evaluation(x_orig, y_orig, batch_size=batch_size, state_path=state_path)
            x_adv, y_adv = super().run_standard_evaluation(x_orig, y_orig, batch_size=bs, state_path=state_path)
            return (x_adv, y_adv) if return_labels else x_adv

    return AutoAttack
