"""`m5 plan`: what training would need on a described cluster, worked out on a machine that has no GPU."""
