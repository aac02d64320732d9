"""The folder that RobustBench's "New Model(s)" form asks for, packed from an evaluation: `art-clat submit`."""

from __future__ import annotations

import json
import pickle
import shutil
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import timm
import torch
from torch import nn

from art_clat.leaderboard.benchmark import run_benchmark
from art_clat.leaderboard.definitions import (
    load_from_robustbench,
    model_definition,
    timm_name,
    write_checkpoint,
    zoo_entry,
)
from art_clat.leaderboard.entries import (
    leaderboard_row,
    leaderboard_shortfalls,
    preprocessing_shortfalls,
    write_robustbench_entry,
)
from art_clat.leaderboard.form import TODO, fill_form, without_paths
from art_clat.models.backbones import create_backbone
from art_clat.models.by_name import load_function, load_model
from art_clat.models.datasets import IMAGENET_PREPROCESSING, EvaluationData, load_data
from art_clat.robustness.checks import ORDERS
from art_clat.robustness.report import RobustnessReport
from art_clat.utils.robustbench_import import robustbench_utils

__all__ = ["TODO", "Submission", "write_submission"]

#: The share of examples on which another machine may decide otherwise: those at a border between classes.
TOLERATED = 0.005

#: Where RobustBench keeps definitions.
ARCHITECTURES = "robustbench/model_zoo/architectures"


@dataclass(frozen=True, kw_only=True)
class Submission:
    """
    What to submit, and what the form asks for.

    :param run: The evaluation's folder, as ``art-clat evaluate`` wrote it.
    :param output: The folder to write; new or empty.
    :param model_id: RobustBench's key of the model.
    :param title: Title of the paper.
    :param authors: Authors of the paper.
    :param link: Link to the paper.
    :param architecture: The network, as RobustBench writes it.
    :param venue: Where the paper was published, and the year.
    :param additional_data: Whether training used other data than the data set's.
    :param footnote: What else readers should know.
    :param checkpoint: The weights; `None` for where the evaluation had them.
    :param checkpoint_url: Where the packed checkpoint can be downloaded.
    :param code_url: Where the code is.
    :param license: ``"MIT"``, or the address of another licence.
    :param data_dir: Where the data set is.
    :param benchmark: Whether to repeat the evaluation with RobustBench's own ``benchmark``.
    :param device: Where ``benchmark`` computes.
    """

    run: Path
    output: Path
    model_id: str
    title: str
    authors: str
    link: str
    architecture: str
    venue: str = "Unpublished"
    additional_data: bool = False
    footnote: str | None = None
    checkpoint: Path | None = None
    checkpoint_url: str | None = None
    code_url: str | None = None
    license: str | None = None
    data_dir: Path = Path("data")
    benchmark: bool = False
    device: str = "cpu"

    @property
    def module(self) -> str:
        """Name of the module with the network's definition."""
        return self.model_id.lower().replace("-", "_")


@dataclass(frozen=True)
class _Evaluation:
    """What the folder of an evaluation says."""

    folder: Path
    report: RobustnessReport
    about: dict[str, Any]

    @classmethod
    def load(cls, folder: Path) -> _Evaluation:
        report, about = RobustnessReport.load(folder)
        model, data = about.get("model"), about.get("data")
        if not isinstance(model, dict) or not isinstance(data, dict) or "name" not in model or "name" not in data:
            raise ValueError(f"`run`: {folder / 'report.json'} does not say of which model and data it is.")
        if report.autoattack is None:
            raise ValueError(f"`run`: {folder} has no AutoAttack result, which RobustBench's entries are made of.")
        for name in ("autoattack.log", "adversarial.pt"):
            if not (folder / name).is_file():
                raise ValueError(f"`run`: {folder} lacks {name}.")
        return cls(folder, report, about)

    @property
    def model(self) -> str:
        return str(self.about["model"]["name"])

    @property
    def dataset(self) -> str:
        return str(self.about["data"]["name"])

    @property
    def preprocessing(self) -> str | None:
        """RobustBench's name of how ImageNet's images were resized; `None` for other data."""
        if self.dataset != "imagenet":
            return None
        return self.about["data"].get("preprocessing") or IMAGENET_PREPROCESSING


