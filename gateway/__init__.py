"""request -> answer: one OpenAI-compatible address that picks a precision for every request."""
