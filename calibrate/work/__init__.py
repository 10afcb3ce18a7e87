"""Many workers: batches planned beforehand, decoded anywhere, written where the plan says."""
