"""One offline page about a run, or about several."""
