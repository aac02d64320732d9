"""CLAT, Criticality-Leveraged Adversarial Training (arXiv 2408.10204), for the Adversarial Robustness Toolbox."""

from art_clat.config import Budget, FitOptions, LayerOptions, PerformanceOptions, ReuseOptions, SelectionOptions
from art_clat.layers.layer import Layer
from art_clat.leaderboard.entries import write_robustbench_entry
from art_clat.models.backbones import create_backbone
from art_clat.models.two_logits import TwoLogits
from art_clat.robustness.evaluate import evaluate_robustness
from art_clat.robustness.report import RobustnessReport
from art_clat.selection.candidates import Candidates
from art_clat.selection.criticality import Criticality, LayerCriticality, measure_criticality
from art_clat.selection.rules import list_selection_rules, register_selection_rule
from art_clat.trainer import AdversarialTrainerCLATPyTorch
from art_clat.training.augmentation import CropAndFlip
from art_clat.training.callbacks import Callback, CSVLog, RunEvent, TensorBoardLog
from art_clat.training.history import EpochRecord, History, SelectionRecord
from art_clat.training.loop import TrainingLoop
from art_clat.training.objectives import (
    AdversarialCLAT,
    BatchLoss,
    CleanCLAT,
    Objective,
    list_objectives,
    register_objective,
)
from art_clat.utils.batch import Batch
from art_clat.utils.robustbench_import import install_finder

__version__ = "0.1.0"

__all__ = [
    "AdversarialCLAT",
    "AdversarialTrainerCLATPyTorch",
    "Batch",
    "BatchLoss",
    "Budget",
    "CSVLog",
    "Callback",
    "Candidates",
    "CleanCLAT",
    "Criticality",
    "CropAndFlip",
    "EpochRecord",
    "FitOptions",
    "History",
    "Layer",
    "LayerCriticality",
    "LayerOptions",
    "Objective",
    "PerformanceOptions",
    "ReuseOptions",
    "RobustnessReport",
    "RunEvent",
    "SelectionOptions",
    "SelectionRecord",
    "TensorBoardLog",
    "TrainingLoop",
    "TwoLogits",
    "create_backbone",
    "evaluate_robustness",
    "list_objectives",
    "list_selection_rules",
    "measure_criticality",
    "register_objective",
    "register_selection_rule",
    "write_robustbench_entry",
]

install_finder()  # RobustBench can be imported from here on
