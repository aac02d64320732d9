"""AutoAttack on a classifier."""

from __future__ import annotations

import contextlib
import hashlib
import logging
import os
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt
import torch
from art.estimators.classification import PyTorchClassifier
from torch import nn

from art_clat.attacks.ascent import Ascent, Loss, climb_in_chunks
from art_clat.attacks.balls import L1Ball, L2Ball, LinfBall
from art_clat.layers.freezing import only_trainable
from art_clat.models.checks import check_labels
from art_clat.models.description import describe_inputs
from art_clat.models.tensor_classifier import TensorClassifier
from art_clat.robustness.autoattack import VERSIONS, Attack, Ensemble, heard
from art_clat.robustness.checks import (
    ORDERS,
    check_eps,
    check_images,
    count_classes,
    doubts_of_gradients,
    doubts_of_inputs,
    doubts_of_randomness,
)
from art_clat.robustness.runner import Evaluation, Folder, Outcome
from art_clat.utils.batch import Batch
from art_clat.utils.checks import check_seed, check_whole
from art_clat.utils.descriptions import fingerprint, text_of
from art_clat.utils.modes import evaluation_mode
from art_clat.utils.processes import Ranks
from art_clat.utils.randomness import own_randomness, reseed
from art_clat.utils.weights import weights

if TYPE_CHECKING:
    pass
from art_clat.robustness.report import RobustnessReport

logger = logging.getLogger(__name__)


#: How long a process that is done with its batches waits for one that is not; one that dies is noticed at once.
PATIENCE = timedelta(days=7)


#: RobustBench's names of the norms, what users write for them, and the balls.
NORMS: dict[str, tuple[tuple[object, ...], type[LinfBall | L2Ball | L1Ball]]] = {
    "Linf": (("Linf", "linf", "inf", np.inf), LinfBall),
    "L2": (("L2", "l2", 2), L2Ball),
    "L1": (("L1", "l1", 1), L1Ball),
}


