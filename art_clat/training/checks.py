"""Checks of what a user passes to ``fit``, made before any work is done."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from art.attacks import EvasionAttack
from art.estimators.classification import PyTorchClassifier
from torch import nn

from art_clat.attacks.tensor_attack import TensorAttack
from art_clat.config import TrainerOptions
from art_clat.models.checks import check_data
from art_clat.models.tensor_classifier import TensorClassifier
from art_clat.training.objectives import find_objective
from art_clat.utils.processes import Ranks


def check_scheduler(scheduler: object, optimizer: torch.optim.Optimizer) -> None:
    """
    Refuse what cannot schedule the learning rate of an optimiser, epoch by epoch.

    :param scheduler: What the user passed, or `None`.
    :param optimizer: The classifier's optimiser.
    :raises TypeError: If it is no scheduler, or one that needs a metric.
    :raises ValueError: If it belongs to another optimiser, or there is none to raise a learning rate of 0.
    """
    if scheduler is None:
        if all(group["lr"] == 0 for group in optimizer.param_groups):
            raise ValueError(
                "`classifier.optimizer` has the learning rate 0, where ART's fast-is-better-than-free trainer "
                "leaves it, and there is no `scheduler` to raise it: nothing would be trained."
            )
        return
    if not isinstance(scheduler, torch.optim.lr_scheduler.LRScheduler):
        raise TypeError(f"`scheduler` must be a torch.optim.lr_scheduler.LRScheduler, got {type(scheduler).__name__}.")
    if isinstance(scheduler, torch.optim.lr_scheduler.ReduceLROnPlateau):
        raise TypeError("`scheduler` is stepped once an epoch without a metric; ReduceLROnPlateau needs one.")
    if scheduler.optimizer is not optimizer:
        raise ValueError("`scheduler` belongs to another optimizer than `classifier.optimizer`.")


def check_loss_learns_nothing(estimator: PyTorchClassifier) -> None:
    """
    Refuse a loss with parameters, which would be neither saved nor shared.

    :param estimator: The classifier.
    :raises ValueError: If its loss has some.
    """
    loss = estimator.loss
    names = [name for name, _ in loss.named_parameters()] if isinstance(loss, nn.Module) else []
    if names:
        raise ValueError(
            f"`classifier.loss` has parameters of its own ({', '.join(names)}) that are neither saved nor shared; "
            "`checkpoint` and several processes need a loss without."
        )


def check_shareable(
    estimator: PyTorchClassifier, ranks: Ranks, *, nb_samples: int, batch_size: int, drop_last: bool
) -> None:
    """
    Refuse what several processes would compute otherwise than one.

    :param estimator: The classifier.
    :param ranks: The processes.
    :param nb_samples: Number of training samples.
    :param batch_size: Samples in a batch of all processes.
    :param drop_last: Whether a smaller last batch is left out.
    :raises ValueError: If a batch has fewer samples than there are processes, the loss is no plain mean, or a norm
            keeps statistics that cannot be shared.
    """
    last = 0 if drop_last else nb_samples % batch_size
    if min(batch_size, nb_samples, last or batch_size) < ranks.size:
        raise ValueError(
            f"`batch_size` {batch_size} leaves a batch of {last or batch_size} of {nb_samples} inputs, fewer than "
            f"the {ranks.size} processes: choose another `batch_size`, or `drop_last=True`."
        )
    loss = estimator.loss
    if getattr(loss, "reduction", None) != "mean" or getattr(loss, "weight", None) is not None:
        raise ValueError(
            f"`classifier.loss` is {loss} with reduction {getattr(loss, 'reduction', None)!r}; on several "
            "processes it must be a mean over the samples: `reduction='mean'`, and no class weights."
        )
    if 0 <= getattr(loss, "ignore_index", -1) < estimator.nb_classes:
        raise ValueError(
            f"`classifier.loss` ignores the class {loss.ignore_index}, so its mean is over fewer samples in one "
            "process than in another; several processes need all samples to count."
        )
    for name, module in estimator.model.named_modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm) and module.running_mean is None:
            raise ValueError(f"`classifier.model`: {name} has no running statistics; several processes need them.")
        if isinstance(module, nn.modules.instancenorm._InstanceNorm) and module.track_running_stats:
            raise ValueError(
                f"`classifier.model`: {name} keeps running statistics of single samples, which are not shared; "
                "several processes need an InstanceNorm with `track_running_stats=False`."
            )


def check_inner_attacks(
    options: TrainerOptions, attacks: Sequence[EvasionAttack], classifier: TensorClassifier
) -> None:
    """
    Refuse attacks whose steps are not known for an objective that climbs a loss of its own.

    :param options: The trainer's options.
    :param attacks: The attacks.
    :param classifier: The classifier.
    :raises ValueError: If one runs through its own ``generate``.
    """
    for argument in ("first_stage", "objective"):
        name = getattr(options, argument)
        needs_steps = find_objective(name, argument=argument).has_inner_loss()
        if needs_steps and any(TensorAttack(attack, classifier).ascent is None for attack in attacks):
            kinds = ", ".join(type(attack).__name__ for attack in attacks)
            raise ValueError(
                f"`{argument}={name!r}` takes the ball and the steps of its inner attack from `attacks`: "
                "ProjectedGradientDescent, BasicIterativeMethod or FastGradientMethod in the norm inf, 2 or 1 on a "
                f"classifier whose preprocessing is PyTorch's are accepted, got {kinds}. "
                "`objective='adversarial'` takes any attack."
            )


def check_validation(estimator: PyTorchClassifier, data: object) -> tuple[torch.Tensor, torch.Tensor] | None:
    """
    Check validation data and return them as tensors.

    :param estimator: The classifier they are for.
    :param data: What the user passed, or `None`.
    :return: Inputs and labels, or `None`.
    :raises ValueError: If it is no pair, or the data are unusable.
    """
    if data is None:
        return None
    if not isinstance(data, (tuple, list)) or len(data) != 2:
        raise ValueError(f"`validation_data` must be a tuple (x_val, y_val), got {type(data).__name__}.")
    return check_data(estimator, *data, argument="validation_data[0]", label_argument="validation_data[1]")
