"""Fault tests of training: real runs that are disturbed, and must end as undisturbed ones."""
