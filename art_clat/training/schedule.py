"""The learning rate's schedule: torch's and timm's schedulers, stepped after a batch or an epoch."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch.optim import lr_scheduler as torch_schedulers

from art_clat.config import FitOptions

logger = logging.getLogger(__name__)

#: What the optimiser's groups began with, for schedulers that do not note it there, as torch's others do.
_began_with: WeakKeyDictionary[object, list[object]] = WeakKeyDictionary()

#: A factor of the learning rate below which nothing is trained any more.
NOTHING = 1e-8


class Schedule:
    """
    What steps the learning rate.

    :param scheduler: A scheduler of torch or timm, or `None` for a constant learning rate.
    :param fit: The options of ``fit``.
    :param nb_batches: Number of batches in an epoch.
    """

    def __init__(self, scheduler: Any, fit: FitOptions, nb_batches: int) -> None:
        self.scheduler = scheduler
        self._by_batch = fit.scheduler_step == "batch"
        self._is_timm = _is_timm(scheduler)
        self._nb_epochs, self._nb_batches = fit.nb_epochs, nb_batches

    @classmethod
    def of(
        cls,
        scheduler: object,
        optimizer: torch.optim.Optimizer,
        *,
        fit: FitOptions,
        nb_batches: int,
        has_validation: bool,
    ) -> Schedule:
        """Return the schedule; what cannot step the learning rate of this optimiser is refused."""
        _check_scheduler(scheduler, optimizer, by_batch=fit.scheduler_step == "batch", has_validation=has_validation)
        return cls(scheduler, fit, nb_batches)

    def after_batch(self, nb_batches: int) -> None:
        """Step after a batch of training; `nb_batches` counts those of the run."""
        if self._is_timm:
            self.scheduler.step_update(nb_batches)
        elif self._by_batch:
            self.scheduler.step()

    def after_epoch(self, nb_epochs: int, robust_accuracy: float | None) -> None:
        """
        Step after an epoch.

        :param nb_epochs: Number of epochs of the run so far.
        :param robust_accuracy: On the validation data, in [0, 1]; `None` if this epoch was not validated.
        """
        scheduler = self.scheduler
        waits = _plateau(scheduler) is not None and robust_accuracy is None
        if self._is_timm:
            if not waits or nb_epochs <= scheduler.warmup_t:
                scheduler.step(nb_epochs, robust_accuracy)
        elif isinstance(scheduler, torch_schedulers.ReduceLROnPlateau):
            if robust_accuracy is not None:
                scheduler.step(robust_accuracy)
        elif scheduler is not None and not self._by_batch:
            scheduler.step()

    def state_dict(self) -> dict[str, Any] | None:
        """Return all that changes during a run, and the settings; `None` without a scheduler."""
        return state_of(self.scheduler)

    def load_state_dict(self, state: dict[str, Any] | None) -> None:
        """Load what :meth:`state_dict` returned."""
        if self.scheduler is None or state is None:
            return
        inner = _plateau(self.scheduler) if self._is_timm else None
        if inner is None:
            self.scheduler.load_state_dict(state)
        else:
            inner.load_state_dict(state["lr_scheduler"])
            self.scheduler.restore_lr = state["restore_lr"]

    def check_new(self, *, is_whole: bool, rank: int = 0) -> None:
        """
        Compare the schedule with a run that begins, and warn of what is probably meant for another one.

        :param is_whole: Whether the run ends with this call; if not, a schedule may be longer than it.
        :param rank: Number of this process; the first one warns.
        :raises ValueError: If the scheduler would fail before the run ends.
        """
        warnings = []
        if self.scheduler is not None and self._lr_is_zero() and not self._by_batch:
            name = type(self.scheduler).__name__
            warnings.append(f"{name} begins with the learning rate 0, which trains nothing in an epoch. Begin above 0.")
        for part in self._parts(self._nb_epochs, start=_position(self.scheduler)):
            if part.runs_over() and part.then == "fails":
                raise ValueError(f"`scheduler`: {part.sentence()}")
            if part.runs_over() or part.vanishes() or (is_whole and part.is_cut_off()):
                warnings.append(part.sentence())
        for warning in warnings:
            logger.log(logging.WARNING if rank == 0 else logging.DEBUG, "`scheduler`: %s", warning)

    def check_extended(self, nb_epochs: int) -> None:
        """
        Refuse to go on with a run whose schedule ends with the epochs it was planned for.

        :param nb_epochs: Number of epochs that the run was planned for; this call asks for more.
        :raises ValueError: If the learning rate would rise again or be 0 afterwards, or the scheduler would fail.
        """
        before = {part.name for part in self._parts(nb_epochs) if part.runs_over()}
        for part in self._parts(self._nb_epochs):
            if part.name not in before and part.runs_over():
                raise ValueError(
                    f"`nb_epochs` is {self._nb_epochs}, but the run was planned for {nb_epochs}: its {part.text} "
                    f"{part.fault()}. Begin a new run with a new scheduler from the weights of this one, or train "
                    f"all {self._nb_epochs} epochs anew."
                )

    def _lr_is_zero(self) -> bool:
        return all(group["lr"] == 0 for group in self.scheduler.optimizer.param_groups)

    def _parts(self, nb_epochs: int, start: int = 0) -> Iterator[_Part]:
        """Yield what the schedule is made of, each with the number of the last step that it makes in `nb_epochs`."""
        if self._is_timm:
            unit = _Unit(self._nb_batches if not self.scheduler.t_in_epochs else None, "t_in_epochs={is_epoch}")
            yield from _parts_of_timm(self.scheduler, unit.steps(nb_epochs), unit)
        elif self.scheduler is not None:
            unit = _Unit(self._nb_batches if self._by_batch else None, "scheduler_step='{other}'")
            yield from _parts_of_torch(self.scheduler, start + unit.steps(nb_epochs), unit)


@dataclass(frozen=True)
class _Unit:
    """What a step is: a batch, of which an epoch has `nb_batches`, or an epoch (`None`)."""

    nb_batches: int | None
    option: str

    def steps(self, nb_epochs: int) -> int:
        return nb_epochs * (self.nb_batches or 1)

    def __str__(self) -> str:
        return "epoch" if self.nb_batches is None else "batch"

    def other(self) -> str:
        """Say what to do if the scheduler counts the other unit."""
        other, others = ("batch", "batches") if self.nb_batches is None else ("epoch", "epochs")
        return f"`{self.option.format(other=other, is_epoch=other == 'epoch')}` if it counts {others}"


@dataclass(frozen=True, kw_only=True)
class _Part:
    """
    A scheduler, or one of a sequence.

    :param name: Its class.
    :param argument: The argument that sets its length, and its value.
    :param length: In steps.
    :param steps: How many steps it makes in the run.
    :param unit: What a step is.
    :param then: What happens after its end: ``"fails"``, ``"rises"``, ``"zero"``, or ``""`` for nothing that harms.
    :param strict: Whether a run that ends just before it is told, too; otherwise only one that ends before its middle.
    :param factor: What the learning rate is multiplied by in the run, if that is known.
    """

    name: str
    argument: str
    value: object
    length: int
    steps: int
    unit: _Unit
    then: str = ""
    strict: bool = False
    factor: float = 1.0

    @property
    def text(self) -> str:
        return f"{self.name}({self.argument}={self.value})"

    def runs_over(self) -> bool:
        """Return whether the run goes on after the scheduler's end, and suffers from it."""
        if not self.then or self.steps <= self.length:
            return False
        # Cycles that end with the lowest learning rate are meant, unless their length is the number of epochs.
        ends_low = self.then == "rises" and self.steps % (2 * self.length) == self.length
        return not ends_low or (self.unit.nb_batches is not None and self.steps == self.unit.steps(self.length))

    def is_cut_off(self) -> bool:
        """Return whether the run ends long before the scheduler does."""
        return self.length > self.steps if self.strict else self.length >= 2 * self.steps

    def vanishes(self) -> bool:
        """Return whether the learning rate becomes so small that nothing is trained any more."""
        return 0 < self.factor < NOTHING

    def fault(self) -> str:
        """Say what is wrong."""
        if self.runs_over():
            return {
                "fails": f"fails after {self.length} steps",
                "rises": f"has its lowest learning rate after {self.length} steps and then raises it again",
                "zero": f"has the learning rate 0 after {self.length} steps, which trains nothing",
            }[self.then]
        if self.vanishes():
            return f"multiplies the learning rate by {self.factor:.0e}"
        return "does not come to its end"

    def sentence(self) -> str:
        """Say what is wrong, and what to do."""
        is_longer = self.is_cut_off() and not self.runs_over()
        other = f", or use {self.unit.other()}" if is_longer == (self.unit.nb_batches is None) else ""
        return (
            f"{self.text} {self.fault()}; this run makes {self.steps} steps, one after each {self.unit}. Choose "
            f"`{self.argument}` for {self.steps}{other}."
        )


