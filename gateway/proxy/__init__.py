"""The data path: connections to replicas, the exchange, its accounting."""
