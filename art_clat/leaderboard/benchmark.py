"""RobustBench's own evaluation."""

from __future__ import annotations

import os
from pathlib import Path
from types import FunctionType
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import nn

from art_clat.leaderboard.entries import working_directory
from art_clat.models.datasets import load_data
from art_clat.utils.robustbench_import import robustbench_utils


def run_benchmark(
    model: nn.Module,
    *,
    model_id: str,
    dataset: str,
    norm: str,
    eps: float,
    nb_examples: int,
    data_dir: str | os.PathLike[str],
    directory: str | os.PathLike[str] = ".",
    batch_size: int = 128,
    seed: int | None = None,
    device: torch.device | str = "cpu",
    preprocessing: str | None = None,
) -> tuple[float, float, npt.NDArray[np.bool_]]:
    """
    Evaluate a network with RobustBench's own ``benchmark``, and return its verdict on every example as well.

    With the seed and the batch size of :func:`~art_clat.evaluate_robustness`, the same network on the same device gets
    the same adversarial examples. ``benchmark`` itself seeds AutoAttack by the clock and has no argument for a seed. It
    also asks for CIFAR's training files, which it does not use. So this function runs a copy of ``benchmark`` that
    finds two other things under the names it looks up: AutoAttack with a seed, and a loader of CIFAR's test set alone.
    Nothing of RobustBench is changed. (``aa_state_path``, which would keep the verdicts, fails in RobustBench 1.1.1.)

    :param model: A network that takes images in [0, 1].
    :param model_id: RobustBench's key of the model.
    :param dataset: ``"cifar10"``, ``"cifar100"`` or ``"imagenet"``.
    :param norm: ``"Linf"`` or ``"L2"``.
    :param eps: ε, in units of inputs in [0, 1].
    :param nb_examples: Number of test examples, the first ones.
    :param data_dir: The folder of the test set, in torchvision's layout. CIFAR is downloaded if it is not there.
    :param directory: Where ``benchmark`` writes ``model_info``.
    :param batch_size: Examples in a batch.
    :param seed: Seed of AutoAttack; `None` to seed it by the clock, as RobustBench does.
    :param device: Where to run.
    :param preprocessing: RobustBench's name of how ImageNet's images are resized and cropped; `None` for its choice.
    :return: Clean and robust accuracy in [0, 1], as ``benchmark`` returns them, and whether each example is classified
            correctly under AutoAttack, shape (nb_examples,).
    :raises ImportError: If RobustBench is not installed.
    :raises OSError: If CIFAR's test set is not there and cannot be downloaded.
    """
    robustbench_utils()
    import robustbench.eval

    found: list[npt.NDArray[np.bool_]] = []

    class Recorded(robustbench.eval.AutoAttack):  # type: ignore[misc]
        def __init__(self, *args: Any, **kwargs: Any) -> None:
            super().__init__(*args, **kwargs, seed=seed)

        def run_standard_evaluation(self, x: torch.Tensor, y: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
            x_adv: torch.Tensor = super().run_standard_evaluation(x, y, *args, **kwargs)
            if "state_path" in kwargs:  # RobustBench's call, not the package's own within it
                with torch.no_grad():
                    predicted = [model(batch.to(device)).argmax(1).cpu() for batch in x_adv.split(batch_size)]
                found.append((torch.cat(predicted) == y.cpu()).numpy())
            return x_adv

    names: dict[str, Any] = {"AutoAttack": Recorded}
    if dataset in ("cifar10", "cifar100"):
        names["load_clean_dataset"] = _load_test_set
    place = str(Path(data_dir).resolve())
    with working_directory(Path(directory)):
        clean, robust = _looking_up(robustbench.eval.benchmark, names)(
            model, n_examples=nb_examples, dataset=dataset, threat_model=norm, to_disk=True, model_name=model_id,
            data_dir=place, device=torch.device(device), batch_size=batch_size, eps=eps, preprocessing=preprocessing,
        )  # fmt: skip
    return clean, robust, found[0]


def _load_test_set(dataset: Any, nb_examples: int, data_dir: str, _: object) -> tuple[torch.Tensor, torch.Tensor]:
    """Load CIFAR's test set with the arguments of RobustBench's ``load_clean_dataset``."""
    data = load_data(dataset.value, data_dir=data_dir, nb_examples=nb_examples)
    return torch.as_tensor(data.x), torch.as_tensor(data.y)


def _looking_up(function: FunctionType, names: dict[str, Any]) -> FunctionType:
    """Return a copy of a function that finds other things under some of the names of its module."""
    copied = FunctionType(
        function.__code__,
        {**function.__globals__, **names},
        function.__name__,
        function.__defaults__,
        function.__closure__,
    )
    copied.__kwdefaults__ = function.__kwdefaults__
    return copied
