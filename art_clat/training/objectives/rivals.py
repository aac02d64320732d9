"""Adversarial training without a feature distance: PGD-AT, TRADES, MART, AWP and FGSM-RS."""

from __future__ import annotations

import torch

from art_clat.attacks.ascent import Loss
from art_clat.attacks.tensor_attack import TensorAttack
from art_clat.training.objectives.base import BatchLoss, Objective, register_objective
from art_clat.utils.batch import Batch


class _OutputObjective(Objective):
    """An objective of outputs only, which can therefore train the whole network."""

    trains_whole_network = True

    def outputs(self, x: torch.Tensor, y: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Compute loss and logits, with the preprocessing of training if the whole network is trained."""
        return self.classifier.loss(x, y, fit=self.layers is None)


@register_objective("pgd_at")
class AdversarialTraining(_OutputObjective):
    """Plain adversarial training: cross-entropy on the adversarial examples (Madry et al., arXiv 1706.06083)."""

    def loss(self, batch: Batch, x_adv: torch.Tensor) -> BatchLoss:
        loss, logits = self.outputs(x_adv, batch.y)
        return BatchLoss(loss, loss.detach(), torch.zeros_like(loss), logits.detach())


@register_objective("trades")
class TRADES(_OutputObjective):
    """
    TRADES (Zhang et al., arXiv 1901.08573): clean cross-entropy, and the divergence of the perturbed outputs,

        L(F(x), y) + β · max_δ KL(p(x) ‖ p(x+δ)).
    """

    default_weight = 6.0
    logits_are_adversarial = False

    #: Standard deviation of the noise that the inner attack starts from, as in the authors' code. At δ = 0 the
    #: divergence and its gradient are zero.
    START = 0.001

    def inner_loss(self, batch: Batch) -> Loss:
        with torch.no_grad():
            clean = self.classifier.logits(batch.x)
        return lambda z: _divergence(clean, self.classifier.logits(z))

    def inner_start(self, attack: TensorAttack, batch: Batch) -> torch.Tensor:
        return attack.start_near(batch, self.START)

    def loss(self, batch: Batch, x_adv: torch.Tensor) -> BatchLoss:
        cross_entropy, clean = self.outputs(batch.x, batch.y)
        _, perturbed = self.outputs(x_adv, batch.y)
        return BatchLoss.weighted(cross_entropy, _divergence(clean, perturbed), self.weight, clean)


@register_objective("mart")
class MART(_OutputObjective):
    """
    MART (Wang et al., ICLR 2020): boosted cross-entropy on the adversarial examples, and their divergence from the
    clean outputs, weighted by how wrong the clean prediction is,

        −log p_y(x') − log(1 − max_{k≠y} p_k(x')) + λ · KL(p(x) ‖ p(x')) · (1 − p_y(x)).

    It does not use the classifier's loss. Of labels that are probabilities it uses the largest. The trainer's attack
    makes x'; the authors' code starts PGD from Gaussian noise of standard deviation 0.001 instead.
    """

    default_weight = 5.0

    def loss(self, batch: Batch, x_adv: torch.Tensor) -> BatchLoss:
        _, clean = self.outputs(batch.x, batch.y)
        _, perturbed = self.outputs(x_adv, batch.y)
        labels = self.classifier.one_hot(batch.y).argmax(dim=1)
        log_p = perturbed.log_softmax(dim=1)
        others = torch.ones_like(log_p, dtype=torch.bool).scatter(1, labels[:, None], False)
        runner_up = log_p.masked_fill(~others, -torch.inf).amax(dim=1)
        boosted = -log_p.gather(1, labels[:, None])[:, 0] - torch.log1p(-runner_up.exp().clamp(max=1 - 1e-6))
        wrong = 1 - clean.softmax(dim=1).gather(1, labels[:, None])[:, 0]
        return BatchLoss.weighted(boosted.mean(), _divergence(clean, perturbed) * wrong, self.weight, perturbed)


@register_objective("awp")
class AdversarialWeightPerturbation(AdversarialTraining):
    """
    Adversarial weight perturbation on PGD-AT (Wu et al., arXiv 2004.05884): flat minima of the adversarial loss,

        max over ‖v_i‖ ≤ γ·‖w_i‖ of  L(F_{w+v}(x'), y),

    for each weight tensor w_i. γ is the trainer's ``weight_perturbation``, or 0.01 if that is 0. The authors use 0.005
    on CIFAR. As in their code, v is one step along the gradient and only tensors of two or more dimensions whose name
    contains "weight" move. Unlike in their code, the weights are put back before the optimiser's step, not after it, so
    that weight decay is that of the weights themselves.
    """

    weight_perturbation = 0.01


#: Summed length of FGSM-RS's steps, in units of ε.
REACH = 1.25


@register_objective("fgsm_rs")
class SingleStepTraining(AdversarialTraining):
    """
    PGD-AT with a single step of 1.25·ε from a random start in the ball (FGSM-RS, Wong et al., arXiv 2001.03994).

    It takes the ball from the trainer's attack. The network is attacked in evaluation mode, as everywhere here; the
    authors' code attacks it in training mode. :class:`art_clat.training.overfitting.OverfittingGuard` watches it: after
    catastrophic overfitting the attack makes 2, 4 or 8 steps, of 1.25·ε together.
    """

    nb_steps = 1

    @classmethod
    def has_inner_loss(cls) -> bool:
        return True  # the ball must be known, although the loss is the attack's

    def perturb(self, attack: TensorAttack, batch: Batch) -> torch.Tensor:
        assert self.nb_steps is not None
        return attack.in_few_steps(batch, self.nb_steps, reach=REACH)


def _divergence(clean: torch.Tensor, perturbed: torch.Tensor) -> torch.Tensor:
    """Compute ``KL(p(x) ‖ p(x+δ))`` of every sample, from logits."""
    log_clean, log_perturbed = clean.log_softmax(dim=1), perturbed.log_softmax(dim=1)
    return (log_clean.exp() * (log_clean - log_perturbed)).sum(dim=1)
