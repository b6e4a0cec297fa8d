"""What a gateway serves, and how: the values of `/admin/status`, and what they are made of."""