def write_submission(
    submission: Submission,
    *,
    data: EvaluationData | None = None,
    benchmark: Callable[..., tuple[float, float, npt.NDArray[np.bool_]]] = run_benchmark,
) -> list[str]:
    """
    Write the folder, whole or not at all.

    The network is loaded by RobustBench's own ``load_model`` from the files that are written, and must repeat the
    verdicts of the evaluation. Files hold no local paths.

    :param submission: What to submit.
    :param data: The test data of the evaluation; `None` to load them by the name that the evaluation recorded.
    :param benchmark: What repeats the evaluation if :class:`Submission` asks for that.
    :return: What keeps the result from being a claim to the leaderboard.
    :raises ValueError: If the folder holds something, a field is a placeholder, RobustBench has the model already, or
            evaluation, network and data do not belong together.
    :raises ImportError: If RobustBench is not installed.
    """
    _check_words(submission)
    output = submission.output
    if output.exists() and (not output.is_dir() or any(output.iterdir())):
        raise ValueError(f"`--output`: {output} holds something already. Name a new or empty folder.")
    evaluation = _Evaluation.load(submission.run)
    setting = {"model_id": submission.model_id, "dataset": evaluation.dataset, "norm": evaluation.report.norm}
    timm_name(**setting)  # refuses what RobustBench could not load
    _check_new(**setting)
    if data is None:
        data = load_data(
            evaluation.dataset,
            data_dir=submission.data_dir,
            nb_examples=evaluation.report.nb_examples,
            preprocessing=evaluation.preprocessing,
            **{name: evaluation.about["data"].get(name) for name in ("class_order", "class_map")},
        )
    output.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=output.parent, prefix=".submission-") as apart:
        folder = Path(apart) / "submission"
        folder.mkdir()  # as readable as the umask says, which `apart` is not
        doubts = _pack(submission, evaluation, data, folder, setting=setting, benchmark=benchmark)
        folder.replace(output)
    return doubts


def _check_words(submission: Submission) -> None:
    for name in ("title", "authors", "link"):
        word = getattr(submission, name)
        if "…" in word or not word.strip(" ."):
            raise ValueError(f"`--{name}` {word!r} is a placeholder.")


def _check_new(model_id: str, dataset: str, norm: str) -> None:
    """Refuse the identifier of a model that RobustBench has."""
    robustbench_utils()
    from robustbench.model_zoo import model_dicts
    from robustbench.model_zoo.enums import BenchmarkDataset, ThreatModel

    if model_id in model_dicts[BenchmarkDataset(dataset)].get(ThreatModel(norm), {}):
        raise ValueError(f"`--model-id`: RobustBench has a model {model_id} for {dataset} and {norm} already.")


def _pack(
    submission: Submission,
    evaluation: _Evaluation,
    data: EvaluationData,
    folder: Path,
    *,
    setting: dict[str, str],
    benchmark: Callable[..., tuple[float, float, npt.NDArray[np.bool_]]],
) -> list[str]:
    """Write everything into an empty folder, and say what keeps it from being a claim."""
    about = without_paths(evaluation.about)
    definition = folder / ARCHITECTURES / f"{submission.module}.py"
    checkpoint = folder / "models" / setting["dataset"] / setting["norm"] / f"{submission.model_id}.pt"
    network = _write_network(submission, evaluation, data, definition, checkpoint, setting)
    size = f"{sum(parameter.numel() for parameter in network.parameters()):,} parameters"
    checks = [
        f"evaluated as {about['model']['name']}, {size}: is `{submission.architecture}` what RobustBench calls it?",
        *_check_adversarial(evaluation, data, network),
    ]
    _write_entry(submission, evaluation.report, folder, dataset=setting["dataset"])
    if submission.benchmark:
        checks.append(_repeat(submission, evaluation, network, setting, benchmark))
    doubts = leaderboard_shortfalls(evaluation.report, setting["dataset"])
    doubts += preprocessing_shortfalls(evaluation.preprocessing, **setting)
    _write_row(folder, doubts, setting)
    _write_zoo_entry(folder, submission.module, setting)
    _copy_evaluation(evaluation, about, folder / "evaluation")
    if submission.additional_data:
        doubts.append("additional training data: not to be compared with models trained without; RobustBench marks it")
    words = {name: getattr(submission, name) for name in ("model_id", "title", "authors", "link", "architecture")}
    places = {"definition": definition, "architectures": definition.parent, "checkpoint": checkpoint}
    words |= {name: path.relative_to(folder).as_posix() for name, path in places.items()}
    form = fill_form(
        evaluation.report, about, {**words, "module": submission.module}, additional_data=submission.additional_data,
        checkpoint_url=submission.checkpoint_url, code_url=submission.code_url, license=submission.license,
        definition=definition.read_text(encoding="utf-8"), doubts=doubts, checks=checks,
    )  # fmt: skip
    (folder / "ISSUE.md").write_text(form, encoding="utf-8")
    return doubts


