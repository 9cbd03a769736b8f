"""Benchmarks of models, the attention operator, data loading and detectors; all compare in alternating rounds."""
