"""Laws of a state, p(x), for priors and marginals."""
