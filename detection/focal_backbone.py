"""The backbone under the name that detectors' `custom_imports` use; it is registered by being imported."""

from openmmlab.focal_backbone import FocalBackbone

__all__ = ["FocalBackbone"]
