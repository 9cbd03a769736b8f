"""Focal-S with convolutional patch embeddings."""

import importlib  # an import of a package would make this a config of another kind

focal_small_conv = importlib.import_module("openmmlab.variants").backbone(
    "focal_small_useconv_patch4_window7_224"
)
