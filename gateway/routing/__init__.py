"""Pure decisions: which variants may answer, which replica does. No I/O and no clock of their own.

The values of a decision are `gc=False`: none can refer back to itself, and a thousand decisions are kept, which the
garbage collector would look through again and again.
"""
