"""What quantgate relies on in vLLM, checked against the sources of a vLLM version."""
