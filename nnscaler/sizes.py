"""Sizes that the run time works with, and that the planner counts on."""

BUCKET_ELEMENTS = 2**25  # of a bucket, which is exchanged as one: large enough for full bandwidth, small beside a model
MOST_IN_FLIGHT = 6  # buckets whose exchange goes on beside backward: as many as one layer's backward fills at once
MOST_DEFERRED = 2  # gathered weights whose gradients are on their way to their shards, while others are computed
PREFETCH_BYTES = 2**28  # of weights, which are gathered before they are needed
STATES_AHEAD = 2  # buckets whose optimizer state is on its way from the host, while another one is updated
GRADIENT_SLOTS = 8  # gradients of buckets that are on the device at a time, of those that lie on the host
