"""`quantgate measure`: a vLLM server under a known load, and its figures in `capacity.json`."""
