"""What a gateway costs: CPU per request and per streamed chunk, added latency, memory; beside others, in one run."""
