"""HTTP/1.1 server for clients (Envoy's "downstream"): connections, request parsing, responses, listening sockets."""
