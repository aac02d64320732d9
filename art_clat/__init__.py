"""CLAT, Criticality-Leveraged Adversarial Training (arXiv 2408.10204), for the Adversarial Robustness Toolbox."""

from art_clat.leaderboard.entries import write_robustbench_entry
from art_clat.models.backbones import create_backbone
from art_clat.robustness.evaluate import evaluate_robustness
from art_clat.robustness.report import RobustnessReport
from art_clat.selection.budget import Budget
from art_clat.selection.candidates import Candidates
from art_clat.selection.criticality import Criticality, LayerCriticality, measure_criticality
from art_clat.selection.rules import register_selection_rule, selection_rules
from art_clat.trainer import AdversarialTrainerCLATPyTorch
from art_clat.training.history import EpochRecord, History, SelectionRecord
from art_clat.training.objectives import objectives, register_objective
from art_clat.utils.robustbench_import import install_finder

__version__ = "0.1.0"

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

install_finder()  # RobustBench can be imported from here on
