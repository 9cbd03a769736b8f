"""Data sets and loaders for image classification: `build_loaders` builds everything that training needs."""

from data.build import Loaders, build_loaders, check_same_data
from data.datasets import EvalImages, TrainImages
from data.images import UndecodableImageError
from data.samplers import EvalSampler, TrainSampler

__all__ = [
    "EvalImages",
    "EvalSampler",
    "Loaders",
    "TrainImages",
    "TrainSampler",
    "UndecodableImageError",
    "build_loaders",
    "check_same_data",
]
