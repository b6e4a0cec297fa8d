"""Finds replicas in Kubernetes: the pods behind Services, by their EndpointSlices."""
