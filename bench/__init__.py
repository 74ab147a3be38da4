"""What cachefs costs and gains, measured. Rule: nothing here is imported by cachefs, or leaves loopback."""
