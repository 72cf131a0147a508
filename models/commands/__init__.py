"""The offline commands, a file each, and what they share. `add_to` says what a command's line may hold, `run` does it.

May know everything in `models`; only `__main__` knows them.
"""
