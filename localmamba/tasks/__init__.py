"""Training, search and evaluation under Lightning; the rest of the package does without it."""
