"""Evaluate a model and test data given by name, and save the result: `art-clat evaluate`."""

from __future__ import annotations

import contextlib
import logging
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias

import torch
from art.estimators.classification import PyTorchClassifier
from torch import nn

from art_clat.models.by_name import imagenet_preprocessing, load_model
from art_clat.models.datasets import EvaluationData, load_data
from art_clat.robustness.checks import count_classes
from art_clat.robustness.evaluate import PATIENCE, evaluate_robustness
from art_clat.robustness.report import RobustnessReport
from art_clat.utils.environment import describe_environment
from art_clat.utils.processes import Ranks
from art_clat.utils.progress import logging_above_the_bar

Network: TypeAlias = nn.Module | PyTorchClassifier

#: Log records of an evaluation come from loggers below this one; of what is read before, from those below the other.
LOGGER, READING = "art_clat.robustness", "art_clat.models.weight_files"


@dataclass(frozen=True, kw_only=True)
class NamedEvaluation:
    """
    What to evaluate, how, and where to write it.

    :param model: A timm name, RobustBench's identifier of a model, ``module:function`` or ``file.py:function``.
    :param dataset: A name of :data:`art_clat.models.datasets.DATASETS`, an image folder or an ``.npz`` file.
    :param eps: Radius of the ball, for inputs in [0, 1].
    :param output: The folder of the results; ``state`` in it is where a killed evaluation continues.
    :param norm: ``"Linf"``, ``"L2"`` or ``"L1"``.
    :param checkpoint: A file of weights or the folder of a run; `None` if the model brings its own.
    :param weights: Which of the checkpoint's weights to read, ``"average"`` or ``"raw"``; `None` for the average if
           there is one.
    :param model_dir: Where RobustBench keeps its models' weights.
    :param data_dir: Where CIFAR or ImageNet is.
    :param preprocessing: RobustBench's name of how images are resized and cropped; `None` for the model's own on
           ImageNet, and for no change elsewhere.
    :param class_order: How an image folder's folders are numbered, ``"string"`` or ``"natural"``.
    :param class_map: A file that says which class a folder is.
    :param num_classes: Number of classes; `None` for what the data say.
    :param n_examples: Number of examples; `None` for all.
    :param version: Of AutoAttack; `None` leaves AutoAttack out.
    :param pgd_steps: Number of PGD steps.
    :param pgd_restarts: Number of PGD's random starts.
    :param transfer_from: Another model, by name; its adversarial examples are tried on this one.
    :param transfer_checkpoint: That model's weights.
    :param batch_size: Examples in a batch.
    :param seed: Seed of the attacks.
    :param device: Torch's name of it; `None` for a GPU if there is one.
    """

    model: str
    dataset: str
    eps: float
    output: Path
    norm: str = "Linf"
    checkpoint: Path | None = None
    weights: str | None = None
    model_dir: Path = Path("models")
    data_dir: Path = Path("data")
    preprocessing: str | None = None
    class_order: str | None = None
    class_map: Path | None = None
    num_classes: int | None = None
    n_examples: int | None = None
    version: str | None = "standard"
    pgd_steps: int = 20
    pgd_restarts: int = 1
    transfer_from: str | None = None
    transfer_checkpoint: Path | None = None
    batch_size: int = 128
    seed: int = 0
    device: str | None = None


def evaluate_by_name(request: NamedEvaluation, *, command: str | None = None) -> RobustnessReport:
    """
    Evaluate, and let the first process write ``report.json``, ``verdicts.npz``, ``adversarial.pt``, ``autoattack.log``
    and ``waterfall.png``.

    :param request: What to evaluate.
    :param command: The command line, for ``report.json``.
    :return: The report, the same in every process.
    :raises ValueError: If the output folder holds another evaluation, or as :func:`evaluate_robustness`,
            :func:`load_model` and :func:`load_data`.
    :raises OSError: If a file is missing and cannot be downloaded.
    """
    device = choose_device(request.device)
    ranks = Ranks.join(device, PATIENCE)
    state = request.output / "state"
    if (request.output / "report.json").exists() and not state.exists():
        raise ValueError(f"`output`: {request.output} holds the results of something else. Name another folder.")
    preprocessing: str | Callable[[Any], Any] | None = request.preprocessing
    if request.dataset == "imagenet" and preprocessing is None:
        preprocessing = imagenet_preprocessing(request.model, request.norm)
    data, model, source = _load(request, preprocessing, ranks, device)
    with log_to(request.output / "autoattack.log"):
        report = evaluate_robustness(
            model,
            data.x,
            data.y,
            norm=request.norm,
            eps=request.eps,
            autoattack_version=request.version,
            pgd_max_iter=request.pgd_steps,
            pgd_restarts=request.pgd_restarts,
            transfer_from=source,
            batch_size=request.batch_size,
            seed=request.seed,
            checkpoint=state,
            verbose=True,
        )
    if ranks.rank == 0:
        report.save(
            request.output,
            model=_facts_of_model(request.model, request.checkpoint) | {"weights": request.weights},
            transfer_from=request.transfer_from and _facts_of_model(request.transfer_from, request.transfer_checkpoint),
            data={
                "name": request.dataset,
                "shape": list(data.x.shape),
                "preprocessing": repr(preprocessing) if callable(preprocessing) else preprocessing,
                "class_order": request.class_order,
                "class_map": None if request.class_map is None else str(request.class_map),
            },
            batch_size=request.batch_size,
            processes=ranks.size,
            **({} if command is None else {"command": command}),
            **describe_environment(device),
        )
    return report


