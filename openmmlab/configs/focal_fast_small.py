"""Focal-fast-S, with convolutional patch embeddings as released."""

import importlib  # an import of a package would make this a config of another kind

focal_fast_small = importlib.import_module("openmmlab.variants").backbone(
    "focalv2_small_useconv_patch4_window7_224"
)
