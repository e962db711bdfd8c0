"""One solve of an SDE with its score: model, prior, plan, grid, samples, paths."""
