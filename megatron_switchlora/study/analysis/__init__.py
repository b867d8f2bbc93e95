"""How the weights of a run have moved."""
