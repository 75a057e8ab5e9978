"""From a pool to shards: plan, map over pieces of the pool, reduce over partitions, finish."""
