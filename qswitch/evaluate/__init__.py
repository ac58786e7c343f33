"""Measuring whether the student got better."""
