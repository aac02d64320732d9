"""What a batch minimises: the readings of the CLAT objective (eq. 5 and 6), adversarial training, and its rivals."""

from __future__ import annotations

import abc
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import nn

from art_clat.attacks.ascent import in_chunks
from art_clat.attacks.tensor_attack import TensorAttack
from art_clat.layers.features import Features
from art_clat.layers.layer import Layer
from art_clat.models.tensor_classifier import TensorClassifier
from art_clat.utils.modes import own_statistics
from art_clat.utils.processes import Part


@dataclass(frozen=True)
class BatchLoss:
    """
    The loss of one batch and what it is made of.

    :param loss: What is minimised, with its graph.
    :param cross_entropy: The classifier's own loss, detached.
    :param criticality_loss: What is added to it, detached, before its weight: the batch mean of the summed feature
           distance, or of the rival's own term.
    :param logits: Detached, shape (batch, nb_classes).
    """

    loss: torch.Tensor
    cross_entropy: torch.Tensor
    criticality_loss: torch.Tensor
    logits: torch.Tensor


class Objective(abc.ABC):
    """An inner attack, and the loss on its result."""

    #: Whether the logits of :meth:`loss` are those of the perturbed batch.
    logits_are_adversarial = True
    #: Whether :meth:`perturb` climbs another slope than the attack's own, and so needs to know its ball and steps.
    needs_ascent = False

    def perturb(self, attack: TensorAttack, x: torch.Tensor, y: torch.Tensor, part: Part | None = None) -> torch.Tensor:
        """
        Solve the inner maximisation, with the network in evaluation mode; unless overridden, by the attack itself.

        :param attack: The ART attack whose ball and steps are used.
        :param x: Inputs, shape (batch, *input_shape).
        :param y: Index labels, shape (batch,), or class probabilities, shape (batch, nb_classes).
        :param part: Which of the batch of all processes these are; `None` for all of it.
        :return: Perturbed inputs, same shape as `x`, detached.
        """
        return attack(x, y, part)

    @abc.abstractmethod
    def loss(self, x: torch.Tensor, x_adv: torch.Tensor, y: torch.Tensor) -> BatchLoss:
        """
        Compute what the optimiser minimises, in the modes the network is in.

        :param x: Inputs, shape (batch, *input_shape).
        :param x_adv: Perturbed inputs, same shape.
        :param y: Labels as in :meth:`perturb`.
        :return: The loss.
        """


class AdversarialTraining(Objective):
    """
    Plain adversarial training: cross-entropy on the adversarial examples (Madry et al., arXiv 1706.06083).

    :param network: The network.
    :param layers: The layers that are trained, or `None` for the whole network.
    """

    def __init__(self, network: TensorClassifier, layers: Sequence[Layer] | None = None) -> None:
        self.network = network
        self.fit = layers is None  # the preprocessing of training, or that of prediction

    def loss(self, x: torch.Tensor, x_adv: torch.Tensor, y: torch.Tensor) -> BatchLoss:
        loss, logits = self.network.loss(x_adv, y, fit=self.fit)
        return BatchLoss(loss, loss.detach(), torch.zeros_like(loss), logits.detach())


