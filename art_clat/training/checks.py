"""Checks of what a user passes to ``fit``, made before any work is done."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from art.attacks import EvasionAttack
from art.estimators.classification import PyTorchClassifier
from torch import nn

from art_clat.attacks.tensor_attack import TensorAttack
from art_clat.config import TrainerOptions
from art_clat.layers.layer import Layer
from art_clat.models.checks import check_data, check_optimizer_holds
from art_clat.models.tensor_classifier import TensorClassifier
from art_clat.training.objectives import find_objective
from art_clat.utils.processes import Ranks


def check_loss_learns_nothing(estimator: PyTorchClassifier) -> None:
    """Refuse a loss with parameters, which would be neither saved nor shared."""
    loss = estimator.loss
    names = [name for name, _ in loss.named_parameters()] if isinstance(loss, nn.Module) else []
    if names:
        raise ValueError(
            f"`classifier.loss` has parameters ({', '.join(names)}), which are neither saved nor shared; `checkpoint` "
            "and several processes need a loss without parameters."
        )


def check_shareable(
    estimator: PyTorchClassifier, ranks: Ranks, *, nb_samples: int, batch_size: int, drop_last: bool
) -> None:
    """Refuse what several processes would compute differently from one: small batches, losses, norms."""
    last = 0 if drop_last else nb_samples % batch_size
    if min(batch_size, nb_samples, last or batch_size) < ranks.size:
        raise ValueError(
            f"`batch_size` {batch_size} leaves a batch of {last or batch_size} of {nb_samples} inputs, fewer than "
            f"the {ranks.size} processes: use another `batch_size`, or `drop_last=True`."
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
            "process than in another; on several processes all samples must count."
        )
    for name, module in estimator.model.named_modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm) and module.running_mean is None:
            raise ValueError(
                f"`classifier.model`: {name} has no running statistics; several processes need a BatchNorm with "
                "`track_running_stats=True`."
            )
        if isinstance(module, nn.modules.instancenorm._InstanceNorm) and module.track_running_stats:
            raise ValueError(
                f"`classifier.model`: {name} keeps running statistics of single samples, which are not shared; "
                "several processes need an InstanceNorm with `track_running_stats=False`."
            )


def check_inner_attacks(
    options: TrainerOptions, attacks: Sequence[EvasionAttack], classifier: TensorClassifier
) -> None:
    """Refuse attacks whose steps are unknown, if an objective climbs another loss with them."""
    for argument in ("first_stage", "objective"):
        name = getattr(options, argument)
        needs_steps = find_objective(name, argument=argument).has_inner_loss()
        if needs_steps and any(TensorAttack(attack, classifier).ascent is None for attack in attacks):
            kinds = ", ".join(type(attack).__name__ for attack in attacks)
            raise ValueError(
                f"`{argument}={name!r}` takes the ball and the steps of its inner attack from `attacks`, got {kinds}. "
                "Accepted are ProjectedGradientDescent, BasicIterativeMethod and FastGradientMethod in the norm inf, 2 "
                "or 1, on a classifier whose preprocessing is PyTorch's. `objective='adversarial'` accepts any attack."
            )


def check_validation(estimator: PyTorchClassifier, data: object) -> tuple[torch.Tensor, torch.Tensor] | None:
    """Check validation data, (x_val, y_val) or `None`, and return them as tensors."""
    if data is None:
        return None
    if not isinstance(data, (tuple, list)) or len(data) != 2:
        raise ValueError(f"`validation_data` must be a tuple (x_val, y_val), got {type(data).__name__}.")
    return check_data(estimator, *data, argument="validation_data[0]", label_argument="validation_data[1]")


def check_optimizer_trains(
    optimizer: torch.optim.Optimizer, model: nn.Module, eligible: Sequence[Layer] | None
) -> None:
    """Refuse an optimiser that does not hold the eligible layers' parameters, or the whole network's (`None`)."""
    if eligible is None:  # named by the modules that hold the parameters
        named = [(name.rpartition(".")[0] or name, parameter) for name, parameter in model.named_parameters()]
    else:
        named = [(layer.name, parameter) for layer in eligible for parameter in layer.parameters()]
    check_optimizer_holds(optimizer, named)
