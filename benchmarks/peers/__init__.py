"""Other servers that do the same work as the service, one small program each, for comparison."""
