"""Prepare a run: check what its processes share, and make what saves it."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from art.attacks import EvasionAttack
from art.estimators.classification import PyTorchClassifier

from art_clat.config import FitOptions, TrainerOptions
from art_clat.training.averaging import Average
from art_clat.training.checkpoint import Checkpoint, Keeper, fingerprint_of_state
from art_clat.training.checks import check_loss_learns_nothing, check_shareable
from art_clat.training.data import Batches
from art_clat.training.description import describe
from art_clat.utils.descriptions import fingerprint, flattened
from art_clat.utils.processes import Ranks

#: Training samples that a selection measures at most, unless the user has said how many.
MOST_MEASURED = 1024

#: Inputs and labels, on the CPU.
Tensors = tuple[torch.Tensor, torch.Tensor]


def make_keeper(
    estimator: PyTorchClassifier,
    attacks: Sequence[EvasionAttack],
    *,
    options: TrainerOptions,
    fit: FitOptions,
    data: Tensors,
    validation: Tensors | None,
    scheduler: torch.optim.lr_scheduler.LRScheduler | None,
    ranks: Ranks,
) -> Keeper:
    """Refuse what processes cannot share or a checkpoint cannot hold, and return what saves the run."""
    model, optimizer, has_checkpoint = estimator.model, estimator.optimizer, fit.checkpoint is not None
    facts: dict[str, object] = {}
    if ranks.size > 1:
        check_shareable(estimator, ranks, nb_samples=len(data[0]), batch_size=fit.batch_size, drop_last=fit.drop_last)
    if has_checkpoint or ranks.size > 1:
        check_loss_learns_nothing(estimator)
        facts = {
            **flattened(options.describe()),
            **fit.describe(),
            "the inputs": fingerprint(data[0]),
            "the labels": fingerprint(data[1]),
            "validation_data": None if validation is None else fingerprint(*validation),
            **describe(estimator, scheduler, attacks),
        }
    if ranks.size > 1:
        shared = {
            "checkpoint": has_checkpoint,
            "checkpoint_every": fit.checkpoint_every,
            "the optimizer's state": fingerprint_of_state(optimizer),
            "restore_best": fit.restore_best,
        }
        ranks.check_same({**facts, **shared}, torch.device(estimator.device))
    average, checkpoint = Average.of(model, options.ema_decay), None
    if fit.checkpoint is not None:
        checkpoint = Checkpoint(fit.checkpoint, model, optimizer, scheduler, facts, average)
    return Keeper(
        model,
        checkpoint,
        average=average,
        every=fit.checkpoint_every,
        keeps_best=fit.restore_best or has_checkpoint,
        writes=ranks.rank == 0,
    )


def nb_measured(options: TrainerOptions, attacks: Sequence[EvasionAttack], batches: Batches) -> int:
    """
    Return on how many training samples a selection measures.

    Unless the user has said how many, it takes at most a third of an epoch's time. A step of an attack takes two
    forward passes, the measurement another two, an update about three.
    """
    if options.selection.samples is not None:
        return options.selection.samples
    steps = max(1, int(getattr(attacks[0], "max_iter", 1)))
    in_an_epoch = steps if options.reuse_perturbations is None else min(steps, options.reuse_perturbations.steps)
    return max(1, min(MOST_MEASURED, batches.nb_samples * (2 * in_an_epoch + 3) // (3 * (2 * steps + 2))))
