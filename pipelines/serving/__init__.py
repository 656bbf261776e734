"""The HTTP endpoint: a light ingress in front of a bounded engine, both deployments of Ray Serve."""
