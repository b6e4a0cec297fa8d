"""What numbers can look like: schemes, exceptions, which engines load them, what they weigh."""
