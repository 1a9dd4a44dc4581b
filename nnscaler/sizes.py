"""Sizes that the run time works with and the planner counts on."""

BUCKET_ELEMENTS = 2**25  # a bucket is exchanged as one: large enough for full bandwidth, small beside the model
MOST_IN_FLIGHT = 6  # buckets whose exchange goes on beside backward: what one layer's backward gives at once
PREFETCH_BYTES = 2**28  # of weights, gathered before they are needed
STATES_AHEAD = 2  # buckets whose optimizer state is on its way from the host while another is updated
