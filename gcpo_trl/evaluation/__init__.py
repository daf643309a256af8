"""Benchmarks: a policy in, a report with standard errors out."""
