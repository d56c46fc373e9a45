"""Training: one resumable loop, and the commands that use it."""