def choose_device(name: str | None = None) -> torch.device:
    """
    Choose where to compute; each of several processes takes its own GPU.

    :param name: Torch's name of the device, or `None` for a GPU if there is one.
    :return: The device.
    """
    device = torch.device(name or ("cuda" if torch.cuda.is_available() else "cpu"))
    if device.type == "cuda" and device.index is None:
        device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)) % torch.cuda.device_count())
    if device.type == "cuda":
        torch.cuda.set_device(device)
    return device


@contextlib.contextmanager
def log_to(path: Path) -> Iterator[None]:
    """
    Write an evaluation's log to a file, and show it above the progress bar.

    :param path: The file; replaced when the first record comes.
    """
    logger = logging.getLogger(LOGGER)
    level = logger.level
    handler = logging.FileHandler(path, mode="w", encoding="utf-8", delay=True)
    handler.setFormatter(logging.Formatter("%(message)s"))
    logger.setLevel(logging.INFO)
    logger.addHandler(handler)
    try:
        with logging_above_the_bar():
            yield
    finally:
        logger.removeHandler(handler)
        logger.setLevel(level)
        handler.close()


def _load(
    request: NamedEvaluation,
    preprocessing: str | Callable[[Any], Any] | None,
    ranks: Ranks,
    device: torch.device,
) -> tuple[EvaluationData, Network, Network | None]:
    """Load the data, the model and the model to transfer from; the first process alone first: it may download."""
    with ranks.together():
        for is_first in (True, False):
            if (ranks.rank == 0) == is_first:
                data = load_data(
                    request.dataset,
                    data_dir=request.data_dir,
                    nb_examples=request.n_examples,
                    preprocessing=preprocessing,
                    nb_classes=request.num_classes,
                    class_order=request.class_order,
                    class_map=request.class_map,
                )
                model = _load_network(request, request.model, request.checkpoint, data)
                source = None
                if request.transfer_from is not None:
                    source = _load_network(request, request.transfer_from, request.transfer_checkpoint, data)
            ranks.gather(None)
    if Path(request.dataset).is_dir():
        _check_folders(request.dataset, model, data)
    return data, _to(model, device), None if source is None else _to(source, device)


def _load_network(request: NamedEvaluation, name: str, checkpoint: Path | None, data: EvaluationData) -> Network:
    channels, height, width = data.x.shape[1:]
    return load_model(
        name,
        dataset=request.dataset,
        norm=request.norm,
        nb_classes=data.nb_classes,
        input_size=(channels, height, width),
        checkpoint=checkpoint,
        model_dir=request.model_dir,
        weights=request.weights if checkpoint == request.checkpoint else None,
    )


def _to(model: Network, device: torch.device) -> Network:
    """Move a network; an ART classifier stays on the device it was made for."""
    return model if isinstance(model, PyTorchClassifier) else model.to(device)


def _check_folders(dataset: str, model: Network, data: EvaluationData) -> None:
    """Refuse an image folder without a folder for every output of the network."""
    if isinstance(model, PyTorchClassifier):
        nb_outputs = model.nb_classes
    else:
        with torch.no_grad():
            nb_outputs = count_classes(model, torch.as_tensor(data.x[:1]), "model")
    if nb_outputs != data.nb_classes:
        raise ValueError(
            f"`dataset`: {dataset} has {data.nb_classes} classes, the network has {nb_outputs} outputs: without a "
            "`class_map` labels are the folders' numbers, so that every class needs its folder."
        )


def _facts_of_model(name: str, checkpoint: Path | None) -> dict[str, str | None]:
    return {"name": name, "checkpoint": None if checkpoint is None else str(checkpoint)}
