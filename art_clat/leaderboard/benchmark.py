"""RobustBench's own evaluation."""

from __future__ import annotations

import contextlib
import os
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import numpy.typing as npt
import torch
from torch import nn

from art_clat.leaderboard.entries import (
    working_directory,
)
from art_clat.models.datasets import only_test_files
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
    Evaluate a network with RobustBench's own ``benchmark``, and give its verdict on every example.

    ``benchmark`` gives AutoAttack no seed, which then goes by the clock; with the seed and the batch size of
    :func:`evaluate_robustness` it has the same adversarial examples, for the same network and device. That and nothing
    else is changed. (Its own `aa_state_path`, which would hold the verdicts, fails in RobustBench 1.1.1.)

    :param model: Takes images in [0, 1].
    :param model_id: RobustBench's key of the model.
    :param dataset: ``"cifar10"``, ``"cifar100"`` or ``"imagenet"``.
    :param norm: ``"Linf"`` or ``"L2"``.
    :param eps: In units of inputs in [0, 1].
    :param nb_examples: Number of test examples, the first ones.
    :param data_dir: Where the test set is, or is downloaded to, in torchvision's layout.
    :param directory: Where ``benchmark`` writes ``model_info``.
    :param batch_size: Examples in a batch.
    :param seed: Of AutoAttack; `None` for RobustBench's way, the time in seconds.
    :param device: Where to run.
    :param preprocessing: RobustBench's name of how ImageNet's images are resized and cropped; `None`: its own choice.
    :return: What ``benchmark`` returned, clean and robust accuracy in [0, 1], and whether each example is classified
            correctly under AutoAttack.
    :raises ImportError: If RobustBench is not installed.
    """
    robustbench_utils()
    import robustbench.data
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

    place = str(Path(data_dir).resolve())
    with contextlib.ExitStack() as stack:
        if dataset in ("cifar10", "cifar100"):
            stack.enter_context(only_test_files(getattr(robustbench.data.datasets, dataset.upper())))
        stack.enter_context(mock.patch.object(robustbench.eval, "AutoAttack", Recorded))
        stack.enter_context(working_directory(Path(directory)))
        clean, robust = robustbench.eval.benchmark(
            model, n_examples=nb_examples, dataset=dataset, threat_model=norm, to_disk=True, model_name=model_id,
            data_dir=place, device=torch.device(device), batch_size=batch_size, eps=eps, preprocessing=preprocessing,
        )  # fmt: skip
    return clean, robust, found[0]
