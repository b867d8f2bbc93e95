"""LTE: heads that train apart and are merged every T steps. `options`: what is set and checked; `heads`: the three
kinds of heads; `merging`: what they give each other."""
