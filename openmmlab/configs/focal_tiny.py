"""Focal-T."""

import importlib  # an import of a package would make this a config of another kind

focal_tiny = importlib.import_module("openmmlab.variants").backbone("focal_tiny_patch4_window7_224")
