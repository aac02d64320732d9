"""What an ART classifier does with inputs, as text."""

from __future__ import annotations

from art.estimators.classification import PyTorchClassifier

from art_clat.utils.descriptions import settings_of, text_of


def describe_inputs(classifier: PyTorchClassifier) -> dict[str, object]:
    """Describe, ready for JSON, what an ART classifier does with inputs before the network sees them."""
    return {
        "clip_values": text_of(classifier.clip_values),
        "the preprocessing": [
            settings_of(operation, {name: getattr(operation, name, None) for name in operation.params})
            for operation in classifier.preprocessing_operations
        ],
    }
