"""An ART classifier as functions of tensors; timm backbones; models and data by name."""
