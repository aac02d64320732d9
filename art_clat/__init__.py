"""CLAT, Criticality-Leveraged Adversarial Training (arXiv 2408.10204), for the Adversarial Robustness Toolbox."""

from art_clat.backbones import create_backbone
from art_clat.criticality import Criticality, LayerCriticality, measure_criticality
from art_clat.history import EpochRecord, History, SelectionRecord
from art_clat.objectives import objectives, register_objective
from art_clat.robustbench import write_robustbench_entry
from art_clat.robustness import RobustnessReport, evaluate_robustness
from art_clat.selection import Budget, Candidates, register_selection_rule, selection_rules
from art_clat.trainer import AdversarialTrainerCLATPyTorch

__all__ = [
    "AdversarialTrainerCLATPyTorch",
    "Budget",
    "Candidates",
    "Criticality",
    "EpochRecord",
    "History",
    "LayerCriticality",
    "RobustnessReport",
    "SelectionRecord",
    "create_backbone",
    "evaluate_robustness",
    "measure_criticality",
    "objectives",
    "register_objective",
    "register_selection_rule",
    "selection_rules",
    "write_robustbench_entry",
]
