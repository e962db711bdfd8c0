"""Laws of a state, p(x): what priors and marginals are."""
