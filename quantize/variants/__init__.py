"""Variant directories: written, checked, sealed, compared, taken over and cleaned up."""
