"""Hyper-parameter searches with Ray Tune over the product's own training: `m5 tune`."""
