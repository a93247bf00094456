"""A trace-driven simulator of one server, over the server's own policies, estimators and forest."""