class AdversarialCLAT(Objective):
    """
    CLAT on the ordinary adversarial examples: one output attack gives δ, and the critical layers minimise

        L(F(x+δ), y) + λ · E[ Σ_{i∈S} ‖F_i(x+δ) − F_i(x)‖_2 ].

    This departs from eq. 5 and 6 in two ways: the cross-entropy is on the perturbed batch, and the same δ serves the
    feature distance. The gradient flows through both features, as in eq. 6. The clean pass ends at the last of them.
    BatchNorms in S that it meets normalise by its own batch, in training mode, as in TRADES, but their running
    statistics are those of the perturbed batches alone: the same for all of S, and the same as in adversarial training.

    :param network: The network.
    :param layers: The critical layers S.
    :param weight: λ, at least 0.
    :param relative: Divide every distance by the length of the clean feature, ``‖F_i(x)‖_2``, as LSA's layer-wise
           penalty does (arXiv 2202.02626); the scale of the layer's weights cancels then, in the gradient too.
    """

    def __init__(
        self, network: TensorClassifier, layers: Sequence[Layer], weight: float, *, relative: bool = False
    ) -> None:
        self.network = network
        self.features = Features(layers, lengths=relative)
        self.modules = [module for layer in layers for module in layer.modules]
        self.weight = weight
        self.relative = relative

    def loss(self, x: torch.Tensor, x_adv: torch.Tensor, y: torch.Tensor) -> BatchLoss:
        with self.features.keep(stop=True), own_statistics(self.modules):
            self.network.logits(x)
        with self.features.compare(forget=True):
            cross_entropy, logits = self.network.loss(x_adv, y)
        total = self.features.total_relative_distance if self.relative else self.features.total_distance
        return _weighted(cross_entropy, total(), self.weight, logits)


class CleanCLAT(Objective):
    """
    CLAT to the letter: an inner attack on the summed feature distance (eq. 5) and clean cross-entropy (eq. 6).

        min over S:  L(F(x), y) + λ · E[ sup_δ Σ_{i∈S} ‖F_i(x+δ) − F_i(x)‖_2 ].

    The distance is zero at δ = 0, and so is its gradient: the inner attack starts at random whatever the ART attack
    does. Running statistics of BatchNorms in S are those of the clean batches.

    :param network: The network; its preprocessing must be differentiable.
    :param layers: The critical layers S.
    :param weight: λ, at least 0.
    :param single_step: One step of size ε instead of the attack's own steps: "CLAT (fast)".
    """

    logits_are_adversarial = False
    needs_ascent = True

    def __init__(
        self, network: TensorClassifier, layers: Sequence[Layer], weight: float, *, single_step: bool = False
    ) -> None:
        self.network = network
        self.features = Features(layers)
        self.modules = [module for layer in layers for module in layer.modules]
        self.weight = weight
        self.single_step = single_step

    def perturb(self, attack: TensorAttack, x: torch.Tensor, y: torch.Tensor, part: Part | None = None) -> torch.Tensor:
        full = attack.ascent
        assert full is not None, "the trainer has checked this"
        ascent = full.single_step() if self.single_step else replace(full, random_start=True, decay=None)

        def distance(z: torch.Tensor) -> torch.Tensor:
            with self.features.compare(stop=True):
                self.network.logits(z)
            total = self.features.total_distance()
            return total if total.requires_grad else total + 0 * z.flatten(1).sum(dim=1)  # no feature depends on z

        def climb(x: torch.Tensor, start: torch.Tensor) -> torch.Tensor:
            with torch.no_grad(), self.features.keep(stop=True):
                self.network.logits(x)
            return ascent(distance, x, start)

        with self.network.attacked():
            return in_chunks(climb, x, ascent.start(x, part or Part(len(x))))

    def loss(self, x: torch.Tensor, x_adv: torch.Tensor, y: torch.Tensor) -> BatchLoss:
        # The perturbed pass comes first: the backward pass reaches it last, when the memory of the other is free again.
        with self.features.keep(stop=True), own_statistics(self.modules):
            self.network.logits(x_adv)
        with self.features.compare(forget=True):
            cross_entropy, logits = self.network.loss(x, y)
        return _weighted(cross_entropy, self.features.total_distance(), self.weight, logits)


