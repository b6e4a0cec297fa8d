"""The clients' side of the wire: HTTP/1.1 connections, their requests, and what goes back."""
