"""Which prompts, in which resumable order."""
