"""Train LTE: heads that train independently and are merged every T steps.

`options` holds the options and their rules, `heads` the three kinds of heads, and `merging` the means that heads
exchange at a merge.
"""
