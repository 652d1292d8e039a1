"""Training on Ray Train: what is read in which order, who computes, and how it goes on after a stop."""
