"""The offline commands, one file each, and what they share. `add_to` says what the command line may hold, `run` does it.

May know everything in `models`; only `__main__` knows them.
"""
