"""What is known of the load of each replica."""
