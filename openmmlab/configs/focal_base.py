"""Focal-B."""

import importlib  # an import of a package would make this a config of another kind

focal_base = importlib.import_module("openmmlab.variants").backbone("focal_base_patch4_window7_224")
