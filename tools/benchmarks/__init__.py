"""Benchmarks of models, attention, data loading and detectors, all in alternating rounds."""
