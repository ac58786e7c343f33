"""One offline page about a run."""
