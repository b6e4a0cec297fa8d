"""`quantgate demo`: quantizes a small model, serves all its variants and queries them, on one machine."""
