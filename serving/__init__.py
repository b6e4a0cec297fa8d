"""variant -> running, verified replica. vLLM is a command line and an HTTP address here, never an import."""
