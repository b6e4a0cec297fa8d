"""Base model + recipe -> variant directory with a manifest that says how good it was measured to be."""
