"""Loading, checking, shrinking and exporting models."""
