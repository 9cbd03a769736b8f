"""Focal-L."""

import importlib  # an import of a package would make this a config of another kind

focal_large = importlib.import_module("openmmlab.variants").backbone("focal_large_patch4_window7_224")
