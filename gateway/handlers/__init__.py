"""What answers requests: inference, models, and the admin port."""
