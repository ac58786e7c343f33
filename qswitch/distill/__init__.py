"""Learning from rollouts: teacher outputs, divergences, the loss, the training loop."""
