"""What hurts the service, and who notices: overload, hostile bodies, clients that leave, restarts, long runs."""
