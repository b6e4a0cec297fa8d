"""vLLM plugin: patches for defects of vLLM's CPU engine. vLLM loads it into its own processes only."""
