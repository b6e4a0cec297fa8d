"""The files of a model directory: which are loaded, which are copied, which directories are refused. No torch."""
