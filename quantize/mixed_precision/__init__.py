"""`scheme: auto`: bits and group size per module, chosen within a budget."""
