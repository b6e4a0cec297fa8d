"""How far a variant is from its parent, and whether that is near enough."""
