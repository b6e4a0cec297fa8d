"""Routing decisions as pure functions: which variants may answer, and which replica does. No I/O, no clock.

The values of a decision are msgspec structs with `gc=False`: they have no reference cycles, and the garbage collector
does not traverse the thousand decisions that are kept.
"""
