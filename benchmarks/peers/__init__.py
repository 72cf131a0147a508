"""Other servers that do the service's work, one small program each, to be measured beside it."""