def _parts_of_torch(scheduler: Any, end: int, unit: _Unit, *, is_last: bool = True) -> Iterator[_Part]:
    """Yield the parts of a scheduler of torch; `end` is the number of its last step in the run."""
    if type(scheduler) is torch_schedulers.ChainedScheduler:
        for one in scheduler._schedulers:
            yield from _parts_of_torch(one, end, unit, is_last=is_last)
    elif type(scheduler) is torch_schedulers.SequentialLR:
        begins = [0, *scheduler._milestones]
        ends = [*(milestone - 1 for milestone in scheduler._milestones), end]
        for one, first, last in zip(scheduler._schedulers, begins, ends, strict=True):
            if first <= end:
                yield from _parts_of_torch(one, min(last, end) - first, unit, is_last=is_last and last >= end)
        milestones = list(scheduler._milestones)
        yield _part(scheduler, "milestones", end, unit, value=milestones, length=max(milestones), strict=is_last)
    elif (make := _TORCH.get(type(scheduler))) is not None:
        part = make(scheduler, end, unit)
        # What another one follows need not come to its end, and may go past it.
        then = part.then if is_last or part.then == "fails" else ""
        yield replace(part, length=part.length if is_last else min(part.length, end), then=then)


def _part(scheduler: Any, argument: str, steps: int, unit: _Unit, **settings: Any) -> _Part:
    value = settings.pop("value") if "value" in settings else getattr(scheduler, argument)
    settings = {"length": value, **settings}
    return _Part(name=type(scheduler).__name__, argument=argument, value=value, steps=steps, unit=unit, **settings)


