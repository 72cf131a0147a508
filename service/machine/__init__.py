"""What this process has of its machine: processors, limits, and the other workers beside it. Knows no other room."""