class _Logits(nn.Module):
    """An ART classifier as the function from inputs to logits that AutoAttack takes."""

    def __init__(self, network: TensorClassifier) -> None:
        super().__init__()
        self.wrapped = network.estimator._model
        self._network = [network]  # not a submodule

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self._network[0].logits(x)


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

    AutoAttack is its authors' own package, run attack by attack on the examples that the attacks before have left, as
    its ``run_standard_evaluation`` does: with the same seed and batches the adversarial examples are the same. The
    network runs in evaluation mode and comes back as it was, the global random generators included. An example counts
    as robust only if it is also classified correctly as it is. PGD's accuracy is an upper bound that AutoAttack
    tightens; where the two are far apart, suspect masked gradients.

    In a process group, or launched by ``torchrun``, the processes share the batches, and each gets the whole report:
    all of them must make the same call. What is drawn at random in a batch depends on neither their number nor kills.

    :param classifier_or_model: An ART classifier with ``clip_values=(0, 1)``, or a network that takes inputs in [0, 1],
           with its normalisation inside; either gives logits. A network is evaluated on the device it is on.
    :param x: Inputs in [0, 1], shape (n, channels, height, width).
    :param y: Index labels, shape (n,), or one-hot labels, shape (n, nb_classes).
    :param norm: ``"Linf"``, ``"L2"`` or ``"L1"`` (also ``np.inf``, 2, 1).
    :param eps: Radius of the ball, in units of inputs in [0, 1]: 8 / 255, not 8. At most 1 for ℓ∞.
    :param autoattack_version: ``"standard"``, ``"plus"``, ``"rand"``, or `None` to leave AutoAttack out.
    :param pgd_max_iter: Number of PGD steps.
    :param pgd_eps_step: Size of a PGD step; `None` for ε / 4 (2 / 255 at 8 / 255, as in the paper).
    :param pgd_restarts: Number of random starts of PGD. Only what withstood one is attacked from the next.
    :param transfer_from: Another classifier or network of the same classes, whose adversarial examples (the same PGD,
           from one random start) are tried on this one, or `None`.
    :param batch_size: Examples in a batch.
    :param seed: Seed of the attacks.
    :param checkpoint: A folder in which every batch is saved when an attack is done with it, or `None`. Killed at any
           instant, the same call continues and ends with the same report. One that holds anything else is refused.
    :param verbose: Show the progress and the time left, at most.
    :return: The accuracies and the verdict on every example.
    :raises TypeError: If `classifier_or_model` is neither.
    :raises ValueError: If an argument is out of its range, inputs lie outside [0, 1] or are not of the classifier's
            ``input_shape``, the outputs are no logits, or normalisation seems to be missing or to be there twice: the
            figures would be false. If `checkpoint` holds something else.
    :raises ImportError: If AutoAttack is not installed.
    :raises ConnectionError: If another process is lost.
    """
    norm = _norm_name(norm)
    for argument, number in (
        ("pgd_max_iter", pgd_max_iter),
        ("pgd_restarts", pgd_restarts),
        ("batch_size", batch_size),
    ):
        check_whole(number, 1, argument=argument)
    if pgd_eps_step is not None and not pgd_eps_step > 0:
        raise ValueError(f"`pgd_eps_step` must be positive, got {pgd_eps_step}.")
    if autoattack_version not in (None, *VERSIONS):
        raise ValueError(f"`autoattack_version` must be one of {(None, *VERSIONS)}, got {autoattack_version!r}.")
    check_seed(seed)
    model, device = _as_model(classifier_or_model, "classifier_or_model")
    source, source_device = (None, device) if transfer_from is None else _as_model(transfer_from, "transfer_from")
    inputs = check_images(x, y)
    _check_size(inputs, "classifier_or_model", classifier_or_model)
    _check_size(inputs, "transfer_from", transfer_from)
    check_eps(eps, norm, inputs[0].numel())
    step = eps / 4 if pgd_eps_step is None else float(pgd_eps_step)
    ranks = Ranks.join(device, PATIENCE)
    with contextlib.ExitStack() as stack:
        stack.enter_context(ranks.together())
        stack.enter_context(own_randomness(seed, device))
        for network in (model,) if source is None else (model, source):
            stack.enter_context(evaluation_mode(network))
            stack.enter_context(only_trainable(network, []))
        stack.enter_context(torch.no_grad())
        sample = inputs[:batch_size].to(device)
        nb_classes = count_classes(model, sample, "classifier_or_model")
        if source is not None and count_classes(source, sample.to(source_device), "transfer_from") != nb_classes:
            raise ValueError(f"`transfer_from` must have the {nb_classes} classes of `classifier_or_model`.")
        labels = check_labels(y, nb_classes, argument="y")
        labels = labels if labels.ndim == 1 else labels.argmax(dim=1)
        attacks: dict[str, Attack | None] = {
            "clean": None,
            "pgd": _pgd(model, device, norm=norm, eps=eps, step=step, nb_steps=pgd_max_iter, nb_restarts=pgd_restarts),
        }
        costs: dict[str, float] = {"clean": 1, "pgd": 3 * pgd_max_iter * pgd_restarts}
        if source is not None:
            attacks["transfer"] = _pgd(source, source_device, norm=norm, eps=eps, step=step, nb_steps=pgd_max_iter)
            costs["transfer"] = 3 * pgd_max_iter
        ensemble = None
        if autoattack_version is not None:
            ensemble = Ensemble(
                model,
                norm=norm,
                eps=eps,
                version=autoattack_version,
                nb_classes=nb_classes,
                seed=seed,
                device=device,
            )
            costs |= {name: ensemble.forward_passes(name) for name in ensemble.names}
        facts: dict[str, object] = {
            **_describe("classifier_or_model", classifier_or_model),
            **({} if transfer_from is None else _describe("transfer_from", transfer_from)),
            "x": fingerprint(inputs),
            "y": fingerprint(labels),
            "norm": norm,
            "eps": float(eps),
            "autoattack_version": autoattack_version,
            "pgd_max_iter": pgd_max_iter,
            "pgd_eps_step": step,
            "pgd_restarts": pgd_restarts,
            "batch_size": batch_size,
            "seed": seed,
        }
        ranks.check_same({**facts, "checkpoint": str(checkpoint)}, device)
        doubts = doubts_of_inputs(model, inputs, labels, nb_classes=nb_classes, device=device, batch_size=batch_size)
        if autoattack_version != "rand":
            doubts += doubts_of_randomness(model, sample)
        doubts += doubts_of_gradients(model, sample, labels[: len(sample)].to(device))
        folder = None
        if checkpoint is not None:
            reseed(device, seed)
            folder = Folder(Path(checkpoint), facts, model(sample[:16]).float().cpu())
            folder.check()
            ranks.gather(None)  # all have looked before one writes
            folder.open()
        evaluation = Evaluation(
            model,
            inputs,
            labels,
            costs=costs,
            device=device,
            batch_size=batch_size,
            seed=seed,
            ranks=ranks,
            folder=folder,
            verbose=verbose,
        )
        stack.enter_context(evaluation)
        outcomes: dict[str, Outcome] = {}
        among = torch.ones(len(inputs), dtype=torch.bool)
        for name, attack in attacks.items():
            outcomes[name] = evaluation.run(name, attack, outcomes["clean"].robust if outcomes else among)
        verdicts, adversarial = {}, inputs.clone()
        if ensemble is None:
            adversarial[outcomes["pgd"].fooled] = outcomes["pgd"].adversarial
        else:
            with heard() as warned:
                ensemble.check_dynamic(sample)
            doubts += warned
            _log(ranks, f"using {autoattack_version} version including {', '.join(ensemble.names)}.")
            left = outcomes["clean"].robust
            _log(ranks, f"initial accuracy: {left.float().mean():.2%}")
            for name in ensemble.names:
                outcome = outcomes[name] = evaluation.run(name, ensemble.attack(name), left)
                left = outcome.robust
                adversarial[outcome.fooled] = outcome.adversarial
                verdicts[name] = left.numpy()
                _log(
                    ranks,
                    f"robust accuracy after {name.upper()}: {left.float().mean():.2%} "
                    f"(total time {sum(outcomes[done].seconds for done in verdicts):.1f} s)",
                )
            with heard() as warned:
                ensemble.check_square(
                    {"clean": float(outcomes["clean"].robust.float().mean())}
                    | {name: float(robust.mean()) for name, robust in verdicts.items()}
                )
            doubts += [*(message for outcome in outcomes.values() for message in outcome.warnings), *warned]
            size = torch.linalg.vector_norm((adversarial - inputs).flatten(1), ord=ORDERS[norm], dim=1).max()
            _log(
                ranks,
                f"max {norm} perturbation: {size:.5f}, nan in tensor: {int(adversarial.isnan().sum())}, "
                f"max: {adversarial.max():.5f}, min: {adversarial.min():.5f}",
            )
            _log(ranks, f"robust accuracy: {left.float().mean():.2%}")
    doubts = list(dict.fromkeys(doubts))
    for message in doubts:
        _log(ranks, message, level=logging.WARNING)
    return RobustnessReport(
        norm=norm,
        eps=float(eps),
        nb_examples=len(inputs),
        clean=outcomes["clean"].robust.numpy(),
        pgd=outcomes["pgd"].robust.numpy(),
        pgd_max_iter=pgd_max_iter,
        pgd_restarts=pgd_restarts,
        transfer=outcomes["transfer"].robust.numpy() if "transfer" in outcomes else None,
        autoattack=None if ensemble is None else left.numpy(),
        autoattack_version=autoattack_version,
        attacks=verdicts,
        adversarial=adversarial.numpy(),
        warnings=tuple(doubts),
        seconds=sum(outcome.seconds for outcome in outcomes.values()),
        seed=seed,
    )


def _norm_name(norm: object) -> str:
    for name, (spellings, _) in NORMS.items():
        if norm in spellings:
            return name
    raise ValueError(f"`norm` must be 'Linf', 'L2' or 'L1' (or np.inf, 2, 1), got {norm!r}.")


def _as_model(classifier_or_model: object, argument: str) -> tuple[nn.Module, torch.device]:
    if isinstance(classifier_or_model, PyTorchClassifier):
        classifier = classifier_or_model
        clip = classifier.clip_values
        if clip is None or not (np.allclose(clip[0], 0) and np.allclose(clip[1], 1)):
            raise ValueError(
                f"`{argument}`: AutoAttack perturbs within [0, 1], so the classifier's clip_values must be "
                f"(0, 1), got {classifier.clip_values}."
            )
        network = TensorClassifier(classifier)
        if not network.is_differentiable:
            raise ValueError(
                f"`{argument}`: its preprocessing is not PyTorch's, no gradient passes through it, and "
                "AutoAttack's result would be false."
            )
        return _Logits(network), network.device
    if isinstance(classifier_or_model, nn.Module):
        tensor = next(classifier_or_model.parameters(), None)
        return classifier_or_model, torch.device("cpu") if tensor is None else tensor.device
    raise TypeError(
        f"`{argument}` must be an ART PyTorchClassifier or a torch.nn.Module, "
        f"got {type(classifier_or_model).__module__}.{type(classifier_or_model).__qualname__}."
    )


def _check_size(inputs: torch.Tensor, argument: str, classifier_or_model: object) -> None:
    """Refuse images that are not of the size a classifier was declared for; convolutions would take them."""
    shape = tuple(inputs.shape[1:])
    if isinstance(classifier_or_model, PyTorchClassifier) and shape != tuple(classifier_or_model.input_shape):
        raise ValueError(f"`x` has images of shape {shape}, `{argument}` takes {classifier_or_model.input_shape}.")


def _describe(argument: str, classifier_or_model: PyTorchClassifier | nn.Module) -> dict[str, object]:
    """Say what a network is, so that an evaluation of another one is told apart."""
    facts: dict[str, object] = {}
    model: nn.Module = classifier_or_model
    if isinstance(classifier_or_model, PyTorchClassifier):
        model, facts = classifier_or_model.model, describe_inputs(classifier_or_model)
    facts["weights"] = fingerprint(*weights(model).values())
    facts["architecture"] = hashlib.sha256(text_of(model).encode()).hexdigest()[:16]
    return {f"{argument}, {name}": fact for name, fact in facts.items()}


def _pgd(
    model: nn.Module,
    device: torch.device,
    *,
    norm: str,
    eps: float,
    step: float,
    nb_steps: int,
    nb_restarts: int = 1,
) -> Attack:
    """Give projected gradient ascent on the cross-entropy, from random starts (Madry et al., arXiv 1706.06083)."""
    bounds = torch.tensor(0.0, device=device), torch.tensor(1.0, device=device)
    ball = NORMS[norm][1](torch.tensor(eps, device=device), bounds)
    ascent = Ascent(ball=ball, step=torch.tensor(step, device=device), nb_steps=nb_steps, random_start=True)

    def loss_on(batch: Batch) -> Loss:
        return lambda z: nn.functional.cross_entropy(model(z), batch.y, reduction="sum")

    def attack(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        back, x, y = x.device, x.to(device), y.to(device)
        x_adv, left = x.clone(), torch.arange(len(x), device=device)
        for _ in range(nb_restarts):
            if len(left):
                batch = Batch.whole(x[left], y[left])
                x_adv[left] = climb_in_chunks(ascent, loss_on, batch, ascent.start(batch.x, batch.part))
                left = left[model(x_adv[left]).argmax(dim=1) == y[left]]
        return x_adv.to(back)

    return attack


def _log(ranks: Ranks, message: str, *, level: int = logging.INFO) -> None:
    """Log once, whatever the number of processes; AutoAttack's figures in its own words."""
    if ranks.rank == 0:
        logger.log(level, "%s", message)
