"""Training of score networks: losses, weightings, times, batches, the loop."""
