"""CLAT, Criticality-Leveraged Adversarial Training (arXiv 2408.10204), for the Adversarial Robustness Toolbox."""

from art_clat.backbones import create_backbone
from art_clat.criticality import Criticality, LayerCriticality, measure_criticality
from art_clat.history import EpochRecord, History, SelectionRecord
from art_clat.robustbench import write_robustbench_entry
from art_clat.robustness import RobustnessReport, evaluate_robustness
from art_clat.trainer import AdversarialTrainerCLATPyTorch

__all__ = [
    "AdversarialTrainerCLATPyTorch",
    "Criticality",
    "EpochRecord",
    "History",
    "LayerCriticality",
    "RobustnessReport",
    "SelectionRecord",
    "create_backbone",
    "evaluate_robustness",
    "measure_criticality",
    "write_robustbench_entry",
]
