"""What a load needs: the simulation, its fit and validation, what a million images cost, and a check of `capacity`."""
