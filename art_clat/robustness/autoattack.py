"""AutoAttack's attacks one at a time (Croce and Hein, arXiv 2003.01690): the authors' code, a batch at a call."""

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

#: What perturbs a batch: inputs and labels in, perturbed inputs out.
Attack = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]

VERSIONS = ("standard", "plus", "rand")

#: The part of AutoAttack's object that each of its attacks is, and what the authors set on it beforehand.
_PARTS: dict[str, tuple[str, dict[str, Any]]] = {
    "apgd-ce": ("apgd", {"loss": "ce"}),
    "apgd-dlr": ("apgd", {"loss": "dlr"}),
    "apgd-t": ("apgd_targeted", {}),
    "fab": ("fab", {"targeted": False}),
    "fab-t": ("fab", {"targeted": True, "n_restarts": 1}),
    "square": ("square", {}),
}

#: What AutoAttack's warnings say, and what they mean.
_PLAIN_WORDS = {
    "zero gradient": "For some examples the gradient that AutoAttack follows is zero: its attacks that need one may "
    "have failed there, and robust accuracy may be overestimated (masked gradients, saturated outputs).",
    "dynamic defense": "The network computes gradients in its forward pass, as a dynamic defense does that changes at "
    "test time: AutoAttack may be too weak for it, an adaptive attack is needed.",
    "Square Attack has decreased": "Square Attack, which needs no gradients, lowered the robust accuracy that the "
    "attacks with gradients had left: gradients may be masked, and robust accuracy overestimated; try more of its "
    "queries, or an adaptive attack.",
}


class Ensemble:
    """
    The attacks of one version of AutoAttack on one network.

    They are what the authors' ``run_standard_evaluation`` runs, with the same seed for every batch, so that the same
    batches give the same adversarial examples. With fewer than ten classes there are as many targets as classes allow.

    :param model: Gives logits for inputs in [0, 1], shape (batch, channels, height, width).
    :param norm: ``"Linf"``, ``"L2"`` or ``"L1"``.
    :param eps: ε, in units of the input.
    :param version: ``"standard"``, ``"plus"`` or ``"rand"``.
    :param nb_classes: Number of classes.
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
        needed = 3 if version == "rand" else 4  # the DLR loss is of three logits, its targeted form of four
        if nb_classes < needed:
            raise ValueError(
                f"AutoAttack's DLR loss needs at least {needed} classes in version {version!r}, the network "
                f"has {nb_classes}. Pass `autoattack_version=None`."
            )
        self._model, self._seed, self._nb_classes = model, seed, nb_classes
        self._make = partial(
            autoattack().AutoAttack, model, norm=norm, eps=eps, seed=seed, version=version, device=device, verbose=False
        )
        #: Names of the attacks, in the order in which they run.
        self.names: tuple[str, ...] = tuple(self._make().attacks_to_run)

    def attack(self, name: str) -> Attack:
        """
        Give one of the attacks.

        :param name: One of :attr:`names`.
        :return: The attack. What it does not get misclassified comes back as it is.
        """

        def perturb(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
            x_adv: torch.Tensor = self._part(name).perturb(x, y)
            return x_adv

        return perturb

    def forward_passes(self, name: str) -> int:
        """
        Estimate what an attack costs.

        :param name: One of :attr:`names`.
        :return: Forward passes that one example takes at most; a backward pass counts for two.
        """
        part = self._part(name)
        if name == "square":
            return int(part.n_restarts * part.n_queries)
        steps = part.n_restarts * part.n_iter * getattr(part, "eot_iter", 1)
        passes = {"apgd-t": 3 * getattr(part, "n_target_classes", 1), "fab": 2 + 2 * self._nb_classes}
        passes["fab-t"] = 4 * getattr(part, "n_target_classes", 1)
        return int(steps * passes.get(name, 3))

    def check_dynamic(self, x: torch.Tensor) -> None:
        """
        Have AutoAttack warn of a network that changes at test time; :func:`heard` hears it.

        :param x: Some inputs.
        """
        from autoattack import checks

        trace = sys.gettrace()
        checks.funcs.update(dict.fromkeys(checks.funcs, 0))  # it counts on from the last network it saw
        try:
            checks.check_dynamic(self._model, x)
        finally:
            sys.settrace(trace)  # a debugger's or a coverage tool's, which the check takes away

    @staticmethod
    def check_square(accuracies: Mapping[str, float]) -> None:
        """
        Have AutoAttack warn if Square Attack found what the others did not; :func:`heard` hears it.

        :param accuracies: ``"clean"``, and robust accuracy after each attack.
        """
        from autoattack import checks

        checks.check_square_sr(dict(accuracies))

    def _part(self, name: str) -> Any:
        adversary = self._make()  # a new one for each batch: some settings change as it runs
        attribute, settings = _PARTS[name]
        part = getattr(adversary, attribute)
        for key, value in {**settings, "seed": self._seed, "logger": None}.items():  # without one it uses `warnings`
            setattr(part, key, value)
        if hasattr(part, "n_target_classes"):
            part.n_target_classes = min(part.n_target_classes, self._nb_classes - 1)
        return part


@contextmanager
def heard() -> Iterator[list[str]]:
    """
    Collect what AutoAttack warns of in this context, in plain words and each thing once.

    :return: The messages, complete when the context is left.
    """
    messages: list[str] = []
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        yield messages
    for one in caught:
        if one.category is not Warning:  # which only AutoAttack uses
            warnings.warn_explicit(one.message, one.category, one.filename, one.lineno)
            continue
        text = str(one.message)
        plain = next((words for part, words in _PLAIN_WORDS.items() if part in text), text)
        if plain not in messages:
            messages.append(plain)
