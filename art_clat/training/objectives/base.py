"""What an objective is: a loss to climb, and a loss to minimise."""

from __future__ import annotations

import abc
from collections.abc import Callable, Sequence
from typing import ClassVar, NamedTuple

import torch

from art_clat.attacks.ascent import Loss
from art_clat.attacks.tensor_attack import TensorAttack
from art_clat.layers.layer import Layer
from art_clat.models.tensor_classifier import TensorClassifier
from art_clat.utils.batch import Batch
from art_clat.utils.checks import check_choice


class BatchLoss(NamedTuple):
    """
    The loss of one batch and its parts.

    :param loss: The loss to minimise, with its graph.
    :param cross_entropy: Its first term, detached: the classifier's loss, or what a rival uses instead.
    :param criticality_loss: Its second term, detached, before its weight: the batch mean of the summed feature
           distance, or of a rival's term.
    :param logits: Shape (batch, nb_classes), detached.
    """

    loss: torch.Tensor
    cross_entropy: torch.Tensor
    criticality_loss: torch.Tensor
    logits: torch.Tensor

    @classmethod
    def weighted(
        cls, cross_entropy: torch.Tensor, term: torch.Tensor, weight: float, logits: torch.Tensor
    ) -> BatchLoss:
        """
        Add the weighted batch mean of a second term to a cross-entropy.

        :param cross_entropy: Mean over the batch, with its graph.
        :param term: One value a sample, with its graph.
        :param weight: λ, at least 0.
        :param logits: Shape (batch, nb_classes).
        :return: The loss and its parts.
        """
        mean = term.mean()
        return cls(cross_entropy + weight * mean, cross_entropy.detach(), mean.detach(), logits.detach())


class Objective(abc.ABC):
    """
    What training climbs with its inner attack, and what it then minimises.

    :param classifier: The classifier that is trained.
    :param layers: The layers that are trained; `None` for the whole network.
    :param weight: λ of eq. 6, or the weight of a rival's second term; at least 0.
    """

    #: The weight if the trainer's ``criticality_weight`` is `None`.
    default_weight: ClassVar[float] = 0.0
    #: Whether it can train the whole network, and so be a ``first_stage``.
    trains_whole_network: ClassVar[bool] = False
    #: γ of AWP if the trainer's is 0. If this one is positive, the first stage uses the trainer's, too.
    weight_perturbation: ClassVar[float] = 0.0
    #: Whether the logits of :meth:`loss` are those of the perturbed batch.
    logits_are_adversarial: ClassVar[bool] = True
    #: Number of the inner attack's few steps, which is watched for catastrophic overfitting and raised if it shows, see
    #: :mod:`art_clat.training.overfitting`. `None` for the attack's own steps, which are not watched.
    nb_steps: int | None = None
    #: Whether the second term is a feature distance, which should stay small beside the cross-entropy.
    has_distance: ClassVar[bool] = False
    #: Whether :meth:`inner_loss` is climbed in one step of size ε instead of the attack's steps.
    single_step: ClassVar[bool] = False

    def __init__(self, classifier: TensorClassifier, layers: Sequence[Layer] | None, weight: float) -> None:
        self.classifier = classifier
        self.layers = layers
        self.weight = weight

    def inner_loss(self, batch: Batch) -> Loss | None:
        """
        Return the loss that the inner attack climbs.

        :param batch: The batch before the attack.
        :return: A function of perturbed inputs; `None` for the attack's loss.
        """
        return None

    def inner_start(self, attack: TensorAttack, batch: Batch) -> torch.Tensor:
        """
        Choose where the inner attack starts; used only if :meth:`inner_loss` is overridden.

        :param attack: The attack, whose ball limits the start.
        :param batch: The batch before the attack.
        :return: Shape of ``batch.x``.
        """
        return attack.start(batch)

    @abc.abstractmethod
    def loss(self, batch: Batch, x_adv: torch.Tensor) -> BatchLoss:
        """
        Compute the loss that the optimiser minimises; the network is in the modes of training.

        :param batch: The batch before the attack.
        :param x_adv: Its perturbed inputs, shape of ``batch.x``.
        :return: The loss and its parts.
        """

    def perturb(self, attack: TensorAttack, batch: Batch) -> torch.Tensor:
        """
        Solve the inner maximisation, with the network in evaluation mode.

        :param attack: The attack; an :meth:`inner_loss` is climbed with its ball and steps.
        :param batch: The batch to perturb.
        :return: Perturbed inputs, shape of ``batch.x``, detached.
        """
        if not self.has_inner_loss():
            return attack(batch)
        return attack.climb(self.climbed, batch, start=self.inner_start(attack, batch), single_step=self.single_step)

    @classmethod
    def has_inner_loss(cls) -> bool:
        """Return whether the class overrides :meth:`inner_loss`; if so, the attack's ball and steps must be known."""
        return cls.inner_loss is not Objective.inner_loss

    def climbed(self, batch: Batch) -> Loss:
        """
        Return the loss that the inner attack climbs, the attack's own included.

        :param batch: The batch before the attack.
        :return: A function of perturbed inputs.
        """
        loss = self.inner_loss(batch)
        return self.classifier.loss_on(batch.y) if loss is None else loss


#: The objectives by name.
OBJECTIVES: dict[str, type[Objective]] = {}


def register_objective(name: str) -> Callable[[type[Objective]], type[Objective]]:
    """
    Register an objective under a name that the trainer's ``objective=`` accepts.

    Example::

        @register_objective("clean_loss_only")
        class CleanLossOnly(Objective):
            logits_are_adversarial = False

            def loss(self, batch, x_adv):
                loss, logits = self.classifier.loss(batch.x, batch.y)
                return BatchLoss(loss, loss.detach(), torch.zeros_like(loss), logits.detach())

    :param name: The name; it must not be taken.
    :return: A decorator that returns the class unchanged.
    :raises ValueError: If the name is taken.
    """

    def register(cls: type[Objective]) -> type[Objective]:
        if OBJECTIVES.get(name, cls) is not cls:
            raise ValueError(f"There is already an objective {name!r}; choose another name.")
        OBJECTIVES[name] = cls
        return cls

    return register


def list_objectives(*, first_stage: bool = False) -> list[str]:
    """
    List the objectives that the trainer's ``objective=`` or ``first_stage=`` accepts by name.

    >>> list_objectives(first_stage=True)
    ['pgd_at', 'trades', 'mart', 'awp', 'fgsm_rs']

    :param first_stage: List only the objectives that can train the whole network.
    :return: The names, in the order of registration.
    """
    return [name for name, cls in OBJECTIVES.items() if cls.trains_whole_network or not first_stage]


def find_objective(name: str, *, argument: str = "objective") -> type[Objective]:
    """Return the objective of a name; `argument` is where the user gave it, ``"objective"`` or ``"first_stage"``."""
    check_choice(name, list_objectives(first_stage=argument == "first_stage"), argument=argument)
    return OBJECTIVES[name]
