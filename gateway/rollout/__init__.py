"""Rollouts: a new variant takes over a rung in steps, each gated by sequential tests on live traffic."""
