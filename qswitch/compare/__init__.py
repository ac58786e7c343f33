"""Which method is better from one start at one budget: cells, verdicts and the table of `qswitch compare`."""