def _write_network(
    submission: Submission,
    evaluation: _Evaluation,
    data: EvaluationData,
    definition: Path,
    checkpoint: Path,
    setting: dict[str, str],
) -> nn.Module:
    """Write definition and weights, and return the network that RobustBench loads from them."""
    channels, height, width = data.x.shape[1:]
    size = (channels, height, width)
    make, arguments = _maker(evaluation.model, nb_classes=data.nb_classes, input_size=size)
    network = load_model(
        evaluation.model,
        dataset=setting["dataset"],
        norm=setting["norm"],
        nb_classes=data.nb_classes,
        input_size=size,
        checkpoint=submission.checkpoint or evaluation.about["model"].get("checkpoint"),
        weights=evaluation.about["model"].get("weights"),
    )
    if not isinstance(network, nn.Module):
        raise ValueError(f"`run`: {evaluation.model} returns an ART classifier; RobustBench needs the network alone.")
    text = model_definition(
        make, arguments, **setting, checkpoint_url=submission.checkpoint_url, preprocessing=evaluation.preprocessing
    )
    for path in (definition, checkpoint):
        path.parent.mkdir(parents=True)
    definition.write_text(text, encoding="utf-8")
    write_checkpoint(network, checkpoint, definition, **setting)
    return load_from_robustbench(definition, checkpoint, **setting)


def _maker(
    name: str, *, nb_classes: int, input_size: tuple[int, int, int]
) -> tuple[Callable[..., nn.Module], dict[str, Any]]:
    """Return what makes the network without its weights, and the arguments of that."""
    if ":" in name:
        return load_function(name), {}
    if timm.is_model(name):
        return create_backbone, {"name": name, "num_classes": nb_classes, "input_size": input_size}
    raise ValueError(
        f"`run`: the evaluation is of {name}, which is one of RobustBench's own models. If the weights are "
        "yours, evaluate with `--model robustbench.model_zoo.cifar10:NameOfItsClass` or `file.py:function`."
    )


def _check_adversarial(evaluation: _Evaluation, data: EvaluationData, network: nn.Module) -> list[str]:
    """Make sure that adversarial examples, verdicts, data and network belong together, and say how far they do."""
    path, report = evaluation.folder / "adversarial.pt", evaluation.report
    try:
        adversarial = torch.load(path, map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, RuntimeError, EOFError, ValueError) as error:
        raise ValueError(f"`run`: {path} cannot be read: {error}.") from error
    x, y = torch.as_tensor(data.x), torch.as_tensor(data.y)
    if not isinstance(adversarial, torch.Tensor) or adversarial.shape != x.shape:
        raise ValueError(f"`run`: {path} does not hold an adversarial example for each of the {len(x)} examples.")
    size = torch.linalg.vector_norm((adversarial - x).flatten(1), ord=ORDERS[report.norm], dim=1).max().item()
    if size > report.eps * (1 + 1e-4) or adversarial.min() < 0 or adversarial.max() > 1:
        raise ValueError(f"`run`: {path} is not within ε = {report.eps:g} of the data in `--data-dir`: {size:g}.")
    return [
        _compare(_correct(network, images, y), verdicts, what)
        for images, verdicts, what in (
            (x, report.clean, "on the test images"),
            (adversarial, report.autoattack, "on the adversarial examples"),
        )
    ]