class TRADES(Objective):
    """
    TRADES (Zhang et al., arXiv 1901.08573): clean cross-entropy, and the divergence of the perturbed outputs,

        L(F(x), y) + β · max_δ KL(p(x) ‖ p(x+δ)).

    :param network: The network; its preprocessing must be differentiable.
    :param layers: The layers that are trained, or `None` for the whole network.
    :param weight: β, at least 0.
    """

    logits_are_adversarial = False
    needs_ascent = True

    #: Standard deviation of the noise that the inner attack starts from, as its authors' code has it: the divergence
    #: and its gradient are zero at δ = 0.
    START = 0.001

    def __init__(self, network: TensorClassifier, layers: Sequence[Layer] | None = None, weight: float = 6.0) -> None:
        self.network = network
        self.fit = layers is None
        self.weight = weight

    def perturb(self, attack: TensorAttack, x: torch.Tensor, y: torch.Tensor, part: Part | None = None) -> torch.Tensor:
        full = attack.ascent
        assert full is not None, "the trainer has checked this"
        ascent, part = replace(full, random_start=False, decay=None), part or Part(len(x))
        noise = torch.randn((part.total, *x.shape[1:]), device=x.device, dtype=x.dtype)[part.mine]

        def climb(x: torch.Tensor, start: torch.Tensor) -> torch.Tensor:
            with torch.no_grad():
                clean = self.network.logits(x)
            return ascent(lambda z: _divergence(clean, self.network.logits(z)), x, start)

        with self.network.attacked():
            return in_chunks(climb, x, ascent.ball.clip(x + self.START * noise))

    def loss(self, x: torch.Tensor, x_adv: torch.Tensor, y: torch.Tensor) -> BatchLoss:
        cross_entropy, clean = self.network.loss(x, y, fit=self.fit)
        _, perturbed = self.network.loss(x_adv, y, fit=self.fit)
        return _weighted(cross_entropy, _divergence(clean, perturbed), self.weight, clean)


class MART(Objective):
    """
    MART (Wang et al., ICLR 2020): boosted cross-entropy on the adversarial examples, and the divergence from the clean
    outputs, which counts as much as the clean sample is misclassified,

        −log p_y(x') − log(1 − max_{k≠y} p_k(x')) + λ · KL(p(x) ‖ p(x')) · (1 − p_y(x)).

    The classifier's own loss is not used; labels that are probabilities count as their largest. x' is what the
    trainer's attack gives; its authors' code begins PGD at Gaussian noise of 0.001 instead.

    :param network: The network.
    :param layers: The layers that are trained, or `None` for the whole network.
    :param weight: λ, at least 0.
    """

    def __init__(self, network: TensorClassifier, layers: Sequence[Layer] | None = None, weight: float = 5.0) -> None:
        self.network = network
        self.fit = layers is None
        self.weight = weight

    def loss(self, x: torch.Tensor, x_adv: torch.Tensor, y: torch.Tensor) -> BatchLoss:
        _, clean = self.network.loss(x, y, fit=self.fit)
        _, perturbed = self.network.loss(x_adv, y, fit=self.fit)
        labels = self.network.one_hot(y).argmax(dim=1)
        log_p = perturbed.log_softmax(dim=1)
        others = torch.ones_like(log_p, dtype=torch.bool).scatter(1, labels[:, None], False)
        runner_up = log_p.masked_fill(~others, -torch.inf).amax(dim=1)
        boosted = -log_p.gather(1, labels[:, None])[:, 0] - torch.log1p(-runner_up.exp().clamp(max=1 - 1e-6))
        wrong = 1 - clean.softmax(dim=1).gather(1, labels[:, None])[:, 0]
        return _weighted(boosted.mean(), _divergence(clean, perturbed) * wrong, self.weight, perturbed)


def _divergence(clean: torch.Tensor, perturbed: torch.Tensor) -> torch.Tensor:
    """Give ``KL(p(x) ‖ p(x+δ))`` of every sample, from logits."""
    log_clean, log_perturbed = clean.log_softmax(dim=1), perturbed.log_softmax(dim=1)
    return (log_clean.exp() * (log_clean - log_perturbed)).sum(dim=1)


def _weighted(cross_entropy: torch.Tensor, term: torch.Tensor, weight: float, logits: torch.Tensor) -> BatchLoss:
    mean = term.mean()
    return BatchLoss(cross_entropy + weight * mean, cross_entropy.detach(), mean.detach(), logits.detach())


