"""What an operator should know about this machine before replicas run on it: facts, and findings from them."""