def _step_lr(s: Any, end: int, unit: _Unit) -> _Part:
    return _part(s, "step_size", end, unit, strict=True, factor=_power(s.gamma, end // s.step_size))


def _multi_step_lr(s: Any, end: int, unit: _Unit) -> _Part:
    milestones = sorted(s.milestones.elements())
    factor = _power(s.gamma, sum(milestone <= end for milestone in milestones))
    last = max(milestones, default=0)
    return _part(s, "milestones", end, unit, value=milestones, length=last, strict=True, factor=factor)


#: How long torch's schedulers are; those that are not here have no length, or only the user knows it.
_TORCH: Mapping[type, Callable[[Any, int, _Unit], _Part]] = {
    torch_schedulers.OneCycleLR: lambda s, end, unit: _part(s, "total_steps", end, unit, then="fails", strict=True),
    torch_schedulers.CosineAnnealingLR: lambda s, end, unit: _part(s, "T_max", end, unit, then="rises"),
    torch_schedulers.CosineAnnealingWarmRestarts: lambda s, end, unit: _part(s, "T_0", end, unit),
    torch_schedulers.PolynomialLR: lambda s, end, unit: _part(s, "total_iters", end, unit, then="zero"),
    torch_schedulers.LinearLR: lambda s, end, unit: _part(
        s, "total_iters", end, unit, then="zero" if s.end_factor == 0 else ""
    ),
    torch_schedulers.ConstantLR: lambda s, end, unit: _part(s, "total_iters", end, unit),
    torch_schedulers.CyclicLR: lambda s, end, unit: _part(
        s, "step_size_up", end, unit, value=round(s.total_size * s.step_ratio)
    ),
    torch_schedulers.ExponentialLR: lambda s, end, unit: _part(
        s, "gamma", end, unit, length=0, factor=_power(s.gamma, end)
    ),
    torch_schedulers.StepLR: _step_lr,
    torch_schedulers.MultiStepLR: _multi_step_lr,
}


def _parts_of_timm(scheduler: Any, steps: int, unit: _Unit) -> Iterator[_Part]:
    """Yield the length of a scheduler of timm; `steps` is the number of its steps in the run."""
    name = type(scheduler).__name__
    if name in ("CosineLRScheduler", "PolyLRScheduler", "TanhLRScheduler"):
        length = scheduler.t_initial + (scheduler.warmup_t if scheduler.warmup_prefix else 0)
        ends_at_zero = scheduler.lr_min == 0 and scheduler.cycle_limit == 1
        yield _part(scheduler, "t_initial", steps, unit, length=length, then="zero" if ends_at_zero else "")
    elif name == "StepLRScheduler":
        factor = _power(scheduler.decay_rate, int(steps // scheduler.decay_t))
        yield _part(scheduler, "decay_t", steps, unit, strict=True, factor=factor)
    elif name == "MultiStepLRScheduler":
        yield _part(scheduler, "decay_t", steps, unit, length=max(scheduler.decay_t, default=0), strict=True)


def state_of(scheduler: Any) -> dict[str, Any] | None:
    """Return a scheduler's state; that of timm's plateau scheduler would leave out what it counts."""
    if scheduler is None:
        return None
    state: dict[str, Any] = scheduler.state_dict()
    if _is_timm(scheduler) and (inner := _plateau(scheduler)) is not None:
        settings = {name: value for name, value in vars(scheduler).items() if name not in ("optimizer", "lr_scheduler")}
        return {**settings, "lr_scheduler": inner.state_dict(), "restore_lr": scheduler.restore_lr}
    return state


def initial_rates(scheduler: object, optimizer: torch.optim.Optimizer) -> list[object]:
    """Return the learning rate of each group before the scheduler's first step."""
    rates = [group.get("initial_lr", group["lr"]) for group in optimizer.param_groups]
    return rates if _plateau(scheduler) is None else _began_with.setdefault(scheduler, rates)


def _is_timm(scheduler: object) -> bool:
    from timm.scheduler.scheduler import Scheduler

    return isinstance(scheduler, Scheduler)


def _plateau(scheduler: object) -> torch_schedulers.ReduceLROnPlateau | None:
    """Return the scheduler that waits for the accuracy to stop rising, if there is one."""
    inner = getattr(scheduler, "lr_scheduler", scheduler)
    return inner if isinstance(inner, torch_schedulers.ReduceLROnPlateau) else None


def _position(scheduler: Any) -> int:
    """Return how many steps a scheduler of torch has made."""
    if isinstance(scheduler, torch_schedulers.ChainedScheduler):
        return _position(scheduler._schedulers[0])
    return int(getattr(scheduler, "last_epoch", 0))


def _power(gamma: float, exponent: int) -> float:
    """Compute gamma to the power of a whole number; a product that overflows is infinite."""
    try:
        return float(gamma**exponent)
    except OverflowError:
        return float("inf")


def _check_scheduler(
    scheduler: object, optimizer: torch.optim.Optimizer, *, by_batch: bool, has_validation: bool
) -> None:
    """Refuse what cannot step the learning rate of this optimiser; `None` is accepted."""
    if scheduler is None:
        if all(group["lr"] == 0 for group in optimizer.param_groups):
            raise ValueError(
                "`classifier.optimizer` has the learning rate 0, so nothing would be trained. ART's "
                "fast-is-better-than-free trainer leaves it at 0. Set it, or pass a `scheduler` that raises it."
            )
        if by_batch:
            raise ValueError("`scheduler_step='batch'` needs a `scheduler`.")
        return
    if not isinstance(scheduler, torch_schedulers.LRScheduler) and not _is_timm(scheduler):
        raise TypeError(
            "`scheduler` must be a scheduler of torch.optim.lr_scheduler or timm.scheduler, got "
            f"{type(scheduler).__name__}."
            + " Pass the first of the two that timm's `create_scheduler_v2` returns."
            * isinstance(scheduler, tuple)
        )
    if getattr(scheduler, "optimizer", optimizer) is not optimizer:
        raise ValueError(
            "`scheduler` belongs to another optimizer than `classifier.optimizer`; build it on `classifier.optimizer`."
        )
    if by_batch and getattr(scheduler, "t_in_epochs", False):
        raise ValueError(
            f"`scheduler_step='batch'`: {type(scheduler).__name__} counts epochs. Make it with `t_in_epochs=False`."
        )
    if (plateau := _plateau(scheduler)) is not None:
        if not has_validation:
            raise ValueError(
                "`scheduler` waits for the robust accuracy on the validation data to stop rising: it needs "
                "`validation_data`."
            )
        if by_batch:
            raise ValueError("`scheduler_step='batch'`: the validation that `scheduler` waits for follows an epoch.")
        if plateau.mode != "max":
            raise ValueError(
                "`scheduler` is stepped with the robust accuracy on the validation data, which rises, but waits for a "
                f"value that falls (mode={plateau.mode!r}). Make it with `mode='max'`."
            )
