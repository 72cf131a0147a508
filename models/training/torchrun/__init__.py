"""One training by several processes, as torchrun starts them: what they share, and how a lost one is noticed."""
