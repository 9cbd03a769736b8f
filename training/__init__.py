"""Training, evaluation and speed measurement of a model; main.py is its command line."""
