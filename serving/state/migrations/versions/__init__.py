"""One module per version of the state database."""
