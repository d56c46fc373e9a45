"""Evaluators of a frozen encoder. They yield (name, value) and never print."""
