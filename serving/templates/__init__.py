"""Chat templates: what a model's own does about thinking, and what is derived from it where an alias wants more."""
