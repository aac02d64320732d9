"""What an ART classifier does with inputs, as text."""

from __future__ import annotations

from typing import TYPE_CHECKING

from art.estimators.classification import PyTorchClassifier

if TYPE_CHECKING:
    pass
from art_clat.utils.descriptions import settings_of, text_of


def describe_inputs(classifier: PyTorchClassifier) -> dict[str, object]:
    """
    Describe what an ART classifier does with inputs before the network sees them.

    :param classifier: The classifier.
    :return: Names, and values that JSON can hold.
    """
    return {
        "clip_values": text_of(classifier.clip_values),
        "the preprocessing": [
            settings_of(operation, {name: getattr(operation, name, None) for name in operation.params})
            for operation in classifier.preprocessing_operations
        ],
    }
