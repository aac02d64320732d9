"""Robust accuracy of a classifier: clean, under PGD, transferred and under AutoAttack."""

from __future__ import annotations

import dataclasses
import logging
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from datetime import timedelta
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
from art.estimators.classification import PyTorchClassifier
from torch import nn

from art_clat.layers.freezing import only_trainable
from art_clat.models.checks import check_labels
from art_clat.robustness.autoattack import Ensemble
from art_clat.robustness.checks import (
    ORDERS,
    check_eps,
    check_images,
    check_norms,
    count_classes,
    warn_about_gradients,
    warn_about_inputs,
    warn_about_labels,
    warn_about_randomness,
)
from art_clat.robustness.plan import Settings, Step, make_plan, norm_name
from art_clat.robustness.report import RobustnessReport, make_report
from art_clat.robustness.runner import Evaluation, Folder, Outcome
from art_clat.robustness.target import Target
from art_clat.utils.descriptions import fingerprint
from art_clat.utils.modes import evaluation_mode
from art_clat.utils.processes import Ranks
from art_clat.utils.randomness import reseed, seeded_randomness

logger = logging.getLogger(__name__)

#: How long a process that is done with its batches waits for one that is not; one that dies is noticed at once.
PATIENCE = timedelta(days=7)


def evaluate_robustness(
    classifier_or_model: PyTorchClassifier | nn.Module,
    x: npt.NDArray[np.floating],
    y: npt.NDArray[np.generic],
    *,
    norm: str | float,
    eps: float,
    autoattack_version: str | None = "standard",
    pgd_max_iter: int = 20,
    pgd_eps_step: float | None = None,
    pgd_restarts: int = 1,
    transfer_from: PyTorchClassifier | nn.Module | None = None,
    batch_size: int = 128,
    seed: int = 0,
    checkpoint: str | os.PathLike[str] | None = None,
    verbose: bool = False,
) -> RobustnessReport:
    """
    Measure clean accuracy, accuracy under PGD and under AutoAttack (Croce and Hein, arXiv 2003.01690).

    AutoAttack is its authors' own package. As in its ``run_standard_evaluation``, each attack runs on the examples that
    the ones before have left: the same seed and batches make the same adversarial examples. The network runs in
    evaluation mode. Its modes and the global random generators are restored afterwards. An example counts as robust
    only if it is also classified correctly as it is. PGD's accuracy is an upper bound, which AutoAttack tightens. If
    the two are far apart, suspect masked gradients.

    In a process group, or launched by ``torchrun``, the processes share the batches. All of them must make the same
    call, and each gets the whole report. What is drawn at random in a batch depends neither on the number of processes
    nor on where an earlier call was killed.

    :param classifier_or_model: An ART classifier with ``clip_values=(0, 1)``, or a network that takes inputs in [0, 1],
           with its normalisation inside. Both return logits. A network is evaluated on the device it is on.
    :param x: Inputs in [0, 1], shape (n, channels, height, width).
    :param y: Index labels, shape (n,), or one-hot labels, shape (n, nb_classes).
    :param norm: ``"Linf"``, ``"L2"`` or ``"L1"`` (also ``np.inf``, 2, 1).
    :param eps: Radius of the ball, in units of inputs in [0, 1]: 8 / 255, not 8. At most 1 for ℓ∞.
    :param autoattack_version: ``"standard"``, ``"plus"``, ``"rand"``, or `None` to leave AutoAttack out. Its targeted
           losses need at least four classes.
    :param pgd_max_iter: Number of PGD steps.
    :param pgd_eps_step: Size of a PGD step; `None` for ε / 4 (2 / 255 at 8 / 255, as in the paper).
    :param pgd_restarts: Number of random starts of PGD. Each attacks only what withstood the ones before.
    :param transfer_from: Another classifier or network of the same classes, whose adversarial examples (the same PGD,
           from one random start) are tried on this one, or `None` to leave that out.
    :param batch_size: Examples in a batch.
    :param seed: Seed of the attacks.
    :param checkpoint: A folder in which every finished batch is saved, or `None`. If the process is killed, the same
           call continues and ends with the same report. A folder that holds anything else is refused.
    :param verbose: Show the progress, and the longest time that is left.
    :return: The accuracies and the verdict on every example.
    :raises TypeError: If `classifier_or_model` is neither.
    :raises ValueError: If an argument is out of its range, or `checkpoint` holds something else. If the figures would
            be false: inputs lie outside [0, 1] or are not of the classifier's ``input_shape``, outputs are no logits,
            or normalisation seems to be missing or applied twice.
    :raises ImportError: If AutoAttack is not installed.
    :raises ConnectionError: If another process is lost.
    """
    images = check_images(x, y)
    target = Target.of(classifier_or_model, "classifier_or_model")
    source = None if transfer_from is None else Target.of(transfer_from, "transfer_from")
    targets = [target] if source is None else [target, source]
    for one in targets:
        one.check_size(images)
    norm = norm_name(norm)
    warnings = check_eps(eps, norm, images[0].numel())
    settings = Settings(
        norm=norm,
        eps=float(eps),
        autoattack_version=autoattack_version,
        pgd_max_iter=pgd_max_iter,
        pgd_eps_step=float(eps) / 4 if pgd_eps_step is None else float(pgd_eps_step),
        pgd_restarts=pgd_restarts,
        batch_size=batch_size,
        seed=seed,
    )
    ranks = Ranks.join(target.device, PATIENCE)
    with ranks.together(), _ready_to_attack(targets, settings.seed):
        sample = images[: settings.batch_size]
        nb_classes = _count_classes(targets, sample)
        labels = check_labels(y, nb_classes, argument="y")
        labels = labels if labels.ndim == 1 else labels.argmax(dim=1)
        autoattack = _autoattack(target, settings, nb_classes)
        plan = make_plan(target, settings, source=source, autoattack=autoattack)
        facts = {name: fact for one in targets for name, fact in one.describe().items()}
        facts |= {"x": fingerprint(images), "y": fingerprint(labels), **dataclasses.asdict(settings)}
        ranks.check_same({**facts, "checkpoint": str(checkpoint)}, target.device)
        warnings += _warn_about_network(target, images, labels, nb_classes, settings)
        if autoattack is not None:
            warnings += autoattack.check_dynamic(sample.to(target.device))
        folder = (
            None if checkpoint is None else _open_folder(Path(checkpoint), facts, target, sample, settings.seed, ranks)
        )
        with Evaluation(target, images, labels, plan, settings, ranks=ranks, folder=folder, verbose=verbose) as runner:
            outcomes = _run(runner, plan, ranks, autoattack_version)
        if autoattack is not None:
            warnings += [message for outcome in outcomes.values() for message in outcome.warnings]
            accuracies = {step.name: outcomes[step.name].accuracy for step in plan if step.of_autoattack}
            warnings += autoattack.check_square({"clean": outcomes["clean"].accuracy, **accuracies})
    report = make_report(settings, images, plan, outcomes, warnings)
    if autoattack is not None:
        _log_perturbation(ranks, report, images)
    for message in report.warnings:
        _log(ranks, message, level=logging.WARNING)
    return report


