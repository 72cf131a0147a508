"""What happens under overload, hostile bodies, clients that leave, restarts, and over a long time."""
