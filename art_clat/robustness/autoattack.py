"""AutoAttack's attacks one at a time (Croce and Hein, arXiv 2003.01690): the authors' code on single batches."""

from __future__ import annotations

import sys
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import nn

from art_clat.utils.robustbench_import import autoattack

#: Perturbs a batch: takes inputs and index labels, returns perturbed inputs.
Attack = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]

VERSIONS = ("standard", "plus", "rand", "few-classes")

#: Not a version of the authors: those of AutoAttack's attacks that two or three classes are enough for, with the
#: restarts of "plus".
FEW = ("apgd-ce", "fab", "square")

#: The attribute of AutoAttack's object that holds each attack, and what the authors set on it beforehand.
_ATTRIBUTES: dict[str, tuple[str, dict[str, Any]]] = {
    "apgd-ce": ("apgd", {"loss": "ce"}),
    "apgd-dlr": ("apgd", {"loss": "dlr"}),
    "apgd-t": ("apgd_targeted", {}),
    "fab": ("fab", {"targeted": False}),
    "fab-t": ("fab", {"targeted": True, "n_restarts": 1}),
    "square": ("square", {}),
}

#: Words in AutoAttack's warnings, and what these mean.
_EXPLANATIONS = {
    "zero gradient": "For some examples the gradient that AutoAttack follows is zero. Its attacks with gradients may "
    "have failed there, and robust accuracy may be overestimated (masked gradients, saturated outputs).",
    "dynamic defense": "The network computes gradients in its forward pass, like a dynamic defense, which changes at "
    "test time. AutoAttack may be too weak for it: use an adaptive attack.",
    "Square Attack has decreased": "Square Attack, which needs no gradients, lowered the robust accuracy that the "
    "attacks with gradients had left. Gradients may be masked and robust accuracy overestimated: try more queries, or "
    "an adaptive attack.",
}


class Ensemble:
    """
    The attacks of one version of AutoAttack on one network.

    They are the attacks of the authors' ``run_standard_evaluation``, with the same seed for every batch, so that the
    same batches make the same adversarial examples. With fewer than ten classes, targeted attacks have fewer targets.

    :param model: Returns logits for inputs in [0, 1], shape (batch, channels, height, width).
    :param norm: ``"Linf"``, ``"L2"`` or ``"L1"``.
    :param eps: ε, in units of the input.
    :param version: ``"standard"``, ``"plus"`` or ``"rand"``; or ``"few-classes"``, which is no version of the
           authors': untargeted APGD-CE and FAB, and Square, with five restarts.
    :param seed: Seed of every attack on every batch.
    :param device: Where the network runs.
    :raises ImportError: If AutoAttack is not installed.
    :raises ValueError: If there are too few classes for its losses.
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        norm: str,
        eps: float,
        version: str,
        nb_classes: int,
        seed: int,
        device: torch.device,
    ) -> None:
        # The DLR loss is of three logits, its targeted form of four.
        needed = {"rand": 3, "few-classes": 2}.get(version, 4)
        if nb_classes < needed:
            rand = " (or 'rand', for a randomised network)" if nb_classes == 3 else ""
            raise ValueError(
                f"AutoAttack's DLR loss needs at least {needed} classes in version {version!r}, the network "
                f"has {nb_classes}. Pass `autoattack_version='few-classes'`{rand}, which is not AutoAttack's standard."
            )
        is_few = version == "few-classes"
        if is_few and nb_classes > 3:
            raise ValueError(
                f"`autoattack_version` 'few-classes' is for two or three classes, the network has {nb_classes}: with "
                "four or more 'standard' is stronger, and comparable."
            )
        version = "plus" if is_few else version
        self._model, self._seed, self._nb_classes = model, seed, nb_classes
        self._make = partial(
            autoattack().AutoAttack, model, norm=norm, eps=eps, seed=seed, version=version, device=device, verbose=False
        )
        #: Names of the attacks, in the order in which they run.
        self.names: tuple[str, ...] = FEW if is_few else tuple(self._make().attacks_to_run)

    def make_attack(self, name: str) -> Any:
        """
        Make the authors' object of one of the attacks. Override this to change its settings.

        :param name: One of :attr:`names`.
        :return: A new object, since an attack changes some of its settings as it runs. Its ``perturb(x, y)`` runs it.
        """
        adversary = self._make()
        attribute, settings = _ATTRIBUTES[name]
        attack = getattr(adversary, attribute)
        for key, value in {**settings, "seed": self._seed, "logger": None}.items():  # without one it uses `warnings`
            setattr(attack, key, value)
        if hasattr(attack, "n_target_classes"):
            attack.n_target_classes = min(attack.n_target_classes, self._nb_classes - 1)
        return attack

    def attack(self, name: str) -> Attack:
        """
        Return one of the attacks as a function.

        :param name: One of :attr:`names`.
        :return: The attack. Inputs that stay classified correctly are returned unchanged.
        """

        def perturb(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
            x_adv: torch.Tensor = self.make_attack(name).perturb(x, y)
            return x_adv

        return perturb

    def forward_passes(self, name: str) -> int:
        """
        Estimate what an attack costs.

        :param name: One of :attr:`names`.
        :return: Forward passes that one example takes at most; a backward pass counts for two.
        """
        attack = self.make_attack(name)
        if name == "square":
            return int(attack.n_restarts * attack.n_queries)
        steps = attack.n_restarts * attack.n_iter * getattr(attack, "eot_iter", 1)
        passes = {"apgd-t": 3 * getattr(attack, "n_target_classes", 1), "fab": 2 + 2 * self._nb_classes}
        passes["fab-t"] = 4 * getattr(attack, "n_target_classes", 1)
        return int(steps * passes.get(name, 3))

    def check_dynamic(self, x: torch.Tensor) -> list[str]:
        """
        Check by AutoAttack's own means whether the network changes at test time.

        :param x: Some inputs, on the network's device.
        :return: A warning if it does.
        """
        from autoattack import checks

        trace = sys.gettrace()
        checks.funcs.update(dict.fromkeys(checks.funcs, 0))  # it would count on from the last network
        try:
            with collect_warnings() as found:
                checks.check_dynamic(self._model, x)
        finally:
            sys.settrace(trace)  # the check removes a debugger's or a coverage tool's
        return found

    @staticmethod
    def check_square(accuracies: Mapping[str, float]) -> list[str]:
        """
        Check by AutoAttack's own means whether Square Attack found what the other attacks did not.

        :param accuracies: ``"clean"``, and robust accuracy after each attack.
        :return: A warning if it did.
        """
        from autoattack import checks

        with collect_warnings() as found:
            checks.check_square_sr(dict(accuracies))
        return found


@contextmanager
def collect_warnings() -> Iterator[list[str]]:
    """
    Collect AutoAttack's warnings in this context, each once and explained. Other warnings pass through.

    :return: The messages, complete when the context is left.
    """
    messages: list[str] = []
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        yield messages
    for one in caught:
        if one.category is not Warning:  # only AutoAttack uses this category
            warnings.warn_explicit(one.message, one.category, one.filename, one.lineno)
            continue
        text = str(one.message)
        explained = next((meaning for words, meaning in _EXPLANATIONS.items() if words in text), text)
        if explained not in messages:
            messages.append(explained)