#: What an objective is made of by name: the network, the layers, and the weight of its second term.
_Maker = Callable[[TensorClassifier, Sequence[Layer], float], Objective]

_OBJECTIVES: dict[str, tuple[_Maker, float]] = {}


def register_objective(name: str, *, weight: float) -> Callable[[_Maker], _Maker]:
    """
    Make an objective of the second stage known by a name, for the trainer's ``objective=``.

    Example::

        @register_objective("squared", weight=0.01)
        class Squared(AdversarialCLAT):
            def loss(self, x, x_adv, y): ...

    :param name: The name.
    :param weight: The weight of its second term where the trainer's ``criticality_weight`` is `None`.
    :return: A decorator that gives what it is given back: a class, or a function, of the network, the layers and the
             weight. Where the objective has ``needs_ascent``, a function must have that attribute, too.
    :raises ValueError: If the name is taken.
    """

    def register(maker: _Maker) -> _Maker:
        if name in _OBJECTIVES:
            raise ValueError(f"There is an objective {name!r} already; choose another name.")
        _OBJECTIVES[name] = (maker, weight)
        return maker

    return register


def objectives() -> tuple[str, ...]:
    """
    Give the names of the objectives of the second stage.

    :return: In the order they were registered in.
    """
    return tuple(_OBJECTIVES)


def default_weight(objective: str) -> float:
    """
    Give the weight that an objective's second term has unless the user says otherwise.

    :param objective: Its name.
    :return: The weight.
    """
    return _OBJECTIVES[objective][1]


def needs_ascent(objective: str) -> bool:
    """
    Tell whether an objective needs to know the ball and the steps of the attack.

    :param objective: Its name.
    :return: What the class that is registered, or the function, says of itself.
    """
    maker: object = _OBJECTIVES[objective][0]
    while isinstance(maker, partial):
        maker = maker.func
    return bool(getattr(maker, "needs_ascent", False))


def make_objective(name: str, network: TensorClassifier, layers: Sequence[Layer], weight: float) -> Objective:
    """
    Make an objective of the second stage.

    :param name: Its name.
    :param network: The network.
    :param layers: The layers that are trained.
    :param weight: The weight of its second term.
    :return: The objective.
    """
    return _OBJECTIVES[name][0](network, layers, weight)


register_objective("adversarial", weight=0.02)(AdversarialCLAT)
register_objective("clean", weight=0.05)(CleanCLAT)
register_objective("clean_single_step", weight=0.05)(partial(CleanCLAT, single_step=True))
register_objective("relative", weight=1.0)(partial(AdversarialCLAT, relative=True))
register_objective("pgd_at", weight=0.0)(lambda network, layers, weight: AdversarialTraining(network, layers))
register_objective("trades", weight=6.0)(TRADES)
register_objective("mart", weight=5.0)(MART)

#: The objectives of the first stage, which trains the whole network.
FIRST_STAGES: dict[str, Callable[[TensorClassifier], Objective]] = {
    "pgd_at": AdversarialTraining,
    "trades": TRADES,
    "mart": MART,
}


class AsModule(nn.Module):
    """
    An objective's loss as a module, which is what ``DistributedDataParallel`` takes.

    :param model: The network, whose parameters the module has.
    :param objective: The objective.
    """

    def __init__(self, model: nn.Module, objective: Objective) -> None:
        super().__init__()
        self.model = model
        self.objective = objective

    def forward(
        self, x: torch.Tensor, x_adv: torch.Tensor, y: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
        """
        Compute the loss.

        :param x: As in :meth:`Objective.loss`, like the others.
        :return: The fields of :class:`BatchLoss`.
        """
        loss = self.objective.loss(x, x_adv, y)
        return loss.loss, loss.cross_entropy, loss.criticality_loss, loss.logits
