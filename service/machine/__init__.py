"""What the machine grants this process: its processors, and the limits of its control group. Knows no other room."""