@contextmanager
def _ready_to_attack(targets: Sequence[Target], seed: int) -> Iterator[None]:
    """Put networks in evaluation mode, without gradients, and seed; restore modes and generators afterwards."""
    with ExitStack() as stack:
        stack.enter_context(seeded_randomness(seed, targets[0].device))
        for target in targets:
            stack.enter_context(evaluation_mode(target.model))
            stack.enter_context(only_trainable(target.model, []))
        stack.enter_context(torch.no_grad())
        yield


def _count_classes(targets: Sequence[Target], sample: torch.Tensor) -> int:
    """Return the number of classes, the same for all targets."""
    target, *others = targets
    for one in targets:
        check_norms(one.model, one.argument)
    nb_classes = count_classes(target.model, sample.to(target.device), target.argument)
    for other in others:
        if count_classes(other.model, sample.to(other.device), other.argument) != nb_classes:
            raise ValueError(f"`{other.argument}` must have the {nb_classes} classes of `{target.argument}`.")
    return nb_classes


def _autoattack(target: Target, settings: Settings, nb_classes: int) -> Ensemble | None:
    """Return AutoAttack on a network, unless it is left out."""
    if settings.autoattack_version is None:
        return None
    return Ensemble(
        target.model,
        norm=settings.norm,
        eps=settings.eps,
        version=settings.autoattack_version,
        nb_classes=nb_classes,
        seed=settings.seed,
        device=target.device,
    )


