"""What the train command consists of: its options, whether a run may go on, the loop, and ranks that follow.

May know what commands may know, and no command.
"""
