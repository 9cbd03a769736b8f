"""Focal-T with convolutional patch embeddings."""

import importlib  # an import of a package would make this a config of another kind

focal_tiny_conv = importlib.import_module("openmmlab.variants").backbone(
    "focal_tiny_useconv_patch4_window7_224"
)
