"""What clients see: endpoints, request parsing, errors, server-sent events."""
