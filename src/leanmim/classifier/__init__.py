"""Classifiers: fine-tuning from a START, measuring, and predicting."""