@torch.no_grad()
def _correct(network: nn.Module, x: torch.Tensor, y: torch.Tensor) -> npt.NDArray[np.bool_]:
    """Tell whether each image is classified correctly."""
    return (torch.cat([network(batch).argmax(1) for batch in x.split(128)]) == y).numpy()


def _compare(verdicts: npt.NDArray[np.bool_], evaluated: npt.NDArray[np.bool_] | None, what: str) -> str:
    """Say how far the verdicts are those of the evaluation; another machine may round to another class."""
    different = (verdicts != evaluated).nonzero()[0].tolist()
    if len(different) > TOLERATED * len(verdicts):
        raise ValueError(
            f"`run`: {what} the network decides otherwise than in the evaluation for {len(different)} of "
            f"{len(verdicts)} examples: {', '.join(map(str, different[:5]))} ... Is `--checkpoint` the one that was "
            "evaluated, on these data?"
        )
    return f"{what}: {len(verdicts) - len(different)} of {len(verdicts)} verdicts are those of the evaluation"


def _write_entry(submission: Submission, report: RobustnessReport, folder: Path, *, dataset: str) -> None:
    write_robustbench_entry(
        report,
        model_id=submission.model_id,
        dataset=dataset,
        directory=folder,
        link=submission.link,
        name=submission.title,
        authors=submission.authors,
        venue=submission.venue,
        architecture=submission.architecture,
        additional_data=submission.additional_data,
        footnote=submission.footnote,
    )


def _repeat(
    submission: Submission,
    evaluation: _Evaluation,
    network: nn.Module,
    setting: dict[str, str],
    benchmark: Callable[..., tuple[float, float, npt.NDArray[np.bool_]]],
) -> str:
    """Repeat the evaluation with RobustBench's own `benchmark`."""
    report = evaluation.report
    with tempfile.TemporaryDirectory() as apart:
        *_, verdicts = benchmark(
            network, **setting, eps=report.eps, nb_examples=report.nb_examples, data_dir=submission.data_dir,
            directory=apart, batch_size=evaluation.about["batch_size"], seed=report.seed, device=submission.device,
            preprocessing=evaluation.preprocessing,
        )  # fmt: skip
    return _compare(verdicts, report.autoattack, "by RobustBench's own `benchmark`, with the same seed")


def _write_row(folder: Path, doubts: list[str], setting: dict[str, str]) -> None:
    row = leaderboard_row(**setting, directory=folder)
    note = f"\nNot a leaderboard claim as it stands: {'; '.join(doubts)}.\n" if doubts else ""
    note += "\nThe rank is that among the entries in this folder.\n"
    (folder / "leaderboard_row.md").write_text(row + note, encoding="utf-8")


def _write_zoo_entry(folder: Path, module: str, setting: dict[str, str]) -> None:
    (folder / "model_zoo_entry.py").write_text(
        f"# For robustbench/model_zoo/{setting['dataset']}.py: the import, and an item of the dictionary of "
        f"ThreatModel.{setting['norm']}.\n"
        f"import timm\n\nfrom robustbench.model_zoo.architectures import {module}  # noqa: F401, registers it\n\n"
        f"{zoo_entry(**setting)}",
        encoding="utf-8",
    )


def _copy_evaluation(evaluation: _Evaluation, about: dict[str, Any], folder: Path) -> None:
    """Copy the evaluation's files; ``report.json`` without local paths."""
    folder.mkdir()
    for name in ("report.json", "verdicts.npz", "autoattack.log", "adversarial.pt", "waterfall.png"):
        if (evaluation.folder / name).is_file():
            shutil.copyfile(evaluation.folder / name, folder / name)
    path = folder / "report.json"
    content = {**json.loads(path.read_text(encoding="utf-8")), **about}
    path.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