def _warn_about_network(
    target: Target, images: torch.Tensor, labels: torch.Tensor, nb_classes: int, settings: Settings
) -> list[str]:
    """Check the network on some inputs, before any attack; return what makes the figures doubtful."""
    model, device, size = target.model, target.device, settings.batch_size
    found = warn_about_inputs(model, images, labels, nb_classes=nb_classes, device=device, batch_size=size)
    found += warn_about_labels(model, images, labels, nb_classes=nb_classes, device=device, batch_size=size)
    sample = images[:size].to(device)
    if settings.autoattack_version != "rand":
        found += warn_about_randomness(model, sample)
    return found + warn_about_gradients(model, sample, labels[:size].to(device))


def _open_folder(
    path: Path, facts: Mapping[str, object], target: Target, sample: torch.Tensor, seed: int, ranks: Ranks
) -> Folder:
    """Open the folder of an evaluation, new or to be continued."""
    reseed(target.device, seed)
    folder = Folder(path, facts, target.model(sample.to(target.device)[:16]).float().cpu())
    folder.check()
    ranks.gather(None)  # all have looked before one writes
    folder.open()
    return folder


def _run(runner: Evaluation, plan: Sequence[Step], ranks: Ranks, version: str | None) -> dict[str, Outcome]:
    """Run all steps; log what each of AutoAttack's attacks leaves, in AutoAttack's own words."""
    outcomes: dict[str, Outcome] = {}
    names = [step.name for step in plan if step.of_autoattack]
    for step in plan:
        if step.name in names[:1]:
            _log(ranks, f"using {version} version including {', '.join(names)}.")
            _log(ranks, f"initial accuracy: {outcomes['clean'].accuracy:.2%}")
        outcome = outcomes[step.name] = runner.run(step, outcomes)
        if step.name in names:
            seconds = sum(outcomes[name].seconds for name in names if name in outcomes)
            result = f"robust accuracy after {step.name.upper()}: {outcome.accuracy:.2%}"
            _log(ranks, f"{result} (total time {seconds:.1f} s)")
    return outcomes


def _log_perturbation(ranks: Ranks, report: RobustnessReport, images: torch.Tensor) -> None:
    """Log the size of the perturbations and the range of AutoAttack's adversarial examples, in its own words."""
    adversarial = torch.as_tensor(report.adversarial)
    size = torch.linalg.vector_norm((adversarial - images).flatten(1), ord=ORDERS[report.norm], dim=1).max()
    _log(
        ranks,
        f"max {report.norm} perturbation: {size:.5f}, nan in tensor: {int(adversarial.isnan().sum())}, "
        f"max: {adversarial.max():.5f}, min: {adversarial.min():.5f}",
    )
    _log(ranks, f"robust accuracy: {report.autoattack_accuracy:.2%}")


def _log(ranks: Ranks, message: str, *, level: int = logging.INFO) -> None:
    """Log once, whatever the number of processes."""
    if ranks.rank == 0:
        logger.log(level, "%s", message)
