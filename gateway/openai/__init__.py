"""The OpenAI and Anthropic wire formats: endpoints, request parsing, limits, responses, streams, errors."""
