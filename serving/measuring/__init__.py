"""How fast a variant is: a vLLM server under a known load, and `capacity.json` with what came of it."""
