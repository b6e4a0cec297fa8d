"""The stages of a variant: tokens -> (transform) -> solve -> checkpoint -> evaluation -> seal."""
