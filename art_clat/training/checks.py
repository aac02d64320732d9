"""Checks of what a user passes to ``fit``, made before any work is done."""

from __future__ import annotations

import logging
from collections.abc import Sequence

import torch
from art.attacks import EvasionAttack
from art.estimators.classification import PyTorchClassifier
from torch import nn

from art_clat.attacks.tensor_attack import TensorAttack
from art_clat.config import FitOptions, TrainerOptions
from art_clat.layers.freezing import train_all
from art_clat.layers.layer import Layer
from art_clat.models.checks import check_data, check_optimizer_holds, warn_about_eps
from art_clat.models.outputs import unchanged_buffers
from art_clat.models.tensor_classifier import TensorClassifier
from art_clat.training.objectives import find_objective
from art_clat.utils.modes import restored_modes
from art_clat.utils.processes import Ranks

logger = logging.getLogger(__name__)


def check_loss(estimator: PyTorchClassifier) -> None:
    """Refuse a loss that returns one value a sample."""
    if getattr(estimator.loss, "reduction", None) == "none":
        raise ValueError(
            f"`classifier.loss` is {estimator.loss} with reduction 'none', one value a sample; a single number is "
            "needed: `reduction='mean'`."
        )


def check_training_output(classifier: TensorClassifier, x: torch.Tensor, options: TrainerOptions) -> None:
    """Refuse a network that returns something else in training mode, such as auxiliary outputs, if it is trained."""
    if not options.warmup:
        return
    with restored_modes(classifier.model), unchanged_buffers(classifier.model):
        train_all(classifier.model)
        classifier.check_output(x, mode="training")


def warn_before_a_run(
    options: TrainerOptions, attacks: Sequence[TensorAttack], fit: FitOptions, ranks: Ranks, said: set[str]
) -> None:
    """Let the first process warn about what is allowed, but is probably not what the user wants."""
    if ranks.rank > 0:
        return
    never = f"CLAT never begins: {options.warmup}, {fit.nb_epochs}"
    if options.warmup >= fit.nb_epochs and not fit.resume and never not in said:
        said.add(never)
        logger.warning(
            "`warmup` (%d) is not below `nb_epochs` (%d): the whole run is plain adversarial training, and CLAT never "
            "begins. Use more epochs or a smaller `warmup`; to train an epoch at a time, pass `resume=True` and "
            "growing `nb_epochs`.",
            options.warmup,
            fit.nb_epochs,
        )
    for attack in attacks:
        warn_about_eps(attack.attack, attack.classifier.estimator)


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
        reasons = [TensorAttack(attack, classifier).why_generate for attack in attacks] if needs_steps else []
        if why := next((reason for reason in reasons if reason is not None), None):
            raise ValueError(
                f"`{argument}={name!r}` takes the ball and the steps of its inner attack from `attacks`, which it "
                f"cannot here: {why}. `objective='adversarial'` and `first_stage='pgd_at'` accept any attack."
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
