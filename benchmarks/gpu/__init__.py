"""What the first hour on a GPU is spent on, in stages of at most eight minutes; docs/gpu.md says what they decide."""
