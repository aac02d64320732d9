"""
RobustBench with the AutoAttack that PyPI has.

RobustBench 1.1.1 imports AutoAttack as ``autoattack`` and calls it as its repository's code is called. PyPI carries the
same authors' package as ``pyautoattack``, with another signature, and RobustBench requires it under that name. Where no
``autoattack`` is installed, this module puts a thin layer over ``pyautoattack`` in its place; the attacks are the
authors' own.
"""

from __future__ import annotations

import importlib.util
import logging
import sys
import warnings
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import ModuleType
from typing import Any

import torch


def autoattack() -> ModuleType:
    """
    Import ``autoattack``: the real package, or the layer over ``pyautoattack``.

    :return: A module with ``AutoAttack`` as in the authors' repository.
    :raises ImportError: If neither is installed.
    """
    if "autoattack" not in sys.modules:
        spec = importlib.util.find_spec("autoattack")
        if spec is None or spec.submodule_search_locations is None:  # a script of that name is not the package
            _install_layer()
    import autoattack

    return autoattack  # type: ignore[no-any-return]


def robustbench_utils() -> ModuleType:
    """
    Import ``robustbench.utils``, with ``autoattack`` in place so that the rest of RobustBench can be imported too.

    :return: The module.
    :raises ImportError: If RobustBench or what it needs is not installed.
    """
    autoattack()
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="pkg_resources is deprecated")
            import robustbench.utils
    except ImportError as error:
        raise ImportError(
            f'RobustBench cannot be imported ({error}). Install it with `pip install "art_clat[evaluation]"`; it needs '
            "setuptools below version 81."
        ) from error
    return robustbench.utils  # type: ignore[no-any-return]


def _install_layer() -> None:
    try:
        import pyautoattack
        import pyautoattack.checks
        import pyautoattack.state
    except ImportError as error:
        raise ImportError(
            'AutoAttack is not installed: `pip install "art_clat[evaluation]"` brings `pyautoattack`.'
        ) from error

    class AutoAttack(pyautoattack.AutoAttack):  # type: ignore[misc]
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
                model,
                norm=norm,
                eps=eps,
                seed=seed,
                attacks=attacks_to_run or None,
                version=version,
                device=device,
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
            if batch_size is not None:  # the package calls itself, in its own way
                return super().run_standard_evaluation(x_orig, y_orig, batch_size=batch_size, state_path=state_path)
            x_adv, y_adv = super().run_standard_evaluation(x_orig, y_orig, batch_size=bs, state_path=state_path)
            return (x_adv, y_adv) if return_labels else x_adv

    layer = ModuleType("autoattack", "The interface of AutoAttack's repository over the package pyautoattack.")
    layer.__version__ = pyautoattack.__version__  # type: ignore[attr-defined]
    layer.AutoAttack = AutoAttack  # type: ignore[attr-defined]
    layer.checks = pyautoattack.checks  # type: ignore[attr-defined]
    layer.state = pyautoattack.state  # type: ignore[attr-defined]
    layer.__path__ = []
    layer.__spec__ = ModuleSpec("autoattack", None, is_package=True)
    sys.modules["autoattack"] = layer
    sys.modules["autoattack.checks"] = pyautoattack.checks
    sys.modules["autoattack.state"] = pyautoattack.state
