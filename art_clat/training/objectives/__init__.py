"""What a batch climbs and minimises: the readings of CLAT's objective, adversarial training, and its rivals."""

from art_clat.training.objectives.base import (
    OBJECTIVES,
    BatchLoss,
    Objective,
    find_objective,
    list_objectives,
    register_objective,
)
from art_clat.training.objectives.clat import AdversarialCLAT, CleanCLAT, RelativeCLAT, SingleStepCLAT
from art_clat.training.objectives.rivals import (
    MART,
    TRADES,
    AdversarialTraining,
    AdversarialWeightPerturbation,
    SingleStepTraining,
)

__all__ = [
    "MART",
    "OBJECTIVES",
    "TRADES",
    "AdversarialCLAT",
    "AdversarialTraining",
    "AdversarialWeightPerturbation",
    "BatchLoss",
    "CleanCLAT",
    "Objective",
    "RelativeCLAT",
    "SingleStepCLAT",
    "SingleStepTraining",
    "find_objective",
    "list_objectives",
    "register_objective",
]
