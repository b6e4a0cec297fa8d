"""Shared state of supervisors and gateways in different processes: which replicas run where, without their load."""
