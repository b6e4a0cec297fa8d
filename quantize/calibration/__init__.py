"""Calibration text, from lines of JSON to checked token samples."""
