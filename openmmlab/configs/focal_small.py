"""Focal-S."""

import importlib  # an import of a package would make this a config of another kind

focal_small = importlib.import_module("openmmlab.variants").backbone("focal_small_patch4_window7_224")
