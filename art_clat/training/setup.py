"""Prepare a run: check what its processes share, make what saves it, and what puts the model back."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import numpy as np
import torch
from art.attacks import EvasionAttack
from art.estimators.classification import PyTorchClassifier

from art_clat.config import FitOptions, PerformanceOptions, TrainerOptions
from art_clat.models.tensor_classifier import channels_last
from art_clat.training.averaging import Average
from art_clat.training.checkpoint import Checkpoint, Memory
from art_clat.training.checks import check_loss_learns_nothing, check_shareable
from art_clat.training.data import Batches
from art_clat.training.description import describe
from art_clat.training.keeper import Keeper
from art_clat.training.schedule import Schedule
from art_clat.training.state import fingerprint_of_state
from art_clat.utils.descriptions import fingerprint, flattened
from art_clat.utils.modes import restored_modes
from art_clat.utils.processes import Ranks
from art_clat.utils.randomness import seeded_randomness

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
    data: Tensors | None,
    validation: Tensors | None,
    schedule: Schedule,
    ranks: Ranks,
    kept: dict[str, Any] | None,
) -> Keeper:
    """
    Refuse what processes cannot share or a checkpoint cannot hold, and return what saves the run.

    It is saved in the folder of ``fit``, otherwise in `kept`, or not at all if that is `None`. The data of a generator
    are `None`.
    """
    model, optimizer, is_saved = estimator.model, estimator.optimizer, fit.checkpoint is not None or kept is not None
    facts: dict[str, object] = {}
    if fit.resume and fit.checkpoint is None and kept is None:
        raise ValueError(
            "`resume=True`: the latest call of this trainer was without it, so nothing of it was kept to go on with. "
            "Pass it in every call, or make a new trainer."
        )
    if data is None:
        if ranks.size > 1:
            raise ValueError(
                f"`fit_generator` trains in one process, but there are {ranks.size}, and a generator's data cannot be "
                "shared out. Use `fit`."
            )
        return Keeper(model, average=Average.of(model, options.ema_decay))
    if ranks.size > 1:
        check_shareable(estimator, ranks, nb_samples=len(data[0]), batch_size=fit.batch_size, drop_last=fit.drop_last)
    if is_saved or ranks.size > 1:
        check_loss_learns_nothing(estimator)
        facts = {
            **flattened(options.describe()),
            **fit.describe(),
            "the inputs": fingerprint(data[0]),
            "the labels": fingerprint(data[1]),
            "validation_data": None if validation is None else fingerprint(*validation),
            **describe(estimator, schedule.scheduler, attacks),
        }
    if ranks.size > 1:
        shared = {
            "checkpoint": fit.checkpoint is not None,
            "callbacks": [type(callback).__name__ for callback in fit.callbacks],
            "resume": fit.resume,
            "checkpoint_every": fit.checkpoint_every,
            "the optimizer's state": fingerprint_of_state(optimizer),
            "restore_best": fit.restore_best,
        }
        ranks.check_same({**facts, **shared}, torch.device(estimator.device))
    average, checkpoint = Average.of(model, options.ema_decay), None
    saved = (model, optimizer, schedule, facts, average)
    if fit.checkpoint is not None:
        checkpoint = Checkpoint(fit.checkpoint, *saved)
    elif kept is not None:
        checkpoint = Memory(kept, *saved)
    return Keeper(
        model,
        checkpoint,
        average=average,
        every=fit.checkpoint_every,
        keeps_best=fit.restore_best or fit.checkpoint is not None,
        writes=ranks.rank == 0 or fit.checkpoint is None,
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


def draw_seed(seed: int | None, ranks: Ranks, device: torch.device) -> int:
    """Return the user's seed, or one that the first process draws from NumPy's global generator."""
    if seed is not None:
        return int(seed)
    drawn = torch.tensor(int(np.random.randint(2**32, dtype=np.uint64)), device=device)
    return int(ranks.first(drawn))


@contextmanager
def restored_model(
    estimator: PyTorchClassifier, performance: PerformanceOptions, seed: int, device: torch.device
) -> Iterator[ExitStack]:
    """
    Restore flags, modes, memory formats and random generators on leaving, and drop the gradients.

    What is entered into the stack that comes is left before.
    """
    wrapped = estimator._model
    with ExitStack() as stack:
        stack.enter_context(restored_modes(wrapped))
        stack.enter_context(seeded_randomness(seed, device))
        stack.callback(wrapped.zero_grad)
        freezing = stack.enter_context(ExitStack())
        if performance.channels_last:
            stack.enter_context(channels_last(estimator.model, estimator.optimizer))
        yield freezing
