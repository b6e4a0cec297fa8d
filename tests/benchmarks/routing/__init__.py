"""How requests are routed over replicas of several precisions: our policy beside others, simulated and over sockets."""
