"""Manifests for people: lines, tables, and one HTML page."""
