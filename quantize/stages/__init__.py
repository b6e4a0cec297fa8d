"""The five stages of a variant: tokens -> solve -> checkpoint -> evaluation -> seal."""
