"""What a training step costs beside the arithmetic."""
