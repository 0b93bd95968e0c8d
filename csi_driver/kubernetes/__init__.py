"""The Kubernetes API server, as far as this driver needs it by itself: small, optional, without a client library."""
